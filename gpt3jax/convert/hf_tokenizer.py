"""The tokenizer beside Hugging Face's weights: its files are carried as they are."""

import json
import pathlib
from typing import Any

from gpt3jax import errors
from gpt3jax.config import schema
from gpt3jax.data import tokenizer_files, tokenizer_sources


def asked_for(folder: str, vocab_file: str, merge_file: str) -> dict[str, str]:
    """Return the fields of `config.Data` that name the tokenizer of a command's options.

    Raises:
        UserError: they are not there, cannot be read, or name two tokenizers.
    """
    if bool(vocab_file) != bool(merge_file) or bool(folder) == bool(vocab_file):
        raise errors.UserError("give --vocab-file and --merge-file together, or --tokenizer")
    if vocab_file:
        tokenizer_sources.from_files(vocab_file, merge_file)
        return {"vocab_file": vocab_file, "merge_file": merge_file}
    found = tokenizer_files.find(pathlib.Path(folder))
    if not found:
        raise errors.UserError(
            f"--tokenizer={folder} has no tokenizer.json, nor vocab.json and merges.txt: give a "
            "folder with a tokenizer"
        )
    return found


def named(data: schema.Data, checkpoint: pathlib.Path) -> dict[str, str]:
    """Return the fields that name a checkpoint's own tokenizer; none if its files are not there."""
    data = tokenizer_files.moved(data, checkpoint)
    files = {"tokenizer": data.tokenizer}
    if data.vocab_file:
        files = {"vocab_file": data.vocab_file, "merge_file": data.merge_file}
    return files if all(pathlib.Path(file).is_file() for file in files.values()) else {}


def write(files: dict[str, str], folder: pathlib.Path, seq_len: int, eod_id: int) -> dict[str, int]:
    """Write the tokenizer that fields name, under the names that transformers looks for.

    Where these are all of a folder's tokenizer, its other files go along.

    Returns:
        Its tokens and their ids; none without a tokenizer.

    Raises:
        UserError: it cannot be read, or files of the folder disagree.
    """
    if not files:
        return {}
    beside = pathlib.Path(next(iter(files.values()))).parent
    if tokenizer_files.find(beside) == {field: str(pathlib.Path(f)) for field, f in files.items()}:
        tokenizer_sources.vocabulary(beside)  # checks, before anything is written
        tokenizer_files.copy_folder(beside, folder)
    else:
        tokenizer_files.copy_files(files, folder)
    vocab = tokenizer_sources.vocabulary(folder)
    if not (folder / tokenizer_files.CONFIG).is_file():
        kind: dict[str, Any] = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": seq_len}
        if "tokenizer" in files:
            kind["tokenizer_class"] = "PreTrainedTokenizerFast"
            ends = [token for token, number in vocab.items() if number == eod_id]
            kind |= {"eos_token": ends[0]} if ends else {}
        (folder / tokenizer_files.CONFIG).write_text(json.dumps(kind, indent=2) + "\n")
    return vocab
