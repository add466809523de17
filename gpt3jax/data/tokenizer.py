"""GPT-2's byte-level BPE, from its two files; and training one of the same kind."""

import json
import pathlib
from collections.abc import Iterable, Sequence

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from gpt3jax import config

END_OF_TEXT = "<|endoftext|>"
MIN_VOCAB_SIZE = 257  # a token for each byte, and the end of a document


class Tokenizer:
    """Text to token ids and back; `<|endoftext|>` inside a text becomes the one token.

    Attributes:
        vocab_size: number of tokens; their ids are 0 to vocab_size - 1.
        eod_id: the end-of-document token, `<|endoftext|>`.
    """

    def __init__(self, vocab_file: str, merge_file: str):
        """Read a GPT-2 vocabulary (`vocab.json`) and its merges (`merges.txt`).

        Raises:
            UserError: a file is missing or is not what it should be; it names the file.
        """
        vocab = _read_vocab(vocab_file)
        merges = _read_merges(merge_file)
        try:
            bpe = models.BPE(vocab=vocab, merges=merges)
        except Exception as error:  # the library raises bare Exception
            raise config.UserError(
                f"{merge_file} does not belong to {vocab_file}: {error}"
            ) from error
        self._tokenizer = _byte_level(bpe)
        self._tokenizer.add_special_tokens([END_OF_TEXT])
        self.vocab_size, self.eod_id = len(vocab), vocab[END_OF_TEXT]

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text; on all cores."""
        return [e.ids for e in self._tokenizer.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, `<|endoftext|>` included.

        Bytes that are not UTF-8, as in half a character, become U+FFFD.
        """
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text


def train(texts: Iterable[str], vocab_size: int, vocab_file: str, merge_file: str) -> None:
    """Train a byte-level BPE and write it as GPT-2's two files; `<|endoftext|>` gets id 0.

    The same texts give the same files. Little text may give fewer tokens than vocab_size.

    Raises:
        UserError: vocab_size is below MIN_VOCAB_SIZE.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise config.UserError(
            f"model.vocab_size={vocab_size} is too small for a byte-level BPE: it needs a token "
            f"for each of 256 bytes and {END_OF_TEXT}: use {MIN_VOCAB_SIZE} or more"
        )
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


def _read_vocab(path: str) -> dict[str, int]:
    try:
        vocab = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise config.UserError(f"{path} is not JSON, as GPT-2's vocab.json is: {error}") from error
    ids = list(vocab.values()) if isinstance(vocab, dict) else []
    if not ids or not all(type(i) is int for i in ids) or sorted(ids) != list(range(len(ids))):
        raise config.UserError(
            f"{path} is not a vocabulary: it must map every token to an id, from 0 on without gaps"
        )
    if END_OF_TEXT not in vocab:
        raise config.UserError(f"{path} has no {END_OF_TEXT}: add it as the last token")
    missing = set(pre_tokenizers.ByteLevel.alphabet()) - vocab.keys()
    if missing:
        raise config.UserError(
            f"{path} has no token for {len(missing)} of the 256 bytes, {sorted(missing)[0]!r} "
            "among them: it is not of a byte-level BPE, as GPT-2's is"
        )
    return vocab


def _read_merges(path: str) -> list[tuple[str, str]]:
    merges = []
    for number, line in enumerate(_read(path).split("\n"), 1):
        if line.startswith("#version") or not line:
            continue
        left, _, right = line.rstrip("\r").partition(" ")
        if not right or " " in right:
            raise config.UserError(
                f"{path}:{number}: {line!r} is not a merge: two tokens and a space between them"
            )
        merges.append((left, right))
    return merges


def _read(path: str) -> str:
    if not pathlib.Path(path).is_file():
        raise config.UserError(f"{path}: no such file (GPT-2's vocab.json and merges.txt)")
    try:
        return pathlib.Path(path).read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise config.UserError(f"{path}: {error}") from error


def _byte_level(bpe: models.BPE) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
