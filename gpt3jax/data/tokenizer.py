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

from gpt3jax import errors
from gpt3jax.config import schema, user_paths
from gpt3jax.data import tokenizer_files

END_OF_TEXT = "<|endoftext|>"
# How GPT-2 cuts text before merging, as tiktoken writes it; and its vocabulary and merges.
_GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
_LONE_BLANK = re.compile(r"(?<=\S)[ \n](?=\S)")
_CUT_WINDOW = 4096  # characters
_HALF_CHARACTER = 3  # bytes at most, each of which may be decoded as a U+FFFD
_CONTEXT = 32  # tokens before a stream at most that decide how its first ones are decoded
_GPT2_DIGEST = "9e52e2d09323136cf31fca11e3a80463fe013e9ccfa1c04ac36c8bb825af904d"
MIN_VOCAB_SIZE = 257  # a token for each byte, and the end of a document


class Tokenizer:
    """Text to token ids and back; the end-of-document token inside a text becomes the one token.

    The ids are a function of the whole text alone: none are cut off, and none added.

    Attributes:
        vocab_size: number of tokens; their ids are below it.
        eod_id: the end-of-document token.
        splits_at_blanks: its pre-tokenizer is GPT-2's, so that a text may be cut by `last_cut`.
    """

    def __init__(self, rust: tokenizers.Tokenizer, eod: str | int, splits_at_blanks: bool):
        """Use a tokenizer of the library; see `from_files` and `from_pretrained`.

        Args:
            rust: the tokenizer; what would cut, pad or vary its tokens is switched off.
            eod: the end-of-document token, as text or as id.
            splits_at_blanks: see the class.

        Raises:
            UserError: it has no such end-of-document token.
        """
        vocab = rust.get_vocab()
        eod_id = vocab.get(eod, -1) if isinstance(eod, str) else eod
        if eod_id not in vocab.values():
            raise errors.UserError(
                f"the tokenizer has no token {eod!r} for the end of a document: name the one "
                "it has with --eod-token (for training, its id with data.eod_id)"
            )
        rust.no_truncation()
        rust.no_padding()
        if isinstance(rust.model, models.BPE):
            rust.model.dropout = None  # of merges, at random
        self._rust = rust
        self._fast: Any = None  # tiktoken, where it serves
        self.vocab_size, self.eod_id = max(vocab.values()) + 1, eod_id
        self.splits_at_blanks = splits_at_blanks

    @property
    def vocab(self) -> dict[str, int]:
        """All tokens and their ids."""
        found: dict[str, int] = self._rust.get_vocab()
        return found

    @property
    def drops_characters(self) -> bool:
        """Whether characters that it does not know have no token at all."""
        bpe = self._rust.model
        if not isinstance(bpe, models.BPE) or bpe.unk_token is not None:
            return False  # other models have a token for them, or refuse them
        has_bytes = set(pre_tokenizers.ByteLevel.alphabet()) <= self.vocab.keys()
        return not (bpe.byte_fallback or has_bytes)

    @property
    def added(self) -> dict[int, str]:
        """The tokens that are found in a text before any merges, as that of a document's end."""
        return {i: t.content for i, t in self._rust.get_added_tokens_decoder().items()}

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text.

        Raises:
            UserError: it has bytes that are not UTF-8, or half a surrogate pair.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise errors.UserError(
                f"the text {text[:40]!r} is not UTF-8 at character {error.start}: mend it"
            ) from None
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

    def token_text(self, token: int) -> str:
        """Return the text of a token as it is inside of a text: with the space before a word."""
        return self.decode([self.eod_id, token]).removeprefix(self.decode([self.eod_id]))

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
    """Text from token ids that come one after another: what may still change is held back.

    A token's text may depend on those before it: SentencePiece's decoders drop the space of the
    first one. So each is decoded behind the last that were told.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()):
        """Begin behind the ids `before`, whose text is told already but for half a character."""
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._context_text = ""
        self._held: list[int] = []  # what follows the context, and is not told to its end
        self._n_told = 0  # characters of its text
        self.add(_last_text(tokenizer, before))

    def add(self, ids: Sequence[int]) -> str:
        """Return the text that these ids complete; bytes of half a character wait for the rest."""
        return "".join([self._add(token) for token in ids])

    def end(self) -> str:
        """Return what was held back."""
        return self._held_text()[self._n_told :]

    def _add(self, token: int) -> str:
        self._held.append(token)
        text = self._held_text()
        n_half = len(text) - len(text.rstrip("\ufffd"))
        if n_half > _HALF_CHARACTER:  # it is no character at all
            n_half = 0
        whole = text[: len(text) - n_half]
        new, self._n_told = whole[self._n_told :], len(whole)
        if not n_half:
            text = self._tokenizer.decode(self._held)
            # Ids without a text of their own hide nothing, so what is before them stays.
            self._context = self._held if text else self._context + self._held
            self._context_text = self._tokenizer.decode(self._context)
            self._held, self._n_told = [], 0
        return new

    def _held_text(self) -> str:
        text = self._tokenizer.decode(self._context + self._held)
        if text.startswith(self._context_text):
            return text[len(self._context_text) :]
        # ByteFallback decodes bytes in a row together: half a character spoils those before it.
        return self._tokenizer.decode(self._held)


def _last_text(tokenizer: Tokenizer, ids: Sequence[int]) -> Sequence[int]:
    """Return the fewest of the last ids whose text begins with a whole character."""
    for n in range(1, min(len(ids), _CONTEXT) + 1):
        if tokenizer.decode(ids[-n:])[:1] not in ("", "\ufffd"):
            return ids[-n:]
    return ids[-_CONTEXT:]


def from_files(vocab_file: str, merge_file: str) -> Tokenizer:
    """Read a GPT-2 vocabulary (`vocab.json`) and its merges (`merges.txt`).

    Raises:
        UserError: a file is missing or is not what it should be; it names the file.
    """
    vocab = _read_vocab(vocab_file)
    merges = tokenizer_files.read_merges(merge_file)
    try:
        bpe = models.BPE(vocab=vocab, merges=merges)
    except Exception as error:  # the library raises bare Exception
        raise errors.UserError(f"{merge_file} does not belong to {vocab_file}: {error}") from error
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
        UserError: there is no tokenizer there, it cannot be read, or files of the folder disagree.
    """
    folder = pathlib.Path(source)
    if not folder.is_dir():
        return Tokenizer(_load(source), eod_token, splits_at_blanks=False)
    file = folder / tokenizer_files.TOKENIZER
    if file.is_file():
        found = Tokenizer(_load(str(file)), eod_token, splits_at_blanks=False)
    else:
        found = _gpt2(*tokenizer_files.pair(folder), eod_token)
    tokenizer_files.check(folder, found.vocab)
    return found


def vocabulary(folder: pathlib.Path) -> dict[str, int]:
    """Return all tokens of the tokenizer in a folder, added ones included, and their ids.

    Raises:
        UserError: there is none, it cannot be read, or files of the folder disagree.
    """
    file = folder / tokenizer_files.TOKENIZER
    if file.is_file():
        vocab: dict[str, int] = _load(str(file)).get_vocab()
    else:
        vocab = from_files(*tokenizer_files.pair(folder)).vocab
    tokenizer_files.check(folder, vocab)
    return vocab


def of_config(data: schema.Data, eod_token: str = END_OF_TEXT) -> Tokenizer:
    """Read the tokenizer that a config names.

    Of `data.tokenizer`, data.eod_id ends a document, unless it has no such token or eod_token names
    another.

    Raises:
        UserError: it cannot be read, or has no such token.
    """
    if not data.tokenizer:
        return _gpt2(data.vocab_file, data.merge_file, eod_token)
    if not pathlib.Path(data.tokenizer).is_file():
        raise errors.UserError(f"data.tokenizer={data.tokenizer}: no such file (a tokenizer.json)")
    rust = _load(data.tokenizer)
    by_id = eod_token == END_OF_TEXT and rust.id_to_token(data.eod_id) is not None
    return Tokenizer(rust, data.eod_id if by_id else eod_token, splits_at_blanks=False)


def _gpt2(vocab_file: str, merge_file: str, eod_token: str) -> Tokenizer:
    """Read GPT-2's two files; refuse another end of a document, which would have no effect."""
    found = from_files(vocab_file, merge_file)
    if eod_token != END_OF_TEXT:
        raise errors.UserError(
            f"{eod_token!r} cannot be the end-of-document token of {vocab_file}, which has "
            f"{END_OF_TEXT} ({found.eod_id}) for it: leave --eod-token out"
        )
    return found


def _load(source: str) -> tokenizers.Tokenizer:
    try:
        if pathlib.Path(source).is_file():
            return tokenizers.Tokenizer.from_file(source)
        return tokenizers.Tokenizer.from_pretrained(source)
    except Exception as error:  # as above
        told = str(error).strip().split("\n")[0]
        raise errors.UserError(
            f"--tokenizer={source}: {told}: give a tokenizer.json, a folder with one, or "
            "a name on the Hugging Face hub, which needs a network"
        ) from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Where the command line's tokenizer comes from."""

    vocab_file: user_paths.Path = ""
    """GPT-2 vocabulary (vocab.json), with merge_file."""
    merge_file: user_paths.Path = ""
    """GPT-2 merges (merges.txt)."""
    tokenizer: user_paths.Path = ""
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
            raise errors.UserError("give --vocab-file and --merge-file together, or --tokenizer")
        if self.tokenizer:
            return from_pretrained(self.tokenizer, self.eod_token)
        return _gpt2(*files, self.eod_token)


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
        raise errors.UserError(
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
        vocab = json.loads(tokenizer_files.read_text(path))
    except json.JSONDecodeError as error:
        raise errors.UserError(f"{path} is not JSON, as GPT-2's vocab.json is: {error}") from error
    ids = list(vocab.values()) if isinstance(vocab, dict) else []
    if not ids or not all(type(i) is int for i in ids) or sorted(ids) != list(range(len(ids))):
        raise errors.UserError(
            f"{path} is not a vocabulary: it must map every token to an id, from 0 on without gaps"
        )
    if END_OF_TEXT not in vocab:
        raise errors.UserError(f"{path} has no {END_OF_TEXT}: add it as the last token")
    missing = set(pre_tokenizers.ByteLevel.alphabet()) - vocab.keys()
    if missing:
        raise errors.UserError(
            f"{path} has no token for {len(missing)} of the 256 bytes, {sorted(missing)[0]!r} "
            "among them: it is not of a byte-level BPE, as GPT-2's is"
        )
    return vocab


def _digest(vocab: dict[str, int], merges: list[tuple[str, str]]) -> str:
    lines = [*sorted(vocab, key=vocab.__getitem__), *map(" ".join, merges)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _byte_alphabet() -> list[str]:
    """Return the character that stands for each byte in GPT-2's vocabulary."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (0x100 + i for i in itertools.count())
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _byte_level(bpe: models.BPE) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
