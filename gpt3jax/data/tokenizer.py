"""A tokenizer: text to token ids and back, all at once or as the ids arrive."""

import importlib.util
import itertools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from gpt3jax import errors

if TYPE_CHECKING:
    import tiktoken

END_OF_TEXT = "<|endoftext|>"
# How GPT-2 cuts text before merging, as tiktoken writes it.
_GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
_SINGLE_BLANK = re.compile(r"(?<=\S)[ \n](?=\S)")
_CUT_WINDOW = 4096  # characters
_HALF_CHARACTER = 3  # bytes at most, each of which may be decoded as a U+FFFD
_CONTEXT = 32  # the most tokens before a stream that decide how its first ones are decoded


class Tokenizer:
    """Turns text into token ids and back; the text of an end-of-document token becomes its id.

    The ids are a function of the whole text alone: no ids are cut off, and none are added.

    Attributes:
        backend: the tokenizer of the library.
        vocab_size: number of tokens; all ids are below it.
        eod_id: id of the end-of-document token.
        splits_at_blanks: its pre-tokenizer is GPT-2's, so that `last_cut` may cut a text.
    """

    def __init__(self, backend: tokenizers.Tokenizer, eod: str | int, *, splits_at_blanks: bool):
        """Wrap a tokenizer of the library; `tokenizer_sources` reads one.

        Args:
            backend: the tokenizer; truncation, padding and dropout are switched off.
            eod: the end-of-document token, as text or as id.
            splits_at_blanks: see the class.

        Raises:
            UserError: it has no such end-of-document token.
        """
        vocab = backend.get_vocab()
        eod_id = vocab.get(eod, -1) if isinstance(eod, str) else eod
        if eod_id not in vocab.values():
            raise errors.UserError(
                f"the tokenizer has no token {eod!r} for the end of a document: name the one "
                "it has with --eod-token (for training, its id with data.eod_id)",
                page="data.md#from-text",
            )
        backend.no_truncation()
        backend.no_padding()
        if isinstance(backend.model, models.BPE):
            backend.model.dropout = None  # it leaves out merges at random
        self.backend = backend
        self._tiktoken: tiktoken.Encoding | None = None
        self.vocab_size, self.eod_id = max(vocab.values()) + 1, eod_id
        self.splits_at_blanks = splits_at_blanks

    @property
    def vocab(self) -> dict[str, int]:
        """All tokens and their ids."""
        vocab: dict[str, int] = self.backend.get_vocab()
        return vocab

    @property
    def uses_tiktoken(self) -> bool:
        """Whether tiktoken encodes batches."""
        return self._tiktoken is not None

    @property
    def drops_characters(self) -> bool:
        """Whether characters outside the vocabulary get no token at all."""
        bpe = self.backend.model
        if not isinstance(bpe, models.BPE) or bpe.unk_token is not None:
            return False  # other models have a token for them, or refuse them
        has_bytes = set(pre_tokenizers.ByteLevel.alphabet()) <= self.vocab.keys()
        return not (bpe.byte_fallback or has_bytes)

    @property
    def added(self) -> dict[int, str]:
        """The tokens that are matched in a text before any merge, such as the end of a document."""
        return {i: t.content for i, t in self.backend.get_added_tokens_decoder().items()}

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text.

        Raises:
            UserError: the text has bytes that are not UTF-8, or half a surrogate pair.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise errors.UserError(
                f"the text {text[:40]!r} is not UTF-8 at character {error.start}: fix it",
                page="data.md#from-text",
            ) from None
        ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the token ids of each text, `[n]` each; other threads may run meanwhile."""
        if self._tiktoken is not None:
            return [self._tiktoken.encode_to_numpy(text, allowed_special="all") for text in texts]
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(e.ids, np.uint32) for e in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, the end-of-document token included.

        Bytes that are not UTF-8, such as half a character, become U+FFFD.
        """
        text: str = self.backend.decode(list(ids), skip_special_tokens=False)
        return text

    def token_text(self, token: int) -> str:
        """Return the text of a token inside a text: with the space before a word."""
        return self.decode([self.eod_id, token]).removeprefix(self.decode([self.eod_id]))

    def use_tiktoken(self, vocab: dict[str, int]) -> bool:
        """Encode batches with tiktoken, if it is installed; return whether it is.

        It is 5 times as fast. It serves for GPT-2's own vocabulary, where the two agree on every
        text.
        """
        if importlib.util.find_spec("tiktoken") is None:
            return False
        import tiktoken  # in the extra `data`

        byte_of = {char: byte for byte, char in enumerate(_byte_alphabet())}
        ranks = {bytes(byte_of[c] for c in t): i for t, i in vocab.items() if t != END_OF_TEXT}
        self._tiktoken = tiktoken.Encoding(
            "gpt2-files",
            pat_str=_GPT2_PATTERN,
            mergeable_ranks=ranks,
            special_tokens={END_OF_TEXT: vocab[END_OF_TEXT]},
        )
        return True


class TextStream:
    """Turns token ids that arrive one after another into text; holds back text that may change.

    The text of a token may depend on the tokens before it: SentencePiece's decoders drop the space
    of the first token. So each token is decoded after some that were returned already.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()):
        """Start after the ids `before`; of their text only half a character may be left."""
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._context_text = ""
        self._held: list[int] = []  # ids after the context, whose text is not all returned
        self._n_returned = 0  # characters of the text of `_held`
        self.add(_last_text(tokenizer, before))

    def add(self, ids: Sequence[int]) -> str:
        """Return the text that these ids complete; bytes of half a character wait for the rest."""
        return "".join([self._add(token) for token in ids])

    def end(self) -> str:
        """Return the text that was held back."""
        return self._held_text()[self._n_returned :]

    def _add(self, token: int) -> str:
        self._held.append(token)
        text = self._held_text()
        n_half = len(text) - len(text.rstrip("\ufffd"))
        if n_half > _HALF_CHARACTER:  # these bytes are no character
            n_half = 0
        whole = text[: len(text) - n_half]
        new, self._n_returned = whole[self._n_returned :], len(whole)
        if not n_half:
            text = self._tokenizer.decode(self._held)
            # Ids without text may not replace the context.
            self._context = self._held if text else self._context + self._held
            self._context_text = self._tokenizer.decode(self._context)
            self._held, self._n_returned = [], 0
        return new

    def _held_text(self) -> str:
        text = self._tokenizer.decode(self._context + self._held)
        if text.startswith(self._context_text):
            return text[len(self._context_text) :]
        # ByteFallback decodes adjacent bytes together: half a character spoils those before it.
        return self._tokenizer.decode(self._held)


def _last_text(tokenizer: Tokenizer, ids: Sequence[int]) -> Sequence[int]:
    """Return the fewest of the last ids whose text begins with a whole character."""
    for n in range(1, min(len(ids), _CONTEXT) + 1):
        if tokenizer.decode(ids[-n:])[:1] not in ("", "\ufffd"):
            return ids[-n:]
    return ids[-_CONTEXT:]


def last_cut(text: str) -> int:
    """Return the last place where a text may be cut for GPT-2's pre-tokenizer; 0 if there is none.

    The two parts, encoded separately, give the tokens of the whole. The place is before a single
    space, or after a single newline, between two characters that are not blank.
    """
    for high in range(len(text), 0, -_CUT_WINDOW):
        blanks = list(_SINGLE_BLANK.finditer(text, max(0, high - _CUT_WINDOW), high + 1))
        if blanks:
            return blanks[-1].start() + (blanks[-1].group() == "\n")
    return 0


def byte_level(bpe: models.BPE) -> tokenizers.Tokenizer:
    """Return a tokenizer of the library with GPT-2's pre-tokenizer and decoder."""
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _byte_alphabet() -> list[str]:
    """Return the character that represents each byte in GPT-2's vocabulary."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (0x100 + i for i in itertools.count())
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
