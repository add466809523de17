"""What is measured: the tokens of a file of text or of a corpus, as one stream, and its bytes."""

import dataclasses
import pathlib

import numpy as np

from gpt3jax import errors
from gpt3jax.config import schema
from gpt3jax.data import documents, indexed, tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stream:
    """Tokens, every one of which is scored.

    Attributes:
        tokens: of all documents, one after another, `[n]`; a corpus's are a view of its map.
        eod_id: the token that stands before the first one, as if a document had just ended.
        n_bytes: of their text in UTF-8, end-of-document tokens left out; 0 if that is not known.
    """

    tokens: np.ndarray
    eod_id: int
    n_bytes: int


def of_file(path: str, text: tokenizer.Tokenizer, max_tokens: int) -> Stream:
    """Return the tokens of a UTF-8 file, read as one document; at most max_tokens (0: all).

    Raises:
        UserError: it cannot be read, is empty, or is not UTF-8.
    """
    try:
        content = documents.decode(pathlib.Path(path).read_bytes())
    except (OSError, UnicodeDecodeError) as error:
        raise errors.UserError(f"--text={path} cannot be read: {error}") from error
    if not content:
        raise errors.UserError(f"--text={path} is empty: give a file with text")
    whole = text.encode_batch([content])[0]
    tokens = whole[: max_tokens or None]
    read = content if len(tokens) == len(whole) else text.decode(tokens.tolist())
    return Stream(tokens=tokens, eod_id=text.eod_id, n_bytes=len(read.encode()))


def of_corpus(
    prefix: str, text: tokenizer.Tokenizer | None, cfg: schema.Config, max_tokens: int
) -> Stream:
    """Return the tokens of a corpus in its order; at most max_tokens (0: all).

    Its bytes are those of each document, decoded, so they are known with a tokenizer only.

    Raises:
        UserError: it is no corpus, has no token, or one that the model does not know.
    """
    corpus = indexed.IndexedCorpus(prefix)
    if not corpus.n_tokens:
        raise errors.UserError(f"--data={prefix} has no token: give a corpus that has documents")
    indexed.check_tokens(corpus, cfg.model.vocab_size)
    tokens = corpus.head(max_tokens or corpus.n_tokens)
    eod_id = cfg.data.eod_id if text is None else text.eod_id
    if eod_id >= cfg.model.vocab_size:
        raise errors.UserError(
            f"the checkpoint's data.eod_id={eod_id} is not below model.vocab_size="
            f"{cfg.model.vocab_size}: give the tokenizer that the model was trained with"
        )
    n_bytes = 0 if text is None else _count_bytes(corpus, text, len(tokens))
    return Stream(tokens=tokens, eod_id=eod_id, n_bytes=n_bytes)


def _count_bytes(corpus: indexed.IndexedCorpus, text: tokenizer.Tokenizer, n_tokens: int) -> int:
    ends = np.cumsum(corpus.lengths, dtype=np.int64)
    stops = [int(ends[last - 1]) for last in corpus.document_indices[1:] if last]
    n_bytes, start = 0, 0
    for stop in stops:
        tokens = corpus.tokens[start : min(stop, n_tokens)]
        n_bytes += len(text.decode(tokens[tokens != text.eod_id].tolist()).encode())
        start = stop
        if start >= n_tokens:
            break
    return n_bytes
