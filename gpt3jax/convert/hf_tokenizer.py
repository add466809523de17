"""The tokenizer beside Hugging Face's weights: its files are copied unchanged."""

import json
import pathlib

from gpt3jax import errors
from gpt3jax.config import schema
from gpt3jax.data import tokenizer_files, tokenizer_sources


def of_options(folder: str, vocab_file: str, merge_file: str) -> dict[str, str]:
    """Return the fields of `config.Data` that name the tokenizer of the command's options.

    Raises:
        UserError: its files do not exist or cannot be read, or the options name two tokenizers.
    """
    if bool(vocab_file) != bool(merge_file) or bool(folder) == bool(vocab_file):
        raise errors.UserError(
            "give --vocab-file and --merge-file together, or --tokenizer",
            page="converting.md#hugging-face",
        )
    if vocab_file:
        tokenizer_sources.from_files(vocab_file, merge_file)
        return {"vocab_file": vocab_file, "merge_file": merge_file}
    files = tokenizer_files.find(pathlib.Path(folder))
    if not files:
        raise errors.UserError(
            f"--tokenizer={folder} has no tokenizer.json, nor vocab.json and merges.txt: give a "
            "folder with a tokenizer",
            page="converting.md#hugging-face",
        )
    return files


def of_checkpoint(data: schema.Data, checkpoint: pathlib.Path) -> dict[str, str]:
    """Return the fields that name a checkpoint's own tokenizer; none if its files do not exist."""
    data = tokenizer_files.moved(data, checkpoint)
    files = {"tokenizer": data.tokenizer}
    if data.vocab_file:
        files = {"vocab_file": data.vocab_file, "merge_file": data.merge_file}
    return files if all(pathlib.Path(file).is_file() for file in files.values()) else {}


def write(files: dict[str, str], folder: pathlib.Path, seq_len: int, eod_id: int) -> dict[str, int]:
    """Write a tokenizer under the file names that transformers looks for; return its vocabulary.

    `files` are fields of `config.Data`. If they are the tokenizer of their folder, the other files
    of that tokenizer are copied too.

    Raises:
        UserError: the tokenizer cannot be read, or its files disagree.
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
        config: dict[str, object] = {
            "tokenizer_class": "GPT2Tokenizer",
            "model_max_length": seq_len,
        }
        if "tokenizer" in files:
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
            ends = [token for token, number in vocab.items() if number == eod_id]
            config |= {"eos_token": ends[0]} if ends else {}
        (folder / tokenizer_files.CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return vocab
