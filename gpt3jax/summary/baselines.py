"""Two simple guesses at the next token: by its frequency, and by the token before it.

Both are smoothed, so that every token has a probability above 0. For a vocabulary of V tokens, N
tokens to learn from, and counts c:

    p(w) = (c(w) + 1) / (N + V)                              (Laplace)
    p(w | h) = (c(h w) + T(h) p(w)) / (c(h) + T(h))          (Witten and Bell, interpolated)

where T(h) is how many different tokens followed h. Source of the second: Chen and Goodman (1998),
"An Empirical Study of Smoothing Techniques for Language Modeling", 2.4.
"""

import numpy as np


class Baselines:
    """What was learned from pairs of a token and the one before it."""

    def __init__(self, before: np.ndarray, tokens: np.ndarray, vocab_size: int):
        """Count; `before` and `tokens` have one shape, and ids below `vocab_size`."""
        self._n_ids = vocab_size
        counts = np.bincount(tokens.ravel(), minlength=vocab_size)
        self._unigram_V = (counts + 1) / (counts.sum() + vocab_size)
        pairs, pair_counts = np.unique(self._pair_ids(before, tokens), return_counts=True)
        self._pairs = np.append(pairs, vocab_size**2)  # a last one, which no pair is
        self._pair_counts = np.append(pair_counts, 0)
        self._n_after_V = np.bincount(before.ravel(), minlength=vocab_size)
        self._n_different_V = np.bincount(pairs // vocab_size, minlength=vocab_size)

    def _pair_ids(self, before: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        return before.ravel().astype(np.int64) * self._n_ids + tokens.ravel()

    def unigram_losses(self, tokens: np.ndarray) -> np.ndarray:
        """Return -ln p(w) (nats) of each token."""
        return -np.log(self._unigram_V[tokens])

    def bigram_losses(self, before: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Return -ln p(w | h) (nats) of each token w after the token h before it."""
        pairs = self._pair_ids(before, tokens)
        places = np.searchsorted(self._pairs, pairs)
        counts = np.where(self._pairs[places] == pairs, self._pair_counts[places], 0)
        n_after, n_different = (x[before] for x in (self._n_after_V, self._n_different_V))
        unigram = self._unigram_V[tokens]
        # A token that nothing followed says nothing: its weight of the unigram is 1.
        n_different = np.where(n_after == 0, 1, n_different)
        smoothed = counts.reshape(tokens.shape) + n_different * unigram
        return -np.log(smoothed / (n_after + n_different))
