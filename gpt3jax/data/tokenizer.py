"""GPT-2's byte-level BPE, from its two files; other tokenizers; and training one of its kind."""

import dataclasses
import hashlib
import importlib.util
import itertools
import json
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from gpt3jax import config

END_OF_TEXT = "<|endoftext|>"
# How GPT-2 cuts text before merging, as tiktoken writes it; and its vocabulary and merges.
_GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
_LONE_BLANK = re.compile(r"(?<=\S)[ \n](?=\S)")
_CUT_WINDOW = 4096  # characters
_HALF_CHARACTER = 3  # bytes at most, each of which may be decoded as a U+FFFD
_GPT2_DIGEST = "9e52e2d09323136cf31fca11e3a80463fe013e9ccfa1c04ac36c8bb825af904d"
MIN_VOCAB_SIZE = 257  # a token for each byte, and the end of a document


class Tokenizer:
    """Text to token ids and back; the end-of-document token inside a text becomes the one token.

    Attributes:
        vocab_size: number of tokens; their ids are below it.
        eod_id: the end-of-document token.
        splits_at_blanks: its pre-tokenizer is GPT-2's, so that a text may be cut by `last_cut`.
    """

    def __init__(self, rust: tokenizers.Tokenizer, eod_token: str, splits_at_blanks: bool):
        """Use a tokenizer of the library; see `from_files` and `from_pretrained`.

        Raises:
            UserError: it has no such end-of-document token.
        """
        vocab = rust.get_vocab()
        if eod_token not in vocab:
            raise config.UserError(
                f"the tokenizer has no token {eod_token!r} for the end of a document: name the one "
                "it has with --eod-token"
            )
        self._rust = rust
        self._fast: Any = None  # tiktoken, where it serves
        self.vocab_size, self.eod_id = max(vocab.values()) + 1, vocab[eod_token]
        self.splits_at_blanks = splits_at_blanks

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        ids: list[int] = self._rust.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the token ids of each text, `[n]` each; other threads may run meanwhile."""
        if self._fast is not None:
            return [self._fast.encode_to_numpy(text, allowed_special="all") for text in texts]
        encodings = self._rust.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(e.ids, np.uint32) for e in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, the end-of-document token included.

        Bytes that are not UTF-8, as in half a character, become U+FFFD.
        """
        text: str = self._rust.decode(list(ids), skip_special_tokens=False)
        return text

    def use_tiktoken(self, vocab: dict[str, int]) -> bool:
        """Encode batches by tiktoken, 5 times as fast, if it is installed; return whether it is.

        For GPT-2's own vocabulary, where the two agree on every text.
        """
        if importlib.util.find_spec("tiktoken") is None:
            return False
        import tiktoken  # in the extra `data`

        byte_of = {char: byte for byte, char in enumerate(_byte_alphabet())}
        ranks = {bytes(byte_of[c] for c in t): i for t, i in vocab.items() if t != END_OF_TEXT}
        self._fast = tiktoken.Encoding(
            "gpt2-files",
            pat_str=_GPT2_PATTERN,
            mergeable_ranks=ranks,
            special_tokens={END_OF_TEXT: vocab[END_OF_TEXT]},
        )
        return True


class TextStream:
    """Text from token ids that come one after another: what may still change is held back."""

    def __init__(self, tokenizer: Tokenizer):
        """Begin with no text."""
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # what was told last, which may decide how to go on, and the rest
        self._n_context = 0
        self._told = ""  # of their text

    def add(self, ids: Sequence[int]) -> str:
        """Return the text that these ids complete; bytes of half a character wait for the rest."""
        if not ids:
            return ""
        self._ids += ids
        text = self._tokenizer.decode(self._ids)
        whole = text.rstrip("\ufffd")
        if len(text) - len(whole) > _HALF_CHARACTER:  # it is no character at all
            whole = text
        new, self._told = whole[len(self._told) :], whole
        if whole == text:
            self._ids = self._ids[self._n_context :]
            self._n_context = len(self._ids)
            self._told = self._tokenizer.decode(self._ids)
        return new

    def end(self) -> str:
        """Return what was held back."""
        return self._tokenizer.decode(self._ids)[len(self._told) :]


def from_files(vocab_file: str, merge_file: str) -> Tokenizer:
    """Read a GPT-2 vocabulary (`vocab.json`) and its merges (`merges.txt`).

    Raises:
        UserError: a file is missing or is not what it should be; it names the file.
    """
    vocab = _read_vocab(vocab_file)
    merges = _read_merges(merge_file)
    try:
        bpe = models.BPE(vocab=vocab, merges=merges)
    except Exception as error:  # the library raises bare Exception
        raise config.UserError(f"{merge_file} does not belong to {vocab_file}: {error}") from error
    rust = _byte_level(bpe)
    rust.add_special_tokens([END_OF_TEXT])
    tokenizer = Tokenizer(rust, END_OF_TEXT, splits_at_blanks=True)
    if _digest(vocab, merges) == _GPT2_DIGEST:
        tokenizer.use_tiktoken(vocab)
    return tokenizer


def from_pretrained(source: str, eod_token: str = END_OF_TEXT) -> Tokenizer:
    """Read a `tokenizer.json`, a folder with one or with GPT-2's two files, or ask the HF hub.

    Args:
        source: a file, a folder, or a name on the hub (which needs a network).
        eod_token: the text of the end-of-document token.

    Raises:
        UserError: there is no tokenizer there, or it cannot be read.
    """
    path = pathlib.Path(source)
    if path.is_dir() and not (path / "tokenizer.json").is_file():
        return from_files(str(path / "vocab.json"), str(path / "merges.txt"))
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        if file.is_file():
            rust = tokenizers.Tokenizer.from_file(str(file))
        else:
            rust = tokenizers.Tokenizer.from_pretrained(source)
    except Exception as error:  # as above
        told = str(error).strip().splitlines()[:1]
        raise config.UserError(
            f"--tokenizer={source}: {''.join(told)}: give a tokenizer.json, a folder with one, or "
            "a name on the Hugging Face hub, which needs a network"
        ) from error
    return Tokenizer(rust, eod_token, splits_at_blanks=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Where the command line's tokenizer comes from."""

    vocab_file: config.Path = ""
    """GPT-2 vocabulary (vocab.json), with merge_file."""
    merge_file: config.Path = ""
    """GPT-2 merges (merges.txt)."""
    tokenizer: config.Path = ""
    """In place of these two: a tokenizer.json, a folder with one, or a name on the HF hub."""
    eod_token: str = END_OF_TEXT
    """The end-of-document token of `tokenizer`."""

    def open(self) -> Tokenizer:
        """Read it.

        Raises:
            UserError: neither or both are given, or they cannot be read.
        """
        files = (self.vocab_file, self.merge_file)
        if any(files) == bool(self.tokenizer) or any(files) != all(files):
            raise config.UserError("give --vocab-file and --merge-file together, or --tokenizer")
        if self.tokenizer:
            return from_pretrained(self.tokenizer, self.eod_token)
        return from_files(*files)


def last_cut(text: str) -> int:
    """Return the last place where GPT-2's pre-tokenizer splits any text like this; 0 for none.

    Both parts, encoded apart, give the tokens of the whole. It is before a lone space, or behind a
    lone newline, between two characters that are not blank.
    """
    for high in range(len(text), 0, -_CUT_WINDOW):
        found = list(_LONE_BLANK.finditer(text, max(0, high - _CUT_WINDOW), high + 1))
        if found:
            return found[-1].start() + (found[-1].group() == "\n")
    return 0


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


def _digest(vocab: dict[str, int], merges: list[tuple[str, str]]) -> str:
    lines = [*sorted(vocab, key=vocab.__getitem__), *map(" ".join, merges)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _byte_alphabet() -> list[str]:
    """Return the character that stands for each byte in GPT-2's vocabulary."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (0x100 + i for i in itertools.count())
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


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
