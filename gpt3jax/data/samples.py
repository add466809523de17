"""Which tokens make sample k: Megatron's GPTDataset, index for index.

The documents of a split are repeated for as many epochs as the samples asked for need, shuffled,
and read as one flat run of tokens; sample i of the flat run is tokens [i S, i S + S]; a second
shuffle says which of them comes k-th. Source: Megatron-LM `gpt_dataset.py` and `helpers.cpp` at
d98e8a64dd. NumPy's legacy RandomState is what makes the order equal.
"""

import dataclasses
import re
from typing import Any

import numpy as np

from gpt3jax import config
from gpt3jax.data import indexed

SPLITS = ("train", "validation", "test")


def split_bounds(split: str, n: int) -> list[tuple[int, int] | None]:
    """Return the range of sequences of each split; None where a split has no weight.

    Raises:
        UserError: the weights are not numbers, or all 0.
    """
    weights = [float(x) for x in re.findall(r"[.0-9]+", split)]
    weights = [*weights, 0.0, 0.0, 0.0][:3] if len(weights) <= 3 else []
    if not weights or sum(weights) <= 0:
        raise config.UserError(
            f'data.split={split!r} must be up to three weights, not all 0, like "949,50,1"'
        )
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


class SampleMap:
    """The samples of one split of one corpus, in training order."""

    def __init__(
        self,
        corpus: indexed.IndexedCorpus,
        sequences: tuple[int, int],
        seq_len: int,
        n_samples: int | None,
        seed: int,
        keep_partial: bool = False,
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
        """
        self.corpus, self.seq_len = corpus, seq_len
        ids = np.arange(*sequences, dtype=np.int32)
        n_tokens = int(corpus.lengths[ids[0] : ids[-1] + 1].sum(dtype=np.int64)) if len(ids) else 0
        if n_tokens == 0:
            raise config.UserError(f"{corpus.prefix}: sequences {sequences} have no tokens")
        self.epochs = Epochs.needed(n_tokens, seq_len, n_samples)
        random = np.random.RandomState(seed)
        self.document_index = _shuffled_documents(ids, self.epochs, random)
        total = self.epochs.n * n_tokens
        n = (total - 1) // seq_len
        if keep_partial:  # in 32-bit floats, as there
            n = int(np.ceil(np.float32(total - 1) / np.float32(seq_len)))
        self.sample_index = self._build_sample_index(n, total)
        self.shuffle_index = _shuffled_samples(n, self.epochs, random)

    def _build_sample_index(self, n: int, total: int) -> np.ndarray:
        """Return `[n + 1, 2]`: place in document_index, and offset in it, of each sample's start.

        Memory: 8 bytes for each repeated document and 16 to 24 for each sample, while it runs.
        """
        lengths = self.corpus.lengths[self.document_index]
        ends = np.cumsum(lengths, dtype=np.int64)
        flat = np.arange(n + 1, dtype=np.int64) * self.seq_len
        flat[-1] = min(flat[-1], total - 1)
        places = np.searchsorted(ends, flat, side="right")
        offsets = flat - (ends[places] - lengths[places])
        wide = max(len(self.document_index), int(lengths.max())) > np.iinfo(np.int32).max
        return np.stack([places, offsets], axis=1).astype(np.int64 if wide else np.int32)

    def __len__(self) -> int:
        """Return how many samples there are, at least those asked for if tokens suffice."""
        return len(self.shuffle_index)

    def tokens(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens `[n, seq_len + 1]` int32 of samples by number, and how many are real.

        Where a partial sample is kept, the rest of its row is 0.
        """
        out = np.zeros((len(numbers), self.seq_len + 1), np.int32)
        n_real = np.zeros(len(numbers), np.int64)
        flat, starts = self.corpus.tokens, self.corpus.starts
        lengths, documents = self.corpus.lengths, self.document_index
        for row, k in enumerate(self.shuffle_index[numbers].tolist()):
            (place, offset), (last, last_offset) = self.sample_index[k : k + 2].tolist()
            filled = 0
            while place <= last:
                document = documents[place]
                stop = last_offset + 1 if place == last else lengths[document]
                start = starts[document]
                piece = flat[start + offset : start + stop]
                out[row, filled : filled + len(piece)] = piece
                filled, place, offset = filled + len(piece), place + 1, 0
            n_real[row] = filled
        return out, n_real


def read(source: SampleMap, data: config.Data, numbers: np.ndarray) -> dict[str, np.ndarray]:
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
    tokens_BT: np.ndarray, data: config.Data
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
