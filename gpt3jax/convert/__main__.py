"""`python -m gpt3jax.convert`: weights in and out.

    from-hf DIR --output CKPT                  a Hugging Face GPT-2 folder becomes a checkpoint
    to-hf --checkpoint CKPT --output DIR       the newest checkpoint becomes such a folder
    from-megatron DIR --output CKPT            a Megatron-LM GPT checkpoint becomes one of ours
    to-megatron --checkpoint CKPT --output DIR --tensor T --pipeline P
                                               the newest checkpoint becomes a Megatron-LM one

All are exact, run on the CPU, whatever the machine has, and read and write layer by layer.
"""

import dataclasses
import itertools
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import tyro

from gpt3jax import errors
from gpt3jax.config import command, schema, user_paths, validation
from gpt3jax.convert import hf_gpt2, hf_tokenizer, megatron, tensor_files
from gpt3jax.data import tokenizer, tokenizer_files, tokenizer_sources
from gpt3jax.sharding import meshes

if TYPE_CHECKING:
    from gpt3jax.checkpoint import parameters


@dataclasses.dataclass(frozen=True, kw_only=True)
class FromHf:
    """A Hugging Face GPT-2 folder (config.json, safetensors, tokenizer) becomes a checkpoint."""

    folder: tyro.conf.Positional[user_paths.Path]
    """The folder, as transformers' save_pretrained writes it."""
    output: user_paths.Path
    """Folder for the checkpoint, and for a copy of the tokenizer's files."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToHf:
    """The newest checkpoint of a folder becomes a Hugging Face GPT-2 folder."""

    checkpoint: user_paths.Path
    """Folder of checkpoints, as checkpoint.dir."""
    output: user_paths.Path
    """Folder to write; it must be new or empty."""
    vocab_file: user_paths.Path = ""
    """GPT-2 vocabulary (vocab.json) to put beside the weights; else the checkpoint's own."""
    merge_file: user_paths.Path = ""
    """GPT-2 merges (merges.txt), with vocab_file."""
    tokenizer: user_paths.Path = ""
    """In place of these two: a folder with a tokenizer, all of whose files are put there."""


def from_hf(options: FromHf) -> str:
    """Write the checkpoint and return a line about it.

    Raises:
        UserError: a file that is missing or damaged, a model that ours cannot be, or an output
            that has checkpoints.
    """
    from gpt3jax.checkpoint import parameters  # after parsing: JAX takes seconds

    folder, output = pathlib.Path(options.folder), pathlib.Path(options.output).absolute()
    vocab = tokenizer_sources.vocabulary(folder) if tokenizer_files.find(folder) else {}
    special = tokenizer_files.special_ids(folder, vocab)
    own_eod = special.get("eos_token", vocab.get(tokenizer.END_OF_TEXT))
    model, eod_id = hf_gpt2.read_config(folder, own_eod)
    validation.check_model(model, schema.Data())
    weights = hf_gpt2.Weights(folder, model)
    store = parameters.new_store(str(output))
    data = schema.Data(**tokenizer_files.copy_folder(folder, output), eod_id=eod_id)
    parameters.write(store, parameters.untrained(model, data), weights.rows)
    told = "its tokenizer" if vocab else "no tokenizer.json, nor vocab.json and merges.txt there"
    return f"{output}: GPT-2 of {model.n_layers} x {model.d_model} x {model.n_heads}, {told}"


def to_hf(options: ToHf) -> str:
    """Write the folder and return a line about it.

    Raises:
        UserError: no checkpoint, a damaged one, a model that GPT-2's config cannot express, or an
            output that is not empty, or weights that are not finite.
    """
    from gpt3jax.checkpoint import parameters

    output = pathlib.Path(options.output)
    source = parameters.open_newest(options.checkpoint, meshes.make_mesh(schema.Mesh()))
    model, data = source.cfg.model, source.cfg.data
    stored = parameters.find(options.checkpoint)[2].model  # with its dropout
    if output.is_dir() and any(output.iterdir()):
        raise errors.UserError(f"--output={output} is not empty: give a new folder")
    hf_gpt2.check(model)
    if options.tokenizer or options.vocab_file or options.merge_file:
        files = hf_tokenizer.asked_for(options.tokenizer, options.vocab_file, options.merge_file)
    else:
        files = hf_tokenizer.named(data, pathlib.Path(options.checkpoint))
    output.mkdir(parents=True, exist_ok=True)
    vocab = hf_tokenizer.write(files, output, model.seq_len, data.eod_id)
    writer = tensor_files.Writer(output)
    for name in hf_gpt2.NAMES:
        for theirs, tensor in _gpt2_tensors(source, name):
            tensor_files.check_finite(options.checkpoint, theirs, tensor)
            writer.add(theirs, tensor.reshape(hf_gpt2.flat_shape(theirs, tensor.shape)))
    writer.close()
    special = tokenizer_files.special_ids(output, vocab)
    hf_gpt2.write_config(output, stored, data.eod_id, special)  # last: it completes the folder
    told = "with its tokenizer" if vocab else "without a tokenizer"
    return f"{output}: GPT2LMHeadModel of step {source.step}, {told}"


def _gpt2_tensors(source: "parameters.Trained", name: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yield GPT-2's tensors of one of our parameters, which is read layer by layer."""
    if not name.startswith("blocks/"):
        array = source.whole(name)
        rows = source.cfg.model.softmax_size if name == "embedding_VD" else len(array)
        yield hf_gpt2.tensor_name(name, 0), array[:rows]
        return
    for i, layer in enumerate(itertools.chain.from_iterable(source.blocks(name))):
        yield hf_gpt2.tensor_name(name, i), layer


def main() -> int:
    """Parse, convert, tell what was written; return the exit status."""
    commands = (
        Annotated[FromHf, tyro.conf.subcommand("from-hf")]
        | Annotated[ToHf, tyro.conf.subcommand("to-hf")]
        | Annotated[megatron.FromMegatron, tyro.conf.subcommand("from-megatron")]
        | Annotated[megatron.ToMegatron, tyro.conf.subcommand("to-megatron")]
    )
    run: dict[type, Callable[[Any], str]] = {
        FromHf: from_hf,
        ToHf: to_hf,
        megatron.FromMegatron: megatron.from_megatron,
        megatron.ToMegatron: megatron.to_megatron,
    }

    def convert() -> None:
        options = command.parse(commands, "convert", __doc__)
        import jax  # after parsing: it takes seconds

        jax.config.update("jax_platforms", "cpu")
        print(run[type(options)](options))

    return command.run(convert)


if __name__ == "__main__":
    sys.exit(main())
