"""Stretches of the training stream that a run leaves out, as OPT and PaLM did after spikes.

A position stays one number: the samples of the stream before it, those left out included. Batches
are cut from what is left, so one that reaches a stretch goes on behind it.
"""

import dataclasses
from typing import Any

import numpy as np

from gpt3jax import errors
from gpt3jax.config import batch_schedule, schema, validation


@dataclasses.dataclass(frozen=True)
class Stream:
    """The training stream without some stretches; samples that are left are `taken`."""

    left_out: tuple[tuple[int, int], ...] = ()
    """(first, stop) of each stretch, in order and apart from each other."""

    def taken(self, position: int) -> int:
        """Return how many samples before a position are not left out."""
        return position - sum(max(0, min(position, b) - a) for a, b in self.left_out)

    def numbers(self, taken: Any) -> Any:
        """Return the numbers in the stream of taken samples, which are counted from 0."""
        numbers = np.asarray(taken, np.int64)
        for first, stop in self.left_out:
            numbers = numbers + (numbers >= first) * (stop - first)
        return numbers

    def position(self, taken: int) -> int:
        """Return the position right after so many samples; a stretch that follows is ahead."""
        return int(self.numbers(taken - 1)) + 1 if taken else 0

    def schedule(self, schedule: batch_schedule.BatchSchedule) -> batch_schedule.BatchSchedule:
        """Return the batch schedule over the samples taken; sizes follow the position."""
        stages = {self.taken(first): size for first, size in schedule.stages}
        return batch_schedule.BatchSchedule(tuple(stages.items()))

    def end(
        self, schedule: batch_schedule.BatchSchedule, step: int, position: int, limit: int
    ) -> tuple[int, int]:
        """Return (steps, position) after the last batch that ends at or before `limit`.

        It goes on from `step` and `position`. Without stretches `limit` is where a batch ends; with
        them, less than a batch may be left over.
        """
        batches, first, last = self.schedule(schedule), self.taken(position), self.taken(limit)
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
    """Return the (steps, samples) of a run that goes on from here: what schedules and order follow.

    Its end depends on the start, because the batch size may have been another one before. Where
    samples are left out, it is as if they were not: then from the first step on.
    """
    since = (0, 0) if cfg.data.skip_samples else (step, position)
    return schedule.end(cfg.train, cfg.model.seq_len, *since)


def check(stream: Stream, schedule: batch_schedule.BatchSchedule, n_samples: int) -> None:
    """Check that stretches lie in a run of so many samples and leave something of it.

    Raises:
        UserError: it names the stretch.
    """
    for first, stop in stream.left_out:
        if first >= n_samples:
            raise errors.UserError(
                f"data.skip_samples={first}:{stop} lies beyond the run's {n_samples} samples and "
                "has no effect: correct it, or leave it out"
            )
    if stream.left_out and not stream.end(schedule, 0, 0, n_samples)[0]:
        raise errors.UserError(
            f"data.skip_samples leaves {stream.taken(n_samples)} of the run's {n_samples} samples, "
            "less than one batch: leave out fewer"
        )


def check_resumed(stream: Stream, before: Any, position: int) -> None:
    """Check that what a run left out `before` a position (its `data.skip_samples`) stays so.

    Else the length of the rest of the run would change.

    Raises:
        UserError: it names the stretch.
    """
    for first, stop in map(validation.stretch, before or ()):
        stop = min(stop, position)
        if first < stop and stream.taken(stop) > stream.taken(first):
            raise errors.UserError(
                f"the checkpoint's run left out samples {first} to {stop - 1}: keep them in "
                "data.skip_samples until its end (stretches may be added)"
            )
