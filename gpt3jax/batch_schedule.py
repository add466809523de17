"""How many sequences each step takes: a function of the samples consumed, and of nothing else.

Two ways to grow a batch: Megatron's step schedule ("0:16 2.4B:320", thresholds in tokens) and its
older linear ramp, the GPT-3 paper's. Both become stages here; `batch.global_batch_size` caps them.
Source: Megatron-LM `num_microbatches_calculator.py` at d98e8a64dd, the ramp at 0b9bc2088b.
"""

import bisect
import dataclasses
import math

from gpt3jax import config

_UNITS = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Consecutive steps of one batch size; numbers count from where the walk started."""

    first_step: int
    first_sample: int
    size: int
    n_steps: int


@dataclasses.dataclass(frozen=True)
class BatchSchedule:
    """Stages of (first sample, sequences per step), by first sample; the first one starts at 0."""

    stages: tuple[tuple[int, int], ...]

    def size(self, consumed_samples: int) -> int:
        """Return the size of the batch that comes after so many samples."""
        starts = [start for start, _ in self.stages]
        return self.stages[bisect.bisect_right(starts, consumed_samples) - 1][1]

    def stretches(self, start: int, end: int) -> tuple[Stretch, ...]:
        """Return the steps from sample `start` until `end` is reached, whole batches only.

        The last batch is the last one that starts before `end`.
        """
        found: list[Stretch] = []
        step, sample = 0, start
        bounds = [begin for begin, _ in self.stages[1:]] + [end]
        for (_, size), bound in zip(self.stages, bounds, strict=True):
            n_steps = -(-(min(bound, end) - sample) // size)
            if n_steps > 0:
                found.append(Stretch(step, sample, size, n_steps))
                step, sample = step + n_steps, sample + n_steps * size
        return tuple(found)

    def n_steps(self, end: int) -> int:
        """Return the steps from the first sample until `end` is reached."""
        return sum(s.n_steps for s in self.stretches(0, end))

    def consumed_after(self, n_steps: int) -> int:
        """Return the samples that the first n_steps steps consume."""
        beyond = self.stages[-1][0] + (n_steps + 1) * self.stages[-1][1]
        for s in self.stretches(0, beyond):
            if s.first_step + s.n_steps >= n_steps:
                return s.first_sample + (n_steps - s.first_step) * s.size
        raise AssertionError(n_steps)

    def end_samples(self, train: config.Train, seq_len: int) -> int:
        """Return the samples consumed at the end of the run: where the first limit is reached.

        A limit in samples or tokens is overshot by less than a batch, for batches are whole.
        """
        ends = []
        if train.n_steps:
            ends.append(self.consumed_after(train.n_steps))
        for limit in (train.n_samples, -(-train.n_tokens // seq_len)):
            if limit:
                ends.append(self.consumed_after(self.n_steps(limit)))
        return min(ends)


def from_config(batch: config.Batch, seq_len: int) -> BatchSchedule:
    """Return the schedule of a config.

    Raises:
        UserError: a schedule or ramp that is malformed, shrinks, or stops below global_batch_size.
    """
    full = batch.global_batch_size
    if batch.ramp:
        return _ramp(batch.ramp, full)
    if not batch.schedule:
        return BatchSchedule(((0, full),))
    stages = parse(batch.schedule, seq_len)
    if stages[-1][1] < full:
        raise config.UserError(
            f"batch.schedule={batch.schedule!r} ends at {stages[-1][1]}, below "
            f"batch.global_batch_size={full}: make its last size {full}"
        )
    capped = [(start, min(size, full)) for start, size in stages]
    return BatchSchedule(tuple(s for i, s in enumerate(capped) if not i or capped[i - 1][1] < s[1]))


def parse(text: str, seq_len: int) -> list[tuple[int, int]]:
    """Return (first sample, size) of each "TOKENS:SIZE" of a step schedule, sorted."""

    def fail(why: str) -> config.UserError:
        return config.UserError(f'batch.schedule={text!r}: {why}; write it like "0:16 2.4B:320"')

    stages = []
    for entry in text.replace(",", " ").split():
        threshold, colon, size = entry.partition(":")
        if not colon:
            raise fail(f"{entry!r} is not TOKENS:SIZE")
        try:
            stages.append((_number(threshold) // seq_len, _number(size)))
        except ValueError:
            raise fail(f"{entry!r} does not have numbers on both sides") from None
    stages.sort()
    if not stages or stages[0][0] != 0:
        raise fail("its first threshold must be 0")
    for (a, small), (b, large) in zip(stages, stages[1:], strict=False):
        if a == b:
            raise fail(f"two sizes start at sample {a}")
        if large < small:
            raise fail(f"the batch shrinks from {small} to {large}")
    if stages[0][1] < 1:
        raise fail(f"size {stages[0][1]} is not positive")
    return stages


def _number(text: str) -> int:
    unit = text[-1:].upper()
    scaled = float(text[:-1]) * _UNITS[unit] if unit in _UNITS else float(text)
    if not math.isfinite(scaled):
        raise ValueError(text)
    return int(scaled)


def _ramp(ramp: tuple[int, ...], full: int) -> BatchSchedule:
    if len(ramp) != 3 or ramp[0] < 1 or ramp[1] < 1 or ramp[2] < 1:
        raise config.UserError(
            f"batch.ramp={ramp} must be three positive numbers: start size, increment, samples"
        )
    start, increment, samples = ramp
    if start >= full:  # a smaller batch asked for on the command line
        return BatchSchedule(((0, full),))
    if (full - start) % increment:
        raise config.UserError(
            f"batch.ramp={ramp}: increments of {increment} do not lead from {start} to "
            f"batch.global_batch_size={full}: use a divisor of {full - start}"
        )
    n = (full - start) // increment
    per_increment = samples / n

    def first_sample(i: int) -> int:
        """Return the first s with floor(s / per_increment) >= i, in Megatron's floats."""
        near = math.floor(i * per_increment)
        return next(s for s in range(max(0, near - 1), near + 3) if s / per_increment >= i)

    return BatchSchedule(tuple((first_sample(i), start + i * increment) for i in range(n + 1)))


def check(schedule: BatchSchedule, microbatch_size: int, data_parallel_size: int) -> None:
    """Raise a UserError if a stage cannot be cut into microbatches for every rank."""
    unit = microbatch_size * data_parallel_size
    for start, size in schedule.stages:
        if size % unit:
            raise config.UserError(
                f"a batch of {size} sequences (from sample {start} on) is not divisible by "
                f"batch.microbatch_size={microbatch_size} x {data_parallel_size} data-parallel "
                f"ranks (mesh.data x mesh.fsdp): use multiples of {unit}, or fewer ranks"
            )
