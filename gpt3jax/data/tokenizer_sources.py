"""Reading a tokenizer: GPT-2's two files, a `tokenizer.json`, a folder, or the HF hub."""

import dataclasses
import hashlib
import json
import pathlib

import tokenizers
from tokenizers import models, pre_tokenizers

from gpt3jax import errors
from gpt3jax.config import schema, user_paths
from gpt3jax.data import tokenizer, tokenizer_files

_PAGE = "data.md#when-data-is-refused"

# Source has a field named `tokenizer`.
END_OF_TEXT = tokenizer.END_OF_TEXT
Tokenizer = tokenizer.Tokenizer
# Of GPT-2's own vocabulary and merges.
_GPT2_DIGEST = "9e52e2d09323136cf31fca11e3a80463fe013e9ccfa1c04ac36c8bb825af904d"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """The tokenizer: give --vocab-file and --merge-file, or --tokenizer."""

    vocab_file: user_paths.Path = ""
    """GPT-2 vocabulary (vocab.json)."""
    merge_file: user_paths.Path = ""
    """GPT-2 merges (merges.txt)."""
    tokenizer: user_paths.Path = ""
    """A tokenizer.json, a folder with one, or a name on the Hugging Face hub."""
    eod_token: str = END_OF_TEXT
    """The end-of-document token of --tokenizer."""

    def open(self) -> Tokenizer:
        """Read the tokenizer.

        Raises:
            UserError: none or both are given, or they cannot be read.
        """
        files = (self.vocab_file, self.merge_file)
        if any(files) == bool(self.tokenizer) or any(files) != all(files):
            raise errors.UserError(
                "give --vocab-file and --merge-file together, or --tokenizer", page=_PAGE
            )
        if self.tokenizer:
            return from_pretrained(self.tokenizer, self.eod_token)
        return _gpt2(*files, self.eod_token)


def of_config(data: schema.Data, eod_token: str = tokenizer.END_OF_TEXT) -> tokenizer.Tokenizer:
    """Read the tokenizer that a config names.

    With `data.tokenizer`, `data.eod_id` ends a document, unless the tokenizer has no such token or
    eod_token names another.

    Raises:
        UserError: it cannot be read, or has no such token.
    """
    if not data.tokenizer:
        return _gpt2(data.vocab_file, data.merge_file, eod_token)
    if not pathlib.Path(data.tokenizer).is_file():
        raise errors.UserError(
            f"data.tokenizer={data.tokenizer}: no such file (a tokenizer.json)", page=_PAGE
        )
    backend = _load(data.tokenizer)
    by_id = eod_token == tokenizer.END_OF_TEXT and backend.id_to_token(data.eod_id) is not None
    return tokenizer.Tokenizer(backend, data.eod_id if by_id else eod_token, splits_at_blanks=False)


def from_pretrained(source: str, eod_token: str = tokenizer.END_OF_TEXT) -> tokenizer.Tokenizer:
    """Read a `tokenizer.json`, a folder with it or with GPT-2's two files, or a name on the HF hub.

    Args:
        source: a file, a folder, or a name on the hub (which needs a network).
        eod_token: the text of the end-of-document token.

    Raises:
        UserError: there is no tokenizer there, it cannot be read, or files of the folder disagree.
    """
    folder = pathlib.Path(source)
    if not folder.is_dir():
        return tokenizer.Tokenizer(_load(source), eod_token, splits_at_blanks=False)
    file = folder / tokenizer_files.TOKENIZER
    if file.is_file():
        chosen = tokenizer.Tokenizer(_load(str(file)), eod_token, splits_at_blanks=False)
    else:
        chosen = _gpt2(*tokenizer_files.pair(folder), eod_token)
    tokenizer_files.check(folder, chosen.vocab)
    return chosen


def from_files(vocab_file: str, merge_file: str) -> tokenizer.Tokenizer:
    """Read a GPT-2 vocabulary (`vocab.json`) and its merges (`merges.txt`).

    Raises:
        UserError: a file is missing or has other content; the message names the file.
    """
    vocab = _read_vocab(vocab_file)
    merges = tokenizer_files.read_merges(merge_file)
    try:
        bpe = models.BPE(vocab=vocab, merges=merges)
    except Exception as error:  # the library raises bare Exception
        raise errors.UserError(
            f"{merge_file} does not belong to {vocab_file}: {error}", page=_PAGE
        ) from error
    backend = tokenizer.byte_level(bpe)
    backend.add_special_tokens([tokenizer.END_OF_TEXT])
    gpt2 = tokenizer.Tokenizer(backend, tokenizer.END_OF_TEXT, splits_at_blanks=True)
    if _digest(vocab, merges) == _GPT2_DIGEST:
        gpt2.use_tiktoken(vocab)
    return gpt2


def vocabulary(folder: pathlib.Path) -> dict[str, int]:
    """Return all tokens of the tokenizer in a folder, added ones included, and their ids.

    Raises:
        UserError: there is no tokenizer, it cannot be read, or files of the folder disagree.
    """
    file = folder / tokenizer_files.TOKENIZER
    if file.is_file():
        vocab: dict[str, int] = _load(str(file)).get_vocab()
    else:
        vocab = from_files(*tokenizer_files.pair(folder)).vocab
    tokenizer_files.check(folder, vocab)
    return vocab


def _gpt2(vocab_file: str, merge_file: str, eod_token: str) -> tokenizer.Tokenizer:
    """Read GPT-2's two files; refuse another end-of-document token, which would have no effect."""
    gpt2 = from_files(vocab_file, merge_file)
    if eod_token != tokenizer.END_OF_TEXT:
        raise errors.UserError(
            f"{eod_token!r} cannot be the end-of-document token of {vocab_file}, which has "
            f"{tokenizer.END_OF_TEXT} ({gpt2.eod_id}) for it: leave --eod-token out",
            page=_PAGE,
        )
    return gpt2


def _load(source: str) -> tokenizers.Tokenizer:
    try:
        if pathlib.Path(source).is_file():
            return tokenizers.Tokenizer.from_file(source)
        return tokenizers.Tokenizer.from_pretrained(source)
    except Exception as error:  # as above
        reason = str(error).strip().split("\n")[0]
        raise errors.UserError(
            f"--tokenizer={source}: {reason}: give a tokenizer.json, a folder with one, or "
            "a name on the Hugging Face hub, which needs a network",
            page=_PAGE,
        ) from error


def _read_vocab(path: str) -> dict[str, int]:
    try:
        vocab = json.loads(tokenizer_files.read_text(path))
    except json.JSONDecodeError as error:
        raise errors.UserError(
            f"{path} is not JSON, as GPT-2's vocab.json is: {error}", page=_PAGE
        ) from error
    ids = list(vocab.values()) if isinstance(vocab, dict) else []
    if not ids or not all(type(i) is int for i in ids) or sorted(ids) != list(range(len(ids))):
        raise errors.UserError(
            f"{path} is not a vocabulary: it must map every token to an id, from 0 on without gaps",
            page=_PAGE,
        )
    if tokenizer.END_OF_TEXT not in vocab:
        raise errors.UserError(
            f"{path} has no {tokenizer.END_OF_TEXT}: add it as the last token", page=_PAGE
        )
    missing = set(pre_tokenizers.ByteLevel.alphabet()) - vocab.keys()
    if missing:
        raise errors.UserError(
            f"{path} has no token for {len(missing)} of the 256 bytes, {sorted(missing)[0]!r} "
            "among them: it is not the vocabulary of a byte-level BPE, as GPT-2's is",
            page=_PAGE,
        )
    return vocab


def _digest(vocab: dict[str, int], merges: list[tuple[str, str]]) -> str:
    lines = [*sorted(vocab, key=vocab.__getitem__), *map(" ".join, merges)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
