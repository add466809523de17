"""`python -m gpt3jax.convert`: convert weights from and to other formats.

    from-hf DIR --output CKPT                  a Hugging Face GPT-2 folder to a checkpoint
    to-hf --checkpoint CKPT --output DIR       the newest checkpoint to a Hugging Face GPT-2 folder
    from-megatron DIR --output CKPT            a Megatron-LM GPT checkpoint to a checkpoint
    to-megatron --checkpoint CKPT --output DIR --tensor T --pipeline P
                                               the newest checkpoint to a Megatron-LM one

All are exact, run on the CPU, and read and write layer by layer.
"""

import dataclasses
import itertools
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import tyro

from gpt3jax.config import command_line, schema, user_paths, validation
from gpt3jax.convert import hf_gpt2, hf_tokenizer, megatron, tensor_files
from gpt3jax.data import tokenizer, tokenizer_files, tokenizer_sources

if TYPE_CHECKING:
    from gpt3jax.checkpoint import parameters


@dataclasses.dataclass(frozen=True, kw_only=True)
class FromHf:
    """Convert a Hugging Face GPT-2 folder (config.json, safetensors, tokenizer) to a checkpoint."""

    folder: tyro.conf.Positional[user_paths.Path]
    """The folder, as transformers' save_pretrained writes it."""
    output: user_paths.Path
    """Folder for the checkpoint and a copy of the tokenizer's files."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToHf:
    """Convert the newest checkpoint of a folder to a Hugging Face GPT-2 folder."""

    checkpoint: user_paths.Path
    """Folder of checkpoints, such as checkpoint.dir."""
    output: user_paths.Path
    """Folder to write to; it must be new or empty."""
    vocab_file: user_paths.Path = ""
    """GPT-2 vocabulary (vocab.json) to copy beside the weights (empty: the checkpoint's own)."""
    merge_file: user_paths.Path = ""
    """GPT-2 merges (merges.txt), given together with vocab_file."""
    tokenizer: user_paths.Path = ""
    """Folder of a tokenizer to copy, in place of vocab_file and merge_file."""


def from_hf(options: FromHf) -> str:
    """Write the checkpoint and return a line about it.

    Raises:
        UserError: a file is missing or damaged, our network cannot express the model, or the
            output folder has checkpoints.
    """
    from gpt3jax.checkpoint import parameters  # after parsing: importing JAX takes seconds

    folder, output = pathlib.Path(options.folder), pathlib.Path(options.output).absolute()
    vocab = tokenizer_sources.vocabulary(folder) if tokenizer_files.find(folder) else {}
    special = tokenizer_files.special_ids(folder, vocab)
    tokenizer_eod = special.get("eos_token", vocab.get(tokenizer.END_OF_TEXT))
    model, eod_id = hf_gpt2.read_config(folder, tokenizer_eod)
    validation.check_model(model, schema.Data())
    weights = hf_gpt2.Weights(folder, model)
    store = parameters.new_store(str(output))
    data = schema.Data(**tokenizer_files.copy_folder(folder, output), eod_id=eod_id)
    parameters.write(store, parameters.untrained(model, data), weights.rows)
    files = "its tokenizer" if vocab else "no tokenizer.json, nor vocab.json and merges.txt there"
    return f"{output}: GPT-2 of {model.n_layers} x {model.d_model} x {model.n_heads}, {files}"


def to_hf(options: ToHf) -> str:
    """Write the folder and return a line about it.

    Raises:
        UserError: there is no checkpoint or it is damaged, GPT-2's config cannot express the model,
            the output folder is not empty, or weights are not finite.
    """
    from gpt3jax.checkpoint import parameters
    from gpt3jax.sharding import meshes

    output = pathlib.Path(options.output)
    source = parameters.open_newest(options.checkpoint, meshes.make_mesh(schema.Mesh()))
    model, data = source.cfg.model, source.cfg.data
    stored = parameters.find(options.checkpoint)[2].model  # with its dropout
    tensor_files.check_empty(output)
    hf_gpt2.check(model)
    if options.tokenizer or options.vocab_file or options.merge_file:
        files = hf_tokenizer.of_options(options.tokenizer, options.vocab_file, options.merge_file)
    else:
        files = hf_tokenizer.of_checkpoint(data, pathlib.Path(options.checkpoint))
    output.mkdir(parents=True, exist_ok=True)
    vocab = hf_tokenizer.write(files, output, model.seq_len, data.eod_id)
    writer = tensor_files.Writer(output)
    for name in hf_gpt2.TENSORS:
        for theirs, tensor in _gpt2_tensors(source, name):
            tensor_files.check_finite(options.checkpoint, theirs, tensor)
            writer.add(theirs, tensor.reshape(hf_gpt2.flat_shape(name, tensor.shape)))
    writer.close()
    special = tokenizer_files.special_ids(output, vocab)
    hf_gpt2.write_config(output, stored, data.eod_id, special)  # last: it completes the folder
    tokenizer_note = "with its tokenizer" if vocab else "without a tokenizer"
    return f"{output}: GPT2LMHeadModel of step {source.step}, {tokenizer_note}"


def _gpt2_tensors(source: "parameters.Trained", name: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the name and value of GPT-2's tensors for one of our parameters, layer by layer."""
    if not hf_gpt2.TENSORS[name].in_layer:
        array = source.whole(name)
        rows = source.cfg.model.softmax_size if name == hf_gpt2.EMBEDDING else len(array)
        yield hf_gpt2.tensor_name(name, 0), array[:rows]
        return
    for i, layer in enumerate(itertools.chain.from_iterable(source.blocks(name))):
        yield hf_gpt2.tensor_name(name, i), layer


def main() -> int:
    """Parse, convert, print what was written; return the exit status."""
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
        options = command_line.parse(commands, "convert", __doc__)
        import jax  # after parsing: importing it takes seconds

        jax.config.update("jax_platforms", "cpu")
        print(run[type(options)](options))

    return command_line.run(convert)


if __name__ == "__main__":
    sys.exit(main())
