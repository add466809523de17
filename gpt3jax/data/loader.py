"""From sample numbers to batches on the devices, through Grain.

What comes next depends on the number of consumed samples alone: batch k is a range of consecutive
sample numbers, and each process reads its own rows of it. Grain reads ahead in background threads;
it holds no state that a checkpoint would need. The only file that imports Grain.
"""

import bisect
import dataclasses
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
    """The samples of a run, and what decides their order."""

    train: samples.SampleMap
    validation: samples.SampleMap | None
    test: samples.SampleMap | None
    order: dict[str, Any]
    told: str


def open_splits(
    cfg: config.Config, schedule: batch_schedule.BatchSchedule, n_steps: int, n_samples: int
) -> Splits:
    """Map the corpus to the samples of a run of n_steps steps and n_samples training samples.

    Raises:
        UserError: files that are missing or damaged, tokens beyond the vocabulary, or a split
            without a single sample; it names file and fix.
    """
    raise SystemError


@dataclasses.dataclass(frozen=True)
class Batches:
    """A Grain source: element k is this process's rows of batch k, as NumPy `[M, rows, ...]`."""

    source: samples.SampleMap
    data: config.Data
    runs: tuple[batch_schedule.Stretch, ...]
    n_rows: int  # of a microbatch, over all processes
    rows: np.ndarray  # this process's

    def __len__(self) -> int:
        return self.runs[-1].first_step + self.runs[-1].n_steps if self.runs else 0

    def __getitem__(self, k: int) -> dict[str, np.ndarray]:
        run = self.runs[bisect.bisect_right([r.first_step for r in self.runs], k) - 1]
        first = run.first_sample + (k - run.first_step) * run.size
        microbatch_starts = first + self.n_rows * np.arange(run.size // self.n_rows)
        numbers = microbatch_starts[:, None] + self.rows
        return read(self.source, self.data, numbers)
