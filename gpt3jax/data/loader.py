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
from gpt3jax.data import blend, indexed, samples, text

READ_THREADS = 2  # more are slower: a batch is one gather from the page cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class Splits:
    """The samples of a run, what decides their order, and a line about them."""

    train: samples.Samples
    validation: samples.Samples | None
    test: samples.Samples | None
    order: dict[str, Any]
    told: str


def open_splits(cfg: config.Config, n_steps: int, n_samples: int) -> Splits:
    """Map the corpus to the samples of a run of n_steps steps and n_samples training samples.

    Raises:
        UserError: files that are missing or damaged, or a split without documents or samples.
    """
    data, train = cfg.data, cfg.train
    text.check_vocabulary(data, cfg.model)
    prefixes, weights = blend.parse(data.paths)
    corpora = [indexed.IndexedCorpus(prefix) for prefix in prefixes]
    eval_size = train.eval_batches * cfg.batch.global_batch_size
    n_evals = n_steps // train.eval_interval + 1 if train.eval_interval else 0
    wanted = [n_samples, n_evals * eval_size, eval_size if n_evals else 0]
    maps = []
    for name, n in zip(samples.SPLITS, wanted, strict=True):
        maps.append(
            blend.build(corpora, weights, data.split, name, cfg.model.seq_len, n, train.seed)
        )
        if maps[-1] is not None and len(maps[-1]) < n:  # unweighted blends are read once only
            raise config.UserError(
                f"the run needs {n} {name} samples and {' '.join(data.paths)} has "
                f"{len(maps[-1])}: give each prefix a weight, or shorten the run"
            )
    if maps[0] is None:
        raise config.UserError(f"data.split={data.split!r} leaves nothing to train on")
    parts = maps[0].maps if isinstance(maps[0], blend.Blend) else [maps[0]]
    n_epochs = ", ".join(str(part.epochs.n) for part in parts)
    return Splits(
        train=maps[0],
        validation=maps[1],
        test=maps[2],
        order={
            "corpus": [_identity(corpus) for corpus in corpora],
            "blend weights": weights,
            "data.split": data.split,
            "model.seq_len": cfg.model.seq_len,
            "train.seed": train.seed,
            "epochs (from the length of the run)": n_epochs,
            "last epoch shuffled apart": [part.epochs.last_is_separate for part in parts],
        },
        told=f"{sum(c.n_tokens for c in corpora):,} tokens in {sum(map(len, corpora)):,} documents "
        f"of {' '.join(data.paths)}, {n_epochs} epoch(s), unigram entropy "
        f"{text.unigram_entropy(corpora[0]):.3f} nats{' (of the first)' * (len(corpora) > 1)}",
    )


def _identity(corpus: indexed.IndexedCorpus) -> str:
    """Return what tells a corpus from another, wherever its files lie."""
    checksum = zlib.crc32(corpus.lengths.tobytes())
    return f"{len(corpus)} sequences, {corpus.n_tokens} tokens, lengths {checksum:08x}"


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
    source: samples.Samples,
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

    source: samples.Samples
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
            token = lowest if lowest < 0 else highest
            files = " or ".join(f"{prefix}.bin" for prefix in blend.parse(self.cfg.data.paths)[0])
            raise config.UserError(
                f"{files} has token {token} "
                f"(in the batch from sample {first} on), outside of "
                f"model.vocab_size={self.cfg.model.vocab_size}: is it tokenised for this model?"
            )
