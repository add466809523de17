"""Which tokens make sample k: Megatron's GPTDataset, index for index.

The documents of a split are repeated for as many epochs as the requested samples need, shuffled,
and read as one flat run of tokens. Sample i of the flat run is tokens [i S, i S + S]; a second
shuffle gives the order of the samples. Source: Megatron-LM `gpt_dataset.py` and `helpers.cpp` at
d98e8a64dd. NumPy's legacy RandomState draws both shuffles, or the order would not be the same.
"""

import dataclasses
from typing import Protocol

import numpy as np

from gpt3jax import errors
from gpt3jax.config import schema, validation
from gpt3jax.data import index_cache, indexed

SPLITS = ("train", "validation", "test")
INDEX_AT_ONCE = 1 << 16  # documents: what building an index needs stays in the CPU's cache
READ_AT_ONCE = 1 << 17  # tokens: what a read needs besides its result stays in the CPU's cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """The samples that a run needs of a split; with the corpus it decides the indices."""

    seq_len: int
    """Tokens of a sample; it reads one more for the last target."""
    seed: int
    """Seed of both shuffles."""
    n_samples: int | None = None
    """How many samples will be used, which decides the number of epochs; None: one epoch."""
    keep_partial: bool = False
    """Keep the last, partial sample, padded (Megatron's `drop_last_partial_validation_sequence`
    off)."""
    cache: str = ""
    """Folder that keeps the indices (`index_cache`); "": none."""


@dataclasses.dataclass(frozen=True)
class Epochs:
    """How often the documents of a split are repeated, and whether the last epoch is separate."""

    n: int
    last_is_separate: bool
    n_samples_before_last: int

    @classmethod
    def needed(cls, n_tokens: int, seq_len: int, n_samples: int | None) -> "Epochs":
        """Return the epochs that n_samples samples need; one epoch for None.

        The last epoch is shuffled separately if less than 80% of it will be used.
        """
        n = 1 if n_samples is None else max(1, -(-(n_samples * seq_len + 1) // n_tokens))
        if n == 1 or n_samples is None:
            return cls(1, False, 0)
        before_last = ((n - 1) * n_tokens - 1) // seq_len
        per_epoch = (n_tokens - 1) // seq_len
        return cls(n, n_samples - before_last < int(0.80 * per_epoch), before_last)


class Samples(Protocol):
    """Samples by number: of one corpus (`SampleMap`) or of a blend of corpora."""

    def __len__(self) -> int: ...

    def tokens(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens `[n, seq_len + 1]` int32 of samples, and how many of each are real."""


def build(corpus: indexed.Corpus, split: str, name: str, request: Request) -> "SampleMap | None":
    """Return the samples of a split of a corpus; None if it has no weight or needs no samples.

    `split` holds the shares of the documents, `name` is one of `SPLITS`.

    Raises:
        UserError: the split has a weight but gets no document, or documents without a token.
            (Megatron aborts there, or never ends.)
    """
    bounds = split_bounds(split, len(corpus))[SPLITS.index(name)]
    if bounds is None or request.n_samples == 0:
        return None
    if bounds[0] == bounds[1]:
        raise errors.UserError(
            f"data.split={split!r} gives the {name} split none of the {len(corpus)} "
            f"documents of {corpus.prefix}: give it a larger weight, or 0 to leave it out",
            page="data.md#when-data-is-refused",
        )
    return SampleMap(corpus, bounds, request)


def split_bounds(split: str, n: int) -> list[tuple[int, int] | None]:
    """Return the range of sequences of each split; None where a split has no weight.

    Raises:
        UserError: the weights are not numbers, or all 0.
    """
    weights = validation.split_weights(split)
    shares = np.asarray(weights) / np.sum(weights)
    ends = [0.0]
    for share in shares.tolist():
        ends.append(ends[-1] + share)
    bounds = [round(end * float(n)) for end in ends]
    return [
        (low, high) if weight else None
        for weight, low, high in zip(weights, bounds, bounds[1:], strict=False)
    ]


class SampleMap:
    """The samples of one split of one corpus, in training order.

    Attributes:
        epochs: how often the documents are repeated.
        document_index: the documents (sequences of the corpus) in their order, int32.
        sample_index: `[n + 1, 2]`: where sample i of the flat run begins, as a place in
            document_index and an offset (tokens) in that document; int32, int64 where it must.
        shuffle_index: which sample of the flat run comes k-th, uint32, int64 where it must.
    """

    def __init__(self, corpus: indexed.Corpus, sequences: tuple[int, int], request: Request):
        """Build the indices, or map them from the cache.

        Args:
            corpus: the corpus to read from.
            sequences: first and last + 1 of its sequences that belong to the split.
            request: the samples that are needed.

        Raises:
            UserError: the sequences have no token.
        """
        self.corpus, self.seq_len = corpus, request.seq_len
        self._sequences, self._seed = sequences, request.seed
        n_tokens = int(corpus.lengths[slice(*sequences)].sum(dtype=np.int64))
        if n_tokens == 0:
            raise errors.UserError(
                f"{corpus.prefix}: there is no token in documents {sequences[0]} to "
                f"{sequences[1]} (of {len(corpus)}): the corpus is too small for this split",
                page="data.md#when-data-is-refused",
            )
        self.epochs = Epochs.needed(n_tokens, request.seq_len, request.n_samples)
        n = _count_samples(self.epochs.n * n_tokens, request)
        indices = index_cache.arrays(
            request.cache, lambda: self._cache_key(n), lambda: self._build_indices(n)
        )
        self.document_index = indices["document_index"]
        self.sample_index = indices["sample_index"]
        self.shuffle_index = indices["shuffle_index"]

    def _cache_key(self, n_samples: int) -> index_cache.Key:
        return {
            "lengths": indexed.lengths_checksum(self.corpus),
            "sequences": self._sequences,
            "seq_len": self.seq_len,
            "n_samples": n_samples,
            "epochs": dataclasses.astuple(self.epochs),
            "seed": self._seed,
        }

    def _build_indices(self, n_samples: int) -> index_cache.Arrays:
        random = np.random.RandomState(self._seed)  # both shuffles draw from it, in this order
        documents = _shuffled_documents(self._sequences, self.epochs, random)
        return {
            "document_index": documents,
            "sample_index": build_sample_index(
                self.corpus.lengths, documents, self.seq_len, n_samples
            ),
            "shuffle_index": _shuffled_samples(n_samples, self.epochs, random),
        }

    def __len__(self) -> int:
        """Return how many samples there are: at least as many as were requested."""
        return len(self.shuffle_index)

    def tokens(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens `[n, seq_len + 1]` int32 of samples, and how many of each are real.

        The rest of a partial sample's row is 0.
        """
        out = np.zeros((len(numbers), self.seq_len + 1), np.int32)
        n_real = np.zeros(len(numbers), np.int64)
        n_rows = max(1, READ_AT_ONCE // (self.seq_len + 1))
        for low in range(0, len(numbers), n_rows):
            rows = slice(low, low + n_rows)
            tokens, n_real[rows] = self._read(numbers[rows])
            if (n_real[rows] == self.seq_len + 1).all():
                out[rows] = tokens.reshape(-1, self.seq_len + 1)
            else:
                out[rows][np.arange(self.seq_len + 1) < n_real[rows, None]] = tokens
        return out, n_real

    def _read(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens of samples, concatenated, and how many each has.

        A sample is made of pieces: the end of a document, whole documents, the start of another.
        """
        flat = self.shuffle_index[numbers].astype(np.int64)
        place, offset = self.sample_index[flat].T.astype(np.int64)
        last_place, last_offset = self.sample_index[flat + 1].T
        n_pieces = last_place - place + 1
        ends = np.cumsum(n_pieces)
        starts = ends - n_pieces
        places = np.arange(ends[-1]) + np.repeat(place - starts, n_pieces)
        documents = self.document_index[places]
        offsets = np.zeros(len(places), np.int64)
        offsets[starts] = offset
        stops = self.corpus.lengths[documents].astype(np.int64)
        stops[ends - 1] = last_offset + 1  # the token shared with the next sample
        lengths = stops - offsets
        return self.corpus.gather(documents, offsets, lengths), np.add.reduceat(lengths, starts)


def build_sample_index(
    document_lengths: np.ndarray, documents: np.ndarray, seq_len: int, n_samples: int
) -> np.ndarray:
    """Return where each sample of the flat run begins and the last one ends, `[n_samples + 1, 2]`.

    It works block by block, so besides the result it needs a few MiB, whatever the corpus.
    """
    longest = int(document_lengths.max())
    wide = max(len(documents), longest) > np.iinfo(np.int32).max
    index = np.empty((n_samples + 1, 2), np.int64 if wide else np.int32)
    end, last = 0, (0, 0)
    for low in range(0, len(documents), INDEX_AT_ONCE):
        block = documents[low : low + INDEX_AT_ONCE].astype(np.intp)
        lengths = document_lengths.take(block, mode="clip")  # twice as fast as [block]
        ends = np.cumsum(lengths, dtype=np.int64)
        ends += end
        # Samples first...stop - 1 begin in this block; document i ends before number next_i.
        first, next_i = -(-end // seq_len), -(-ends // seq_len)
        end = int(ends[-1])
        stop = min(int(next_i[-1]), n_samples + 1)
        places = np.cumsum(np.bincount(next_i - first)[: max(0, stop - first)])
        starts = np.arange(first, stop, dtype=np.int64) * seq_len
        index[first:stop, 0] = places + low
        index[first:stop, 1] = starts - (ends[places] - lengths[places])
        full = np.flatnonzero(lengths)
        if len(full):
            last = low + full[-1], lengths[full[-1]] - 1
    if n_samples * seq_len >= end:  # the end of a partial sample
        index[n_samples] = last
    return index


def read(source: Samples, data: schema.Data, numbers: np.ndarray) -> dict[str, np.ndarray]:
    """Return samples as arrays `[n, T]`: tokens, targets, loss_mask, positions.

    With `data.reset_attention_mask` also segments.
    """
    tokens, n_real = source.tokens(numbers)
    inputs = tokens[:, :-1]
    mask, positions, segments = end_of_document_effects(inputs, data)
    mask[np.arange(inputs.shape[1]) >= n_real[:, None] - 1] = 0  # the padding
    batch = {
        "tokens": inputs,
        "targets": tokens[:, 1:],
        "loss_mask": mask,
        "positions": positions,
    }
    return batch if segments is None else batch | {"segments": segments}


def end_of_document_effects(
    tokens_BT: np.ndarray, data: schema.Data
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Return loss mask, positions and segments of input tokens `[B, T]`.

    Loss mask: float32, 0 at inputs that end a document (`eod_mask_loss`). Positions: int32; they
    restart after each document (`reset_position_ids`). Segments: int32, equal where tokens may see
    each other, or None without `reset_attention_mask`. An end-of-document token belongs to the
    document that it ends.
    """
    is_end_BT = tokens_BT == data.eod_id
    ends_before_BT = np.pad(is_end_BT[:, :-1], ((0, 0), (1, 0)))
    positions_BT = np.broadcast_to(np.arange(tokens_BT.shape[1], dtype=np.int32), tokens_BT.shape)
    mask_BT = np.ones(tokens_BT.shape, np.float32)
    if data.eod_mask_loss:
        mask_BT[is_end_BT] = 0
    if data.reset_position_ids:
        document_starts_BT = np.maximum.accumulate(np.where(ends_before_BT, positions_BT, 0), 1)
        positions_BT = positions_BT - document_starts_BT
    segments_BT = None
    if data.reset_attention_mask:
        segments_BT = np.cumsum(ends_before_BT, axis=1, dtype=np.int32)
    return mask_BT, np.ascontiguousarray(positions_BT, np.int32), segments_BT


def _count_samples(n_tokens: int, request: Request) -> int:
    if request.keep_partial:  # in 32-bit floats, as Megatron does
        return int(np.ceil(np.float32(n_tokens - 1) / np.float32(request.seq_len)))
    return (n_tokens - 1) // request.seq_len


def _shuffled_documents(
    sequences: tuple[int, int], epochs: Epochs, random: np.random.RandomState
) -> np.ndarray:
    numbers = np.arange(*sequences, dtype=np.int32)

    def shuffled(n_epochs: int) -> np.ndarray:
        documents = np.tile(numbers, n_epochs)
        random.shuffle(documents)
        return documents

    if not epochs.last_is_separate:
        return shuffled(epochs.n)
    return np.concatenate([shuffled(epochs.n - 1), shuffled(1)])


def _shuffled_samples(n: int, epochs: Epochs, random: np.random.RandomState) -> np.ndarray:
    dtype = np.int64 if n >= np.iinfo(np.uint32).max - 1 else np.uint32
    first = epochs.n_samples_before_last if epochs.last_is_separate else n
    parts = [np.arange(first, dtype=dtype), np.arange(first, n, dtype=dtype)]
    for part in parts if first != n else parts[:1]:
        random.shuffle(part)
    return np.concatenate(parts)
