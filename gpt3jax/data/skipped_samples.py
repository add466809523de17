"""Stretches of the training stream that a run skips, as OPT and PaLM did after loss spikes.

A position stays one number: the samples of the stream before it, skipped ones included. Batches are
cut from the samples that are kept, so a batch that reaches a stretch goes on after it.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy import typing as npt

from gpt3jax import errors
from gpt3jax.config import batch_schedule, schema, validation

_PAGE = "numerical_faults.md#leaving-data-out"


@dataclasses.dataclass(frozen=True)
class Stream:
    """The training stream without some stretches; the other samples are kept."""

    left_out: tuple[tuple[int, int], ...] = ()
    """(first, stop) of each stretch, in order, with samples between them."""

    def n_kept(self, position: int) -> int:
        """Return how many samples before a position are kept."""
        return position - sum(max(0, min(position, b) - a) for a, b in self.left_out)

    def numbers(self, kept: npt.ArrayLike) -> np.ndarray:
        """Return the numbers in the stream of kept samples, which are counted from 0."""
        numbers = np.asarray(kept, np.int64)
        for first, stop in self.left_out:
            numbers = numbers + (numbers >= first) * (stop - first)
        return numbers

    def position(self, n_kept: int) -> int:
        """Return the position right after so many kept samples, before any stretch that follows."""
        return int(self.numbers(n_kept - 1)) + 1 if n_kept else 0

    def schedule(self, schedule: batch_schedule.BatchSchedule) -> batch_schedule.BatchSchedule:
        """Return the batch schedule over the kept samples; sizes follow the position."""
        stages = {self.n_kept(first): size for first, size in schedule.stages}
        return batch_schedule.BatchSchedule(tuple(stages.items()))

    def end(
        self, schedule: batch_schedule.BatchSchedule, step: int, position: int, limit: int
    ) -> tuple[int, int]:
        """Return (steps, position) after the last batch that ends at or before `limit`.

        The run goes on from `step` and `position`. Without stretches a batch ends at `limit`; with
        stretches, less than a batch may be left over.
        """
        batches, first, last = self.schedule(schedule), self.n_kept(position), self.n_kept(limit)
        n_steps = batches.n_steps(last, first)
        if n_steps and batches.consumed_after(n_steps, first) > last:
            n_steps -= 1
        after = self.position(batches.consumed_after(n_steps, first)) if n_steps else position
        return step + n_steps, after


WHOLE = Stream()


def from_config(data: schema.Data) -> Stream:
    """Return the stream of a config; stretches that touch or overlap become one.

    Raises:
        UserError: a stretch that is not A:B with A < B.
    """
    merged: list[tuple[int, int]] = []
    for first, stop in sorted(map(validation.stretch, data.skip_samples)):
        if merged and first <= merged[-1][1]:
            first, stop = merged[-1][0], max(stop, merged.pop()[1])
        merged.append((first, stop))
    return Stream(tuple(merged))


def run_length(
    cfg: schema.Config, schedule: batch_schedule.BatchSchedule, step: int = 0, position: int = 0
) -> tuple[int, int]:
    """Return the (steps, samples) of a run that goes on from here: its schedules and order follow.

    The end depends on the start, because the batch size may have been different before. A run that
    skips samples has the length that it would have without skipping, from the first step on.
    """
    since = (0, 0) if cfg.data.skip_samples else (step, position)
    return schedule.end(cfg.train, cfg.model.seq_len, *since)


def check(stream: Stream, schedule: batch_schedule.BatchSchedule, n_samples: int) -> None:
    """Check that the stretches lie in a run of so many samples, and leave at least one batch of it.

    Raises:
        UserError: they do not; the message names the stretch.
    """
    for first, stop in stream.left_out:
        if first >= n_samples:
            raise errors.UserError(
                f"data.skip_samples={first}:{stop} lies beyond the run's {n_samples} samples and "
                "has no effect: correct it, or leave it out",
                page=_PAGE,
            )
    if stream.left_out and not stream.end(schedule, 0, 0, n_samples)[0]:
        raise errors.UserError(
            f"data.skip_samples leaves {stream.n_kept(n_samples)} of the run's {n_samples} "
            "samples, less than one batch: leave out fewer",
            page=_PAGE,
        )


def check_resumed(stream: Stream, skipped: Sequence[str] | None, position: int) -> None:
    """Check that a run still skips what it `skipped` before a position (its `data.skip_samples`).

    Otherwise the length of the rest of the run would change.

    Raises:
        UserError: it does not; the message names the stretch.
    """
    for first, stop in map(validation.stretch, skipped or ()):
        stop = min(stop, position)
        if first < stop and stream.n_kept(stop) > stream.n_kept(first):
            raise errors.UserError(
                f"the checkpoint's run left out samples {first} to {stop - 1}: keep them in "
                "data.skip_samples until its end (stretches may be added)",
                page=_PAGE,
            )
