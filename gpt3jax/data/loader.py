"""From sample numbers to batches on the devices, through Grain; the only file that imports it.

What comes next depends on the number of consumed samples alone: batch k is a range of consecutive
sample numbers, and each process reads its own rows of it. Grain reads ahead in background threads;
it holds no state that a checkpoint would need.
"""

import bisect
import dataclasses
import zlib
from collections.abc import Iterator
from typing import Any

import grain
import jax
import numpy as np

from gpt3jax import batch_schedule, config, sharding
from gpt3jax.data import indexed, samples, text

READ_THREADS = 2  # more are slower: a batch is one gather from the page cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class Splits:
    """The samples of a run, what decides their order, and a line about them."""

    train: samples.SampleMap
    validation: samples.SampleMap | None
    test: samples.SampleMap | None
    order: dict[str, Any]
    told: str


def open_splits(cfg: config.Config, n_steps: int, n_samples: int) -> Splits:
    """Map the corpus to the samples of a run of n_steps steps and n_samples training samples.

    Raises:
        UserError: files that are missing or damaged, or a split without documents or samples.
    """
    data, train = cfg.data, cfg.train
    text.check_vocabulary(data, cfg.model)
    corpus = indexed.IndexedCorpus(data.paths[0])
    eval_size = train.eval_batches * cfg.batch.global_batch_size
    n_evals = n_steps // train.eval_interval + 1 if train.eval_interval else 0
    wanted = [n_samples, n_evals * eval_size, eval_size if n_evals else 0]
    maps = [
        _open_split(cfg, corpus, name, bounds, n)
        for name, bounds, n in zip(
            samples.SPLITS, samples.split_bounds(data.split, len(corpus)), wanted, strict=True
        )
    ]
    if maps[0] is None:
        raise config.UserError(f"data.split={data.split!r} leaves nothing to train on")
    epochs = maps[0].epochs
    return Splits(
        train=maps[0],
        validation=maps[1],
        test=maps[2],
        order={
            "corpus": f"{len(corpus)} sequences, {corpus.n_tokens} tokens, "
            f"crc32 {zlib.crc32(corpus.lengths.tobytes()):08x} of their lengths",
            "data.split": data.split,
            "model.seq_len": cfg.model.seq_len,
            "train.seed": train.seed,
            "epochs (from the length of the run)": epochs.n,
            "last epoch shuffled apart": epochs.last_is_separate,
        },
        told=f"{corpus.n_tokens:,} tokens in {len(corpus):,} documents of {data.paths[0]}, "
        f"{epochs.n} epoch(s), unigram entropy {text.unigram_entropy(corpus):.3f} nats",
    )


def _open_split(
    cfg: config.Config,
    corpus: indexed.IndexedCorpus,
    name: str,
    bounds: tuple[int, int] | None,
    n_samples: int,
) -> samples.SampleMap | None:
    if bounds is None or n_samples == 0:
        return None
    if bounds[0] == bounds[1]:
        raise config.UserError(
            f"data.split={cfg.data.split!r} gives the {name} split none of the {len(corpus)} "
            f"documents of {corpus.prefix}: give it a larger weight, or 0 to leave it out"
        )
    return samples.SampleMap(corpus, bounds, cfg.model.seq_len, n_samples, cfg.train.seed)


def train_batches(
    splits: Splits,
    cfg: config.Config,
    schedule: batch_schedule.BatchSchedule,
    mesh: jax.sharding.Mesh,
    start: int,
    end: int,
) -> Iterator[tuple[dict[str, jax.Array], int]]:
    """Yield each batch of samples start...end - 1, on the devices, and its size."""
    stretches = schedule.runs(start, end)
    sizes = (s.size for s in stretches for _ in range(s.n_steps))
    return zip(_batches(splits.train, cfg, mesh, stretches), sizes, strict=True)


def eval_batches(
    splits: Splits, cfg: config.Config, mesh: jax.sharding.Mesh, split: str, n_evals_before: int
) -> Iterator[dict[str, jax.Array]] | None:
    """Yield the batches of one evaluation; each evaluation goes on to new samples.

    None where the split has no weight.
    """
    source = splits.validation if split == "validation" else splits.test
    if source is None:
        return None
    size, n = cfg.batch.global_batch_size, cfg.train.eval_batches
    start = n_evals_before * n * size if split == "validation" else 0
    return _batches(source, cfg, mesh, (batch_schedule.Stretch(0, start, size, n),))


def _batches(
    source: samples.SampleMap,
    cfg: config.Config,
    mesh: jax.sharding.Mesh,
    stretches: tuple[batch_schedule.Stretch, ...],
) -> Iterator[dict[str, jax.Array]]:
    n_rows = cfg.batch.microbatch_size * sharding.data_parallel_size(mesh)
    rows = sharding.local_rows(mesh, n_rows)
    batches = Batches(source, cfg, stretches, n_rows, rows)
    threads = READ_THREADS if cfg.data.prefetch else 0
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=cfg.data.prefetch)
    for local in grain.MapDataset.source(batches).to_iter_dataset(options):
        yield sharding.device_put_rows(local, mesh, n_rows)


@dataclasses.dataclass(frozen=True)
class Batches:
    """A Grain source: element k is this process's rows of batch k, as NumPy `[M, rows, ...]`."""

    source: samples.SampleMap
    cfg: config.Config
    stretches: tuple[batch_schedule.Stretch, ...]
    n_rows: int  # of a microbatch, over all processes
    rows: np.ndarray  # this process's

    def __len__(self) -> int:
        return sum(s.n_steps for s in self.stretches)

    def __getitem__(self, k: int) -> dict[str, np.ndarray]:
        first_steps = [s.first_step for s in self.stretches]
        s = self.stretches[bisect.bisect_right(first_steps, k) - 1]
        first = s.first_sample + (k - s.first_step) * s.size
        numbers = first + np.arange(0, s.size, self.n_rows)[:, None] + self.rows
        batch = samples.read(self.source, self.cfg.data, numbers.ravel())
        self._check_tokens(batch, first)
        cut = {k: v.reshape(*numbers.shape, *v.shape[1:]) for k, v in batch.items()}
        return cut | {"samples": numbers.astype(np.int32)}

    def _check_tokens(self, batch: dict[str, np.ndarray], first: int) -> None:
        highest = max(int(batch["tokens"].max()), int(batch["targets"].max()))
        lowest = min(int(batch["tokens"].min()), int(batch["targets"].min()))
        if lowest < 0 or highest >= self.cfg.model.vocab_size:
            raise config.UserError(
                f"{self.source.corpus.prefix}.bin has token {lowest if lowest < 0 else highest} "
                f"(in the batch from sample {first} on), outside of "
                f"model.vocab_size={self.cfg.model.vocab_size}: is it tokenised for this model?"
            )
