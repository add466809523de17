"""Which tokens make sample k: Megatron's GPTDataset, index for index.

The documents of a split are repeated for as many epochs as the samples asked for need, shuffled,
and read as one flat run of tokens; sample i of the flat run is tokens [i S, i S + S]; a second
shuffle says which of them comes k-th. Source: Megatron-LM `gpt_dataset.py` and `helpers.cpp` at
d98e8a64dd. NumPy's legacy RandomState is what makes the order equal.
"""

import dataclasses
from typing import Any, Protocol

import numpy as np

from gpt3jax import errors
from gpt3jax.config import schema, validation
from gpt3jax.data import index_cache, indexed

SPLITS = ("train", "validation", "test")
_INDEX_AT_ONCE = 1 << 16  # documents: what building an index needs stays in the CPU's cache
_READ_AT_ONCE = 1 << 17  # tokens: what a read needs besides its result stays in the CPU's cache


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


@dataclasses.dataclass(frozen=True)
class Epochs:
    """How often the documents of a split are repeated, and whether the last time is apart."""

    n: int
    last_is_separate: bool
    n_samples_before_last: int

    @classmethod
    def needed(cls, n_tokens: int, seq_len: int, n_samples: int | None) -> "Epochs":
        """Return what n_samples samples need; None asks for one epoch.

        The last epoch is shuffled apart if less than 80% of it will be used.
        """
        n = 1 if n_samples is None else max(1, -(-(n_samples * seq_len + 1) // n_tokens))
        if n == 1 or n_samples is None:
            return cls(1, False, 0)
        before_last = ((n - 1) * n_tokens - 1) // seq_len
        per_epoch = (n_tokens - 1) // seq_len
        return cls(n, n_samples - before_last < int(0.80 * per_epoch), before_last)


class Samples(Protocol):
    """Samples by number: of one corpus (`SampleMap`) or of a blend of them."""

    def __len__(self) -> int: ...

    def tokens(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens `[n, seq_len + 1]` int32 of samples, and how many of each are real."""


def build(
    corpus: indexed.Corpus,
    split: str,
    name: str,
    seq_len: int,
    n_samples: int | None,
    seed: int,
    keep_partial: bool = False,
    cache: str = "",
) -> "SampleMap | None":
    """Return the samples of a split by its name; None if it has no weight or none are wanted.

    The rest is as in `SampleMap`.

    Raises:
        UserError: the split has a weight but gets no document, or documents without a token.
            (Megatron aborts there, or never ends.)
    """
    bounds = split_bounds(split, len(corpus))[SPLITS.index(name)]
    if bounds is None or n_samples == 0:
        return None
    if bounds[0] == bounds[1]:
        raise errors.UserError(
            f"data.split={split!r} gives the {name} split none of the {len(corpus)} "
            f"documents of {corpus.prefix}: give it a larger weight, or 0 to leave it out"
        )
    return SampleMap(corpus, bounds, seq_len, n_samples, seed, keep_partial, cache)


class SampleMap:
    """The samples of one split of one corpus, in training order.

    Attributes:
        epochs: how often the documents are repeated.
        document_index: the documents (sequences of the corpus) in their order, int32.
        sample_index: `[n + 1, 2]`: where sample i of the flat run begins, as a place in
            document_index and an offset (tokens) in that document; int32, int64 where it must.
        shuffle_index: which sample of the flat run comes k-th, uint32, int64 where it must.
    """

    def __init__(
        self,
        corpus: indexed.Corpus,
        sequences: tuple[int, int],
        seq_len: int,
        n_samples: int | None,
        seed: int,
        keep_partial: bool = False,
        cache: str = "",
    ):
        """Build the indices.

        Args:
            corpus: where the tokens are.
            sequences: first and last + 1 of the corpus's sequences that belong to the split.
            seq_len: tokens of a sample; it reads one more for the last target.
            n_samples: how many will be used, which decides the epochs; None: one epoch.
            seed: of both shuffles.
            keep_partial: keep the last, partial sample, padded (Megatron's
                `drop_last_partial_validation_sequence` off).
            cache: folder that keeps the indices (`index_cache`); "": none.

        Raises:
            UserError: the sequences have no token.
        """
        self.corpus, self.seq_len = corpus, seq_len
        ids = np.arange(*sequences, dtype=np.int32)
        n_tokens = int(corpus.lengths[slice(*sequences)].sum(dtype=np.int64))
        if n_tokens == 0:
            raise errors.UserError(
                f"{corpus.prefix}: there is no token in documents {sequences[0]} to "
                f"{sequences[1]} (of {len(corpus)}): the corpus is too small for this split"
            )
        self.epochs = Epochs.needed(n_tokens, seq_len, n_samples)
        total = self.epochs.n * n_tokens
        n = _count_samples(total, seq_len, keep_partial)

        def build() -> index_cache.Arrays:
            random = np.random.RandomState(seed)  # both shuffles draw from it, in this order
            documents = _shuffled_documents(ids, self.epochs, random)
            return {
                "document_index": documents,
                "sample_index": self._build_sample_index(documents, n, total),
                "shuffle_index": _shuffled_samples(n, self.epochs, random),
            }

        def key() -> dict[str, Any]:
            return {
                "lengths": indexed.lengths_checksum(corpus),
                "sequences": sequences,
                "seq_len": seq_len,
                "n_samples": n,
                "epochs": dataclasses.astuple(self.epochs),
                "seed": seed,
            }

        indices = index_cache.arrays(cache, key, build)
        self.document_index = indices["document_index"]
        self.sample_index = indices["sample_index"]
        self.shuffle_index = indices["shuffle_index"]

    def _build_sample_index(self, documents: np.ndarray, n: int, total: int) -> np.ndarray:
        """Return where each of n samples begins, and where the last one ends.

        Block by block, so that besides the result it needs a few MiB, whatever the corpus.
        """
        longest = int(self.corpus.lengths.max())
        wide = max(len(documents), longest) > np.iinfo(np.int32).max
        index = np.empty((n + 1, 2), np.int64 if wide else np.int32)
        end, last = 0, (0, 0)
        for low in range(0, len(documents), _INDEX_AT_ONCE):
            block = documents[low : low + _INDEX_AT_ONCE].astype(np.intp)
            lengths = self.corpus.lengths.take(block, mode="clip")  # twice as fast as [block]
            ends = np.cumsum(lengths, dtype=np.int64)
            ends += end
            # Samples first...stop - 1 begin in this block; document i ends before number next_i.
            first, next_i = -(-end // self.seq_len), -(-ends // self.seq_len)
            end = int(ends[-1])
            stop = min(int(next_i[-1]), n + 1)
            places = np.cumsum(np.bincount(next_i - first)[: max(0, stop - first)])
            starts = np.arange(first, stop, dtype=np.int64) * self.seq_len
            index[first:stop, 0] = places + low
            index[first:stop, 1] = starts - (ends[places] - lengths[places])
            full = np.flatnonzero(lengths)
            if len(full):
                last = low + full[-1], lengths[full[-1]] - 1
        if n * self.seq_len >= total:  # the end of a partial sample
            index[n] = last
        return index

    def __len__(self) -> int:
        """Return how many samples there are, at least those asked for."""
        return len(self.shuffle_index)

    def tokens(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens `[n, seq_len + 1]` int32 of samples by number, and how many are real.

        Where a partial sample is kept, the rest of its row is 0.
        """
        out = np.zeros((len(numbers), self.seq_len + 1), np.int32)
        n_real = np.zeros(len(numbers), np.int64)
        n_rows = max(1, _READ_AT_ONCE // (self.seq_len + 1))
        for low in range(0, len(numbers), n_rows):
            rows = slice(low, low + n_rows)
            tokens, n_real[rows] = self._read(numbers[rows])
            if (n_real[rows] == self.seq_len + 1).all():
                out[rows] = tokens.reshape(-1, self.seq_len + 1)
            else:
                out[rows][np.arange(self.seq_len + 1) < n_real[rows, None]] = tokens
        return out, n_real

    def _read(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens of samples, one after another, and how many each has.

        A sample is made of pieces: the end of a document, whole ones, the start of another.
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


def read(source: Samples, data: schema.Data, numbers: np.ndarray) -> dict[str, np.ndarray]:
    """Return samples by number as arrays `[n, T]`: tokens, targets, loss_mask, positions.

    With `data.reset_attention_mask` also segments.
    """
    tokens, n_real = source.tokens(numbers)
    inputs = tokens[:, :-1]
    mask, positions, segments = end_of_document_effects(inputs, data)
    mask[np.arange(inputs.shape[1]) >= n_real[:, None] - 1] = 0  # a padded sample's rest
    batch = {
        "tokens": inputs,
        "targets": tokens[:, 1:],
        "loss_mask": mask,
        "positions": positions,
    }
    return batch if segments is None else batch | {"segments": segments}


def _count_samples(n_tokens: int, seq_len: int, keep_partial: bool) -> int:
    if keep_partial:  # in 32-bit floats, as Megatron does
        return int(np.ceil(np.float32(n_tokens - 1) / np.float32(seq_len)))
    return (n_tokens - 1) // seq_len


def _shuffled_documents(ids: np.ndarray, epochs: Epochs, random: Any) -> np.ndarray:
    def shuffled(n: int) -> np.ndarray:
        documents = np.tile(ids, n)
        random.shuffle(documents)
        return documents

    if not epochs.last_is_separate:
        return shuffled(epochs.n)
    return np.concatenate([shuffled(epochs.n - 1), shuffled(1)])


def _shuffled_samples(n: int, epochs: Epochs, random: Any) -> np.ndarray:
    dtype = np.int64 if n >= np.iinfo(np.uint32).max - 1 else np.uint32
    first = epochs.n_samples_before_last if epochs.last_is_separate else n
    parts = [np.arange(first, dtype=dtype), np.arange(first, n, dtype=dtype)]
    for part in parts if first != n else parts[:1]:
        random.shuffle(part)
    return np.concatenate(parts)


def end_of_document_effects(
    tokens_BT: np.ndarray, data: schema.Data
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Return loss mask, positions and segments of input tokens `[B, T]`.

    Loss mask: float32, 0 at inputs that end a document (`eod_mask_loss`). Positions: int32,
    starting anew behind each (`reset_position_ids`). Segments: int32, equal where tokens may see
    each other (`reset_attention_mask`), else None. An end-of-document token is its document's.
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
