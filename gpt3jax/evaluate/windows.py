"""The windows that cut a long stream of tokens, so that each token is scored once in a context."""

from collections.abc import Iterator

import numpy as np


def windows(n_tokens: int, seq_len: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield (first, counted, stop): tokens [first, stop) are a window, [counted, stop) count in it.

    Every token counts once. The first window counts all of its seq_len tokens. Each other one
    counts its last `stride` tokens, or fewer at the end, so the seq_len - stride or more tokens
    before them are their context. The last window ends with the stream, and is as long as the
    others.
    """
    counted = 0
    while counted < n_tokens:
        stop = min(n_tokens, counted + (stride if counted else seq_len))
        yield max(0, stop - seq_len), counted, stop
        counted = stop


def window_rows(
    tokens: np.ndarray, eod_id: int, seq_len: int, stride: int
) -> Iterator[tuple[np.ndarray, int]]:
    """Yield a row for `token_losses.Scorer` of each window, and how many of its tokens count.

    The last ones count. The end-of-document token stands before the stream's first token.
    """
    for first, counted, stop in windows(len(tokens), seq_len, stride):
        before = tokens[first - 1 : first] if first else [eod_id]
        yield np.concatenate([before, tokens[first:stop]]), stop - counted
