"""Several corpora as one: Megatron's BlendedDataset, index for index.

Sample k comes from the corpus that is furthest behind its share of the first k samples, and is the
next one of that corpus's own, already shuffled samples. Source: Megatron-LM `blended_dataset.py`,
`blended_megatron_dataset_builder.py` and `helpers.cpp` at d98e8a64dd.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from gpt3jax import errors
from gpt3jax.data import index_cache, indexed, samples

SURPLUS = 0.005  # samples that each corpus of a weighted blend prepares beyond its share
MAX_CORPORA = 32_766  # a corpus's number is int16

# The order is cut into segments that are computed side by side, so that NumPy sees long arrays.
_MIN_SEGMENT = 1024  # steps
_MAX_SEGMENTS = 16_384
_LEAD_IN = 256  # steps before a segment, in which a guessed start mostly becomes the true one


def parse(paths: Sequence[str], field: str = "data.paths") -> tuple[list[str], list[float] | None]:
    """Return the prefixes and weights of Megatron's `--data-path`.

    "weight prefix weight prefix ..." where every other word is a number; else all are prefixes,
    without weights (None): each corpus then counts by its number of samples.

    Raises:
        UserError: some of the words that may be weights are numbers and others are not; it names
            the field.
    """
    words = [path.strip() for path in paths]
    number = r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?"
    are_weights = [re.fullmatch(number, word) is not None for word in words[::2]]
    if len(words) % 2 or not any(are_weights):
        return words, None
    if not all(are_weights):
        raise errors.UserError(
            f"{field}={' '.join(words)}: {words[::2][are_weights.index(False)]!r} stands where "
            "a weight is expected: give every prefix a weight before it, or none"
        )
    return words[1::2], [float(word) for word in words[::2]]


def build(
    corpora: Sequence[indexed.Corpus],
    weights: Sequence[float] | None,
    split: str | None,
    name: str,
    seq_len: int,
    n_samples: int | None,
    seed: int,
    keep_partial: bool = False,
    cache: str = "",
) -> "samples.SampleMap | Blend | None":
    """Return the samples of a split, by its name, of one corpus or of a blend.

    Args:
        corpora: one or more.
        weights: of the corpora, in any unit; None: each counts by its samples, and is read once.
        split: shares of documents, of each corpus alike; None: this split has corpora of its
            own, and takes all of them.
        name: one of `samples.SPLITS`.
        seq_len: tokens of a sample.
        n_samples: how many will be used; None: all, once.
        seed: of every corpus's shuffles.
        keep_partial: as in `samples.SampleMap`.
        cache: as there.

    Raises:
        UserError: a corpus gives the split no documents, or no sample; a weight is not above 0.
    """

    def one(corpus: indexed.Corpus, n: int | None) -> samples.SampleMap | None:
        if split is None:
            return samples.SampleMap(
                corpus, (0, len(corpus)), seq_len, n, seed, keep_partial, cache
            )
        return samples.build(corpus, split, name, seq_len, n, seed, keep_partial, cache)

    if n_samples == 0:
        return None
    if len(corpora) == 1 and (weights is None or split is None):
        return one(corpora[0], n_samples)
    if weights is None:
        maps = _present([one(corpus, None) for corpus in corpora])
        sizes = [len(m) for m in maps]
        n = None if n_samples is None else min(n_samples, sum(sizes))
        return Blend(maps, sizes, n, cache) if maps else None
    assert n_samples is not None, "a weighted blend has no size of its own"
    shares = _shares(corpora, weights)
    targets = [math.ceil(n_samples * share) for share in shares]
    wanted = [math.ceil(target * (1 + SURPLUS)) for target in targets]
    maps = _present([one(corpus, n) for corpus, n in zip(corpora, wanted, strict=True)])
    return Blend(maps, shares, sum(targets), cache) if maps else None


class Blend:
    """Samples of several maps in one order; it reads like a `samples.SampleMap`.

    Attributes:
        maps: what it blends.
        weights: share of each map; its number of samples where all samples of all are taken.
        dataset_index: which map sample k comes from, int16.
        dataset_sample_index: which of that map's samples it is, int64.
    """

    def __init__(
        self,
        maps: Sequence[samples.SampleMap],
        weights: Sequence[float],
        n_samples: int | None,
        cache: str = "",
    ):
        """Build the order.

        Args:
            maps: at least one.
            weights: of the maps, in any unit.
            n_samples: length of the blend; None: all samples of all maps, once.
            cache: as in `samples.SampleMap`.

        Raises:
            UserError: a map has no samples, or fewer than the blend takes of it.
        """
        assert 0 < len(maps) == len(weights) <= MAX_CORPORA, (len(maps), len(weights))
        self.maps = tuple(maps)
        self.seq_len = maps[0].seq_len
        sizes = np.array([len(m) for m in maps], np.int64)
        self._check_present()
        limits = sizes if n_samples is None else None
        self.weights = sizes.astype(np.float64) if n_samples is None else _normalise(weights)
        n = int(sizes.sum()) if n_samples is None else n_samples

        def build() -> index_cache.Arrays:
            order = _order(_normalise(sizes) if limits is not None else self.weights, n, limits)
            within, taken = _count_up(order, len(maps))
            return {
                "dataset_index": order,
                "dataset_sample_index": within,
                "taken": np.asarray(taken),
            }

        def key() -> dict[str, Any]:
            weights = self.weights.tolist()
            return {"weights": weights, "n_samples": n, "exhaustive": limits is not None}

        indices = index_cache.arrays(cache, key, build)
        self.dataset_index = indices["dataset_index"]
        self.dataset_sample_index = indices["dataset_sample_index"]
        self._check_taken(indices["taken"].tolist())

    def __len__(self) -> int:
        """Return how many samples there are."""
        return len(self.dataset_index)

    def tokens(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens `[n, seq_len + 1]` int32 of samples by number, and how many are real."""
        which, sample = self.dataset_index[numbers], self.dataset_sample_index[numbers]
        out = np.empty((len(numbers), self.seq_len + 1), np.int32)
        n_real = np.empty(len(numbers), np.int64)
        for i in np.unique(which):
            rows = np.flatnonzero(which == i)
            out[rows], n_real[rows] = self.maps[i].tokens(sample[rows])
        return out, n_real

    def _check_present(self) -> None:
        for m in self.maps:
            if not len(m):
                raise errors.UserError(
                    f"{m.corpus.prefix}: its part of this split has not the {m.seq_len} + 1 tokens "
                    "of one sample: leave the corpus out, or give all corpora weights"
                )

    def _check_taken(self, taken: list[int]) -> None:
        for m, n in zip(self.maps, taken, strict=True):
            if n > len(m):
                raise errors.UserError(
                    f"the blend takes {n} samples of {m.corpus.prefix}, which prepared {len(m)}: "
                    f"{len(self)} samples are too few for {len(self.maps)} corpora with weights as "
                    "these; leave out the lightest ones"
                )


def _present(maps: Sequence[samples.SampleMap | None]) -> list[samples.SampleMap]:
    return [m for m in maps if m is not None]


def _shares(corpora: Sequence[indexed.Corpus], weights: Sequence[float]) -> list[float]:
    for corpus, weight in zip(corpora, weights, strict=True):
        if not 0 < weight < math.inf:
            raise errors.UserError(
                f"data.paths: the weight of {corpus.prefix} is {weight:g} and must be above 0: "
                "give it another, or leave the corpus out"
            )
    shares: list[float] = _normalise(weights).tolist()
    return shares


def _normalise(weights: Sequence[float] | np.ndarray) -> np.ndarray:
    weights = np.asarray(weights, np.float64)
    return weights / weights.sum()


def _order(weights: np.ndarray, size: int, limits: np.ndarray | None = None) -> np.ndarray:
    """Return which map comes at each of `size` steps, int16.

    At step k it is the map i with the largest weight_i max(k, 1) - count_i, the first of equals;
    count_i is how often it came before; at most limits_i times. In float64, step by step, this is
    what Megatron's loop computes. All segments run side by side, each from a guess of the counts at
    its start; whatever start turns out not to be the end of the segment before is set right and
    run again, until all of them join.
    """
    length = max(_MIN_SEGMENT, -(-size // _MAX_SEGMENTS))
    starts = np.arange(0, size, length, dtype=np.float64)
    begins = np.zeros((len(weights), len(starts)))
    early = np.maximum(starts[1:] - _LEAD_IN, 0)
    begins[:, 1:] = _run(weights, early, _guess(weights, early), _LEAD_IN, limits)[1]
    order, ends = _run(weights, starts, begins, min(length, size), limits)
    while len(wrong := 1 + np.flatnonzero((begins[:, 1:] != ends[:, :-1]).any(axis=0))):
        begins[:, wrong] = ends[:, wrong - 1]
        order[wrong], ends[:, wrong] = _run(
            weights, starts[wrong], begins[:, wrong], length, limits
        )
    return order.reshape(-1)[:size]


def _guess(weights: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Return likely counts `[maps, n]` at steps `[n]`: shares, rounded to the right sum."""
    shares = weights[:, None] * steps
    counts = np.floor(shares)
    by_remainder = np.argsort(counts - shares, axis=0, kind="stable")
    rank = np.argsort(by_remainder, axis=0)
    return counts + (rank < steps - counts.sum(axis=0))


def _run(
    weights: np.ndarray,
    starts: np.ndarray,
    counts: np.ndarray,
    n_steps: int,
    limits: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Take n_steps steps from each start `[n]` with its counts `[maps, n]`.

    Returns:
        The maps chosen `[n, n_steps]` int16, and the counts after it.
    """
    n = len(starts)
    counts, columns = counts.copy(), np.arange(n)
    chosen = np.empty((n, n_steps), np.int16)
    lag, most = np.empty(n), np.empty(n)
    choice, is_more = np.empty(n, np.int64), np.empty(n, bool)
    for t in range(n_steps):
        steps = np.maximum(starts + t, 1)
        choice[:] = 0
        most[:] = -np.inf
        for i, weight in enumerate(weights):
            np.multiply(steps, weight, out=lag)
            lag -= counts[i]
            if limits is not None:
                lag[counts[i] >= limits[i]] = -np.inf
            np.greater(lag, most, out=is_more)
            np.putmask(choice, is_more, i)
            np.maximum(lag, most, out=most)
        chosen[:, t] = choice
        counts[choice, columns] += 1
    return chosen, counts


def _count_up(order: np.ndarray, n_maps: int) -> tuple[np.ndarray, list[int]]:
    """Return how often each element of the order occurred before, int64, and in all."""
    before, totals = np.empty(len(order), np.int64), []
    for i in range(n_maps):
        at = np.flatnonzero(order == i)
        before[at] = np.arange(len(at))
        totals.append(len(at))
    return before, totals
