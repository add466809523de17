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
import json
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import jax
import numpy as np
import tyro

from gpt3jax import command, config, paths, sharding, trained, validation
from gpt3jax.convert import hf_gpt2, megatron, tensor_files
from gpt3jax.data import tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class FromHf:
    """A Hugging Face GPT-2 folder (config.json, safetensors, tokenizer) becomes a checkpoint."""

    folder: tyro.conf.Positional[config.Path]
    """The folder, as transformers' save_pretrained writes it."""
    output: config.Path
    """Folder for the checkpoint, and for a copy of vocab.json and merges.txt."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToHf:
    """The newest checkpoint of a folder becomes a Hugging Face GPT-2 folder."""

    checkpoint: config.Path
    """Folder of checkpoints, as checkpoint.dir."""
    output: config.Path
    """Folder to write; it must be new or empty."""
    vocab_file: config.Path = ""
    """GPT-2 vocabulary (vocab.json) to put beside the weights; else the checkpoint's own."""
    merge_file: config.Path = ""
    """GPT-2 merges (merges.txt), with vocab_file."""


def from_hf(options: FromHf) -> str:
    """Write the checkpoint and return a line about it.

    Raises:
        UserError: a file that is missing or damaged, a model that ours cannot be, or an output
            that has checkpoints.
    """
    folder, output = pathlib.Path(options.folder), pathlib.Path(options.output).absolute()
    model, eod_id = hf_gpt2.read_config(folder)
    validation.check_model(model, config.Data())
    weights = hf_gpt2.Weights(folder, model)
    store = trained.new_store(str(output))
    files = _copy_tokenizer([folder / name for name in hf_gpt2.TOKENIZER_FILES], output)
    data = config.Data(vocab_file=files[0], merge_file=files[1], eod_id=eod_id)
    trained.write(store, trained.untrained(model, data), weights.rows)
    told = "its tokenizer" if files[0] else "no vocab.json and merges.txt there"
    return f"{output}: GPT-2 of {model.n_layers} x {model.d_model} x {model.n_heads}, {told}"


def to_hf(options: ToHf) -> str:
    """Write the folder and return a line about it.

    Raises:
        UserError: no checkpoint, a damaged one, a model that GPT-2's config cannot express, or an
            output that is not empty.
    """
    output = pathlib.Path(options.output)
    source = trained.open_newest(options.checkpoint, sharding.make_mesh(config.Mesh()))
    model, data = source.cfg.model, source.cfg.data
    stored = trained.find(options.checkpoint)[2].model  # with its dropout
    if output.is_dir() and any(output.iterdir()):
        raise config.UserError(f"--output={output} is not empty: give a new folder")
    if bool(options.vocab_file) != bool(options.merge_file):
        raise config.UserError("--vocab-file and --merge-file go together: give both or neither")
    hf_gpt2.check(model)
    output.mkdir(parents=True, exist_ok=True)
    files = (options.vocab_file, options.merge_file)
    files = files if any(files) else (data.vocab_file, data.merge_file)
    copied = _copy_tokenizer([pathlib.Path(file) for file in files], output)
    if copied[0]:
        kind = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": model.seq_len}
        (output / "tokenizer_config.json").write_text(json.dumps(kind, indent=2) + "\n")
    writer = tensor_files.Writer(output)
    for name in hf_gpt2.NAMES:
        for theirs, tensor in _gpt2_tensors(source, name):
            writer.add(theirs, tensor.reshape(hf_gpt2.flat_shape(theirs, tensor.shape)))
    writer.close()
    hf_gpt2.write_config(output, stored, data.eod_id)  # last: it completes the folder
    told = "with its tokenizer" if copied[0] else "without a tokenizer"
    return f"{output}: GPT2LMHeadModel of step {source.step}, {told}"


def _gpt2_tensors(source: trained.Trained, name: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yield GPT-2's tensors of one of our parameters, which is read layer by layer."""
    if not name.startswith("blocks/"):
        array = source.whole(name)
        rows = source.cfg.model.softmax_size if name == "embedding_VD" else len(array)
        yield hf_gpt2.tensor_name(name, 0), array[:rows]
        return
    for i, layer in enumerate(itertools.chain.from_iterable(source.blocks(name))):
        yield hf_gpt2.tensor_name(name, i), layer


def _copy_tokenizer(files: list[pathlib.Path], folder: pathlib.Path) -> tuple[str, str]:
    """Copy GPT-2's two files, if they are there; return the copies' paths, or empty ones."""
    if not all(file.is_file() for file in files):
        return "", ""
    tokenizer.from_files(*map(str, files))
    copies = [folder / name for name in hf_gpt2.TOKENIZER_FILES]
    for file, copy in zip(files, copies, strict=True):
        shutil.copyfile(file, copy)
    return str(copies[0]), str(copies[1])


def main() -> int:
    """Parse, convert, tell what was written; return the exit status."""
    commands = (
        Annotated[FromHf, tyro.conf.subcommand("from-hf")]
        | Annotated[ToHf, tyro.conf.subcommand("to-hf")]
        | Annotated[megatron.FromMegatron, tyro.conf.subcommand("from-megatron")]
        | Annotated[megatron.ToMegatron, tyro.conf.subcommand("to-megatron")]
    )
    options: Any = tyro.cli(commands, prog="python -m gpt3jax.convert", description=__doc__)
    jax.config.update("jax_platforms", "cpu")
    run: dict[type, Callable[[Any], str]] = {
        FromHf: from_hf,
        ToHf: to_hf,
        megatron.FromMegatron: megatron.from_megatron,
        megatron.ToMegatron: megatron.to_megatron,
    }
    return command.run(lambda: print(run[type(options)](paths.expanded(options, "--"))))


if __name__ == "__main__":
    sys.exit(main())
