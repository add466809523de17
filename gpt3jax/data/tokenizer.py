"""GPT-2's byte-level BPE, from its two files; and training one of the same kind."""

import json
import pathlib
from collections.abc import Iterable, Sequence

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from gpt3jax import config

END_OF_TEXT = "<|endoftext|>"


class Tokenizer:
    """Text to token ids and back; `<|endoftext|>` inside a text becomes the one token."""

    def __init__(self, vocab_file: str, merge_file: str):
        """Read a GPT-2 vocabulary (`vocab.json`) and its merges (`merges.txt`).

        Raises:
            UserError: a file is missing or is not what it should be; it names the file.
        """
        for path in (vocab_file, merge_file):
            if not pathlib.Path(path).is_file():
                raise config.UserError(f"{path}: no such file (GPT-2's vocab.json and merges.txt)")
        try:
            bpe = models.BPE.from_file(vocab_file, merge_file)
        except Exception as error:  # the library raises bare Exception
            raise config.UserError(f"{vocab_file}, {merge_file}: not a BPE: {error}") from error
        self._tokenizer = _byte_level(bpe)
        self.vocab_size = self._tokenizer.get_vocab_size()
        eod_id = self._tokenizer.token_to_id(END_OF_TEXT)
        if eod_id is None:
            raise config.UserError(f"{vocab_file} has no {END_OF_TEXT}")
        self.eod_id: int = eod_id
        self._tokenizer.add_special_tokens([END_OF_TEXT])

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text."""
        return [e.ids for e in self._tokenizer.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, `<|endoftext|>` included."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text


def train(texts: Iterable[str], vocab_size: int, vocab_file: str, merge_file: str) -> None:
    """Train a byte-level BPE and write it as GPT-2's two files; `<|endoftext|>` gets id 0."""
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bpe = json.loads(tokenizer.to_str())["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in bpe["merges"]]
    _write(vocab_file, json.dumps(bpe["vocab"], ensure_ascii=False))
    _write(merge_file, "\n".join(["#version: 0.2", *merges, ""]))


def _write(path: str, text: str) -> None:
    partial = pathlib.Path(path + ".partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _byte_level(bpe: models.BPE) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
