"""From sample numbers to batches on the devices, through Grain; the only file that imports Grain.

The next batch depends on the number of consumed samples alone: batch k is a range of consecutive
sample numbers, and each process reads its own rows of it. Grain reads ahead in background threads
and holds no state that a checkpoint would need.
"""

import bisect
import dataclasses
import math
from collections.abc import Iterator

import grain
import jax
import numpy as np

from gpt3jax import errors
from gpt3jax.config import batch_schedule, schema
from gpt3jax.data import blend, global_batch, samples, skipped_samples, splits


def train_batches(
    parts: splits.Splits,
    cfg: schema.Config,
    schedule: batch_schedule.BatchSchedule,
    mesh: jax.sharding.Mesh,
    start: int,
    end: int,
) -> Iterator[tuple[global_batch.Batch, int, int]]:
    """Yield (batch, size, end) of each batch of samples start...end - 1, on the devices.

    `end` is the position after the batch, in samples consumed or skipped.
    """
    stream = skipped_samples.from_config(cfg.data)
    stretches = stream.schedule(schedule).runs(stream.n_kept(start), stream.n_kept(end))
    batches = _batches(parts.train, cfg, mesh, stretches, stream)
    ends = (
        (s.size, s.first_sample + (i + 1) * s.size) for s in stretches for i in range(s.n_steps)
    )
    for batch, (size, n_kept) in zip(batches, ends, strict=True):
        yield batch, size, stream.position(n_kept)


def eval_batches(
    parts: splits.Splits,
    cfg: schema.Config,
    mesh: jax.sharding.Mesh,
    split: str,
    n_evals_before: int,
) -> Iterator[global_batch.Batch] | None:
    """Yield the batches of one evaluation; each evaluation of a run reads new samples.

    None if the split has no samples.
    """
    source = parts.validation if split == "validation" else parts.test
    if source is None:
        return None
    size, n = cfg.batch.global_batch_size, cfg.train.eval_batches
    start = n_evals_before * n * size if split == "validation" else 0
    return _batches(source, cfg, mesh, (batch_schedule.Stretch(0, start, size, n),))


def _batches(
    source: samples.Samples,
    cfg: schema.Config,
    mesh: jax.sharding.Mesh,
    stretches: tuple[batch_schedule.Stretch, ...],
    stream: skipped_samples.Stream = skipped_samples.WHOLE,
) -> Iterator[global_batch.Batch]:
    # An evaluation's batch may divide into smaller microbatches than that of a step.
    n_rows = math.gcd(global_batch.rows_per_microbatch(cfg, mesh), *(s.size for s in stretches))
    rows = global_batch.local_rows(mesh, n_rows)
    batches = Batches(source, cfg, stretches, n_rows, rows, stream)
    threads = cfg.data.read_threads if cfg.data.prefetch else 0
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=cfg.data.prefetch)
    for local in grain.MapDataset.source(batches).to_iter_dataset(options):
        yield global_batch.device_put_rows(local, mesh, n_rows)


@dataclasses.dataclass(frozen=True)
class Batches:
    """A Grain source: element k is this process's rows of batch k, as NumPy `[M, rows, ...]`."""

    source: samples.Samples
    cfg: schema.Config
    stretches: tuple[batch_schedule.Stretch, ...]
    n_rows: int  # of a microbatch, over all processes
    rows: np.ndarray  # those of this process
    stream: skipped_samples.Stream = skipped_samples.WHOLE

    def __len__(self) -> int:
        return sum(s.n_steps for s in self.stretches)

    def __getitem__(self, k: int) -> dict[str, np.ndarray]:
        first_steps = [s.first_step for s in self.stretches]
        s = self.stretches[bisect.bisect_right(first_steps, k) - 1]
        first = s.first_sample + (k - s.first_step) * s.size
        kept = first + np.arange(0, s.size, self.n_rows)[:, None] + self.rows
        numbers = self.stream.numbers(kept)
        batch = samples.read(self.source, self.cfg.data, numbers.ravel())
        self._check_tokens(batch, int(self.stream.numbers(first)))
        rows = {k: v.reshape(*numbers.shape, *v.shape[1:]) for k, v in batch.items()}
        return rows | {"samples": numbers.astype(np.int32)}

    def _check_tokens(self, batch: dict[str, np.ndarray], first: int) -> None:
        highest = max(int(batch["tokens"].max()), int(batch["targets"].max()))
        lowest = min(int(batch["tokens"].min()), int(batch["targets"].min()))
        if lowest < 0 or highest >= self.cfg.model.vocab_size:
            token = lowest if lowest < 0 else highest
            data = self.cfg.data
            words = data.paths or data.train_paths + data.validation_paths + data.test_paths
            files = " or ".join(f"{prefix}.bin" for prefix in blend.parse(words)[0])
            raise errors.UserError(
                f"{files} has token {token} "
                f"(in the batch from sample {first} on), outside of "
                f"model.vocab_size={self.cfg.model.vocab_size}: is it tokenised for this model?",
                page="data.md#when-data-is-refused",
            )
