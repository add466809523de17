"""Several corpora as one: Megatron's BlendedDataset, index for index.

Sample k comes from the corpus that is furthest behind its share of the first k samples, and is the
next of that corpus's own, already shuffled samples. Source: Megatron-LM `blended_dataset.py`,
`blended_megatron_dataset_builder.py` and `helpers.cpp` at d98e8a64dd.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np

from gpt3jax import errors
from gpt3jax.data import blend_order, index_cache, indexed, samples

SURPLUS = 0.005  # samples that each corpus of a weighted blend prepares beyond its share
MAX_CORPORA = 32_766  # a corpus's number is int16


@dataclasses.dataclass(frozen=True)
class Source:
    """The corpora that a split reads."""

    corpora: Sequence[indexed.Corpus]
    weights: Sequence[float] | None
    """Weight of each corpus, in any unit; None: each counts by its samples, and is read once."""
    split: str | None
    """Shares of documents, the same for each corpus; None: the corpora belong to this split
    alone, which takes all their documents."""


def parse(paths: Sequence[str], field: str = "data.paths") -> tuple[list[str], list[float] | None]:
    """Return the prefixes and weights of Megatron's `--data-path`.

    The words are "weight prefix weight prefix ..." if every other word is a number. Otherwise all
    are prefixes, and the weights are None: each corpus then counts by its number of samples.

    Raises:
        UserError: some of the words in the places of weights are numbers and others are not; it
            names the field.
    """
    words = [path.strip() for path in paths]
    number = r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?"
    are_weights = [re.fullmatch(number, word) is not None for word in words[::2]]
    if len(words) % 2 or not any(are_weights):
        return words, None
    if not all(are_weights):
        raise errors.UserError(
            f"{field}={' '.join(words)}: {words[::2][are_weights.index(False)]!r} stands where "
            "a weight is expected: give every prefix a weight before it, or none",
            page="data.md#which-corpora-a-run-reads",
        )
    return words[1::2], [float(word) for word in words[::2]]


def build(
    source: Source, name: str, request: samples.Request
) -> "samples.SampleMap | Blend | None":
    """Return the samples of a split, of one corpus or of a blend; None if there are none.

    Args:
        source: one or more corpora.
        name: of the split, one of `samples.SPLITS`.
        request: the samples that are needed; of an unweighted blend, None takes all of them once.

    Raises:
        UserError: a corpus gives the split no documents, or no sample; a weight is not above 0.
    """
    if request.n_samples == 0:
        return None
    if len(source.corpora) == 1 and (source.weights is None or source.split is None):
        return _map(source, 0, name, request)
    if source.weights is None:
        return _unweighted(source, name, request)
    assert request.n_samples is not None, "a weighted blend has no size of its own"
    shares = _shares(source.corpora, source.weights)
    targets = [math.ceil(request.n_samples * share) for share in shares]
    wanted = [math.ceil(target * (1 + SURPLUS)) for target in targets]
    maps = _maps(source, name, [dataclasses.replace(request, n_samples=n) for n in wanted])
    return Blend(maps, shares, sum(targets), request.cache) if maps else None


def _unweighted(source: Source, name: str, request: samples.Request) -> "Blend | None":
    all_samples = dataclasses.replace(request, n_samples=None)
    maps = _maps(source, name, [all_samples] * len(source.corpora))
    sizes = [len(m) for m in maps]
    n = None if request.n_samples is None else min(request.n_samples, sum(sizes))
    return Blend(maps, sizes, n, request.cache) if maps else None


def _maps(
    source: Source, name: str, requests: Sequence[samples.Request]
) -> list[samples.SampleMap]:
    """Return the samples of each corpus; without those whose split is empty."""
    maps = [_map(source, i, name, request) for i, request in enumerate(requests)]
    return [m for m in maps if m is not None]


def _map(source: Source, i: int, name: str, request: samples.Request) -> samples.SampleMap | None:
    corpus = source.corpora[i]
    if source.split is None:
        return samples.SampleMap(corpus, (0, len(corpus)), request)
    return samples.build(corpus, source.split, name, request)


def _shares(corpora: Sequence[indexed.Corpus], weights: Sequence[float]) -> list[float]:
    for corpus, weight in zip(corpora, weights, strict=True):
        if not 0 < weight < math.inf:
            raise errors.UserError(
                f"data.paths: the weight of {corpus.prefix} is {weight:g} and must be above 0: "
                "give it another, or leave the corpus out",
                page="data.md#when-data-is-refused",
            )
    shares: list[float] = blend_order.normalise(weights).tolist()
    return shares


class Blend:
    """Samples of several maps in one order; it reads like a `samples.SampleMap`.

    Attributes:
        maps: the maps that it blends.
        weights: share of each map; its number of samples where the blend takes all samples.
        dataset_index: the map that sample k comes from, int16.
        dataset_sample_index: the number of sample k in that map, int64.
    """

    def __init__(
        self,
        maps: Sequence[samples.SampleMap],
        weights: Sequence[float],
        n_samples: int | None,
        cache: str = "",
    ):
        """Build the order, or map it from the cache.

        Args:
            maps: at least one.
            weights: of the maps, in any unit.
            n_samples: length of the blend; None: all samples of all maps, once.
            cache: folder that keeps the indices (`index_cache`); "": none.

        Raises:
            UserError: a map has no samples, or fewer than the blend takes from it.
        """
        assert 0 < len(maps) == len(weights) <= MAX_CORPORA, (len(maps), len(weights))
        self.maps = tuple(maps)
        self.seq_len = maps[0].seq_len
        self._check_not_empty()
        sizes = np.array([len(m) for m in maps], np.int64)
        if n_samples is None:
            n, self.weights = int(sizes.sum()), sizes.astype(np.float64)
            shares, limits = blend_order.normalise(sizes), sizes
        else:
            n, self.weights = n_samples, blend_order.normalise(weights)
            shares, limits = self.weights, None
        indices = index_cache.arrays(
            cache,
            lambda: {
                "weights": self.weights.tolist(), "n_samples": n, "exhaustive": n_samples is None,
            },
            lambda: _build_indices(shares, n, limits),
        )  # fmt: skip
        self.dataset_index = indices["dataset_index"]
        self.dataset_sample_index = indices["dataset_sample_index"]
        self._check_sizes(indices["taken"].tolist())

    def __len__(self) -> int:
        """Return how many samples there are."""
        return len(self.dataset_index)

    def tokens(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens `[n, seq_len + 1]` int32 of samples, and how many of each are real."""
        which, sample = self.dataset_index[numbers], self.dataset_sample_index[numbers]
        out = np.empty((len(numbers), self.seq_len + 1), np.int32)
        n_real = np.empty(len(numbers), np.int64)
        for i in np.unique(which):
            rows = np.flatnonzero(which == i)
            out[rows], n_real[rows] = self.maps[i].tokens(sample[rows])
        return out, n_real

    def _check_not_empty(self) -> None:
        for m in self.maps:
            if not len(m):
                raise errors.UserError(
                    f"{m.corpus.prefix}: its part of this split has fewer than the {m.seq_len} + 1 "
                    "tokens of one sample: leave the corpus out, or give all corpora weights",
                    page="data.md#when-data-is-refused",
                )

    def _check_sizes(self, counts: list[int]) -> None:
        for m, count in zip(self.maps, counts, strict=True):
            if count > len(m):
                raise errors.UserError(
                    f"the blend takes {count} samples of {m.corpus.prefix}, which prepared "
                    f"{len(m)}: {len(self)} samples are too few for {len(self.maps)} corpora with "
                    "such weights; leave out those with the smallest weights",
                    page="data.md#when-data-is-refused",
                )


def _build_indices(
    shares: np.ndarray, n_samples: int, limits: np.ndarray | None
) -> index_cache.Arrays:
    order = blend_order.choose_maps(shares, n_samples, limits)
    within, counts = blend_order.count_before(order, len(shares))
    return {
        "dataset_index": order,
        "dataset_sample_index": within,
        "taken": np.asarray(counts),
    }
