"""`python -m gpt3jax.convert`: weights in and out.

    from-hf DIR --output CKPT            a Hugging Face GPT-2 folder becomes a checkpoint
    to-hf --checkpoint CKPT --output DIR the newest checkpoint becomes such a folder

Both ways are exact. It runs on the CPU, whatever the machine has. `to-hf` holds one parameter of
all layers at a time, at most a third of the model, and the file under way; `from-hf` holds the
whole state, 12 bytes a parameter.
"""

import dataclasses
import functools
import json
import operator
import pathlib
import shutil
import sys
from typing import Annotated, Any

import jax
import numpy as np
import tyro

from gpt3jax import checkpoint, config, sharding, step, trained, validation
from gpt3jax.convert import hf_gpt2
from gpt3jax.data import tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class FromHf:
    """A Hugging Face GPT-2 folder (config.json, safetensors, tokenizer) becomes a checkpoint."""

    folder: tyro.conf.Positional[str]
    """The folder, as transformers' save_pretrained writes it."""
    output: str
    """Folder for the checkpoint, and for a copy of vocab.json and merges.txt."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToHf:
    """The newest checkpoint of a folder becomes a Hugging Face GPT-2 folder."""

    checkpoint: str
    """Folder of checkpoints, as checkpoint.dir."""
    output: str
    """Folder to write; it must be new or empty."""
    vocab_file: str = ""
    """GPT-2 vocabulary (vocab.json) to put beside the weights; else the checkpoint's own."""
    merge_file: str = ""
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
    store = checkpoint.Checkpoints(str(output))
    if store.steps():
        raise config.UserError(f"--output={output} has checkpoints: give a new folder")
    files = _copy_tokenizer([folder / name for name in hf_gpt2.TOKENIZER_FILES], output)
    cfg = config.Config(
        model=model,
        optimizer=config.Optimizer(peak_lr=0.0),
        batch=config.Batch(global_batch_size=1),
        data=config.Data(vocab_file=files[0], merge_file=files[1], eod_id=eod_id),
        precision=config.Precision(compute_dtype="float32"),
    )
    program = step.build(cfg, sharding.make_mesh(config.Mesh()), run_samples=1)

    def read(path: Any, leaf: Any) -> jax.Array:
        name = trained.short_name(jax.tree_util.keystr(path, simple=True, separator="/"))
        return jax.device_put(weights.parameter(name, leaf.shape), leaf.sharding)

    params = jax.tree.map_with_path(read, program.abstract_state.params)
    meta = checkpoint.Meta(step=0, consumed_samples=0, data_order={}, config=config.flatten(cfg))
    store.save(program.adopt(params), meta)
    failure = store.poll(wait=True)
    store.close()
    if failure:
        raise config.UserError(failure)
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
    writer = hf_gpt2.Writer(output)
    for name in hf_gpt2.NAMES:
        params = source.params(functools.partial(operator.eq, name))
        array = next(leaf for leaf in jax.tree.leaves(params) if leaf is not ...)
        for theirs, tensor in hf_gpt2.tensors(name, np.asarray(array), model):
            writer.add(theirs, tensor)
    writer.close()
    hf_gpt2.write_config(output, stored, data.eod_id)  # last: it completes the folder
    told = "with its tokenizer" if copied[0] else "without a tokenizer"
    return f"{output}: GPT2LMHeadModel of step {source.step}, {told}"


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
    )
    options: Any = tyro.cli(commands, prog="python -m gpt3jax.convert", description=__doc__)
    jax.config.update("jax_platforms", "cpu")
    try:
        print(from_hf(options) if isinstance(options, FromHf) else to_hf(options))
    except config.UserError as error:
        print(f"gpt3jax: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
