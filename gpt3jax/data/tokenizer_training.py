"""Training a byte-level BPE, which is written as GPT-2's two files."""

import json
import pathlib
from collections.abc import Iterable

from tokenizers import models, pre_tokenizers, trainers

from gpt3jax import errors
from gpt3jax.data import tokenizer

MIN_VOCAB_SIZE = 257  # a token for each byte, and the end of a document


def train(texts: Iterable[str], vocab_size: int, vocab_file: str, merge_file: str) -> None:
    """Train a byte-level BPE and write it as GPT-2's two files; `<|endoftext|>` gets id 0.

    The same texts give the same files. Little text may give fewer tokens than vocab_size.

    Raises:
        UserError: vocab_size is below MIN_VOCAB_SIZE.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise errors.UserError(
            f"model.vocab_size={vocab_size} is too small for a byte-level BPE: it needs a token "
            f"for each of 256 bytes and {tokenizer.END_OF_TEXT}: use {MIN_VOCAB_SIZE} or more",
            page="data.md#which-corpora-a-run-reads",
        )
    backend = tokenizer.byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[tokenizer.END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    bpe = json.loads(backend.to_str())["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in bpe["merges"]]
    files = {
        merge_file: "\n".join(["#version: 0.2", *merges, ""]),
        vocab_file: json.dumps(bpe["vocab"], ensure_ascii=False),  # last: it completes the pair
    }
    for path, text in files.items():
        partial = pathlib.Path(path + ".partial")
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
    for path in files:
        pathlib.Path(path + ".partial").replace(path)


def exists(vocab_file: str, merge_file: str) -> bool:
    """Return whether either file exists; not if `train` was interrupted between the two."""
    if pathlib.Path(vocab_file + ".partial").is_file():
        return pathlib.Path(vocab_file).is_file()
    return pathlib.Path(vocab_file).is_file() or pathlib.Path(merge_file).is_file()
