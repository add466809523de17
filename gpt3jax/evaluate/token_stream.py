"""The tokens of a file of text or of a corpus, as one stream to score; and its bytes."""

import dataclasses
import pathlib

import numpy as np

from gpt3jax import errors
from gpt3jax.config import schema
from gpt3jax.data import documents, indexed
from gpt3jax.data import tokenizer as tokenization


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenStream:
    """Tokens, each of which is scored.

    Attributes:
        tokens: of all documents, one after another, `[n]`; a corpus's are a view of its file.
        eod_id: the token that stands before the first one, as if a document had just ended.
        n_bytes: of the text in UTF-8, without end-of-document tokens; 0 where it is not known.
    """

    tokens: np.ndarray
    eod_id: int
    n_bytes: int


def read_file(path: str, tokenizer: tokenization.Tokenizer, max_tokens: int) -> TokenStream:
    """Return the tokens of a UTF-8 file, read as one document; at most max_tokens (0: all).

    Raises:
        UserError: the file cannot be read, is empty, or is not UTF-8.
    """
    try:
        content = documents.decode(pathlib.Path(path).read_bytes())
    except (OSError, UnicodeDecodeError) as error:
        raise errors.UserError(
            f"--text={path} cannot be read: {error}", page="evaluation.md"
        ) from error
    if not content:
        raise errors.UserError(
            f"--text={path} is empty: give a file with text", page="evaluation.md"
        )
    whole = tokenizer.encode_batch([content])[0]
    tokens = whole[: max_tokens or None]
    scored_text = content if len(tokens) == len(whole) else tokenizer.decode(tokens.tolist())
    return TokenStream(tokens=tokens, eod_id=tokenizer.eod_id, n_bytes=len(scored_text.encode()))


def read_corpus(
    prefix: str, tokenizer: tokenization.Tokenizer | None, cfg: schema.Config, max_tokens: int
) -> TokenStream:
    """Return the tokens of a corpus in its order; at most max_tokens (0: all).

    Its bytes are those of the decoded documents, so they are known only with a tokenizer.

    Raises:
        UserError: it is no corpus, has no token, or has one that the model does not know.
    """
    corpus = indexed.IndexedCorpus(prefix)
    if not corpus.n_tokens:
        raise errors.UserError(
            f"--data={prefix} has no token: give a corpus that has documents", page="evaluation.md"
        )
    indexed.check_tokens(corpus, cfg.model.vocab_size)
    tokens = corpus.head(max_tokens or corpus.n_tokens)
    eod_id = cfg.data.eod_id if tokenizer is None else tokenizer.eod_id
    if eod_id >= cfg.model.vocab_size:
        raise errors.UserError(
            f"the checkpoint's data.eod_id={eod_id} is not below model.vocab_size="
            f"{cfg.model.vocab_size}: give the tokenizer that the model was trained with",
            page="data.md#when-data-is-refused",
        )
    n_bytes = 0 if tokenizer is None else _count_bytes(corpus, tokenizer, len(tokens))
    return TokenStream(tokens=tokens, eod_id=eod_id, n_bytes=n_bytes)


def _count_bytes(
    corpus: indexed.IndexedCorpus, tokenizer: tokenization.Tokenizer, n_tokens: int
) -> int:
    ends = np.cumsum(corpus.lengths, dtype=np.int64)
    stops = [int(ends[last - 1]) for last in corpus.document_indices[1:] if last]
    n_bytes, start = 0, 0
    for stop in stops:
        tokens = corpus.tokens[start : min(stop, n_tokens)]
        n_bytes += len(tokenizer.decode(tokens[tokens != tokenizer.eod_id].tolist()).encode())
        start = stop
        if start >= n_tokens:
            break
    return n_bytes
