"""The batch size of each step: a function of the samples consumed before it, and of nothing else.

Batch sizes, steps and samples of any part of a run follow by arithmetic, without stepping through
it. Semantics are Megatron-LM's (`core/num_microbatches_calculator.py`): the step schedule of commit
d98e8a64dd, and the linear ramp of commit 0b9bc2088b, the last commit with one. Imports no JAX. A
sample is one sequence of `model.seq_len` tokens.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from gpt3jax import errors
from gpt3jax.config import ranges, schema

_PAGE = "reference/options.md#batch"
Stages = tuple[tuple[int, int], ...]


class Stretch(NamedTuple):
    """Consecutive steps of equal batch size."""

    first_step: int
    """Number of its first step, counted from 0 at the start given to `runs`."""
    first_sample: int
    """Samples consumed before it since the start of training."""
    size: int
    """Sequences in each step."""
    n_steps: int

    @property
    def end_sample(self) -> int:
        """Samples consumed after its last step."""
        return self.first_sample + self.n_steps * self.size


@dataclasses.dataclass(frozen=True)
class BatchSchedule:
    """The batch size at any number of consumed samples."""

    stages: Stages
    """(first sample, batch size) of each stage: both grow strictly, from sample 0 on."""

    def size(self, consumed_samples: int) -> int:
        """Return the batch size of the step that starts after `consumed_samples` samples."""
        return next(size for first, size in reversed(self.stages) if consumed_samples >= first)

    def runs(self, start: int, end: int) -> tuple[Stretch, ...]:
        """Return the stretches of equal batch size from sample `start` to sample `end`.

        The last batch starts before `end` and may reach beyond it; a stage begins with the first
        batch that starts at or after its threshold.
        """
        return tuple(self._stretches(start, end))

    def _stretches(self, start: int, end: int) -> Iterator[Stretch]:
        step, sample = 0, start
        thresholds = [first for first, _ in self.stages[1:]] + [end]
        for (_, size), threshold in zip(self.stages, thresholds, strict=True):
            n_steps = -(-(min(threshold, end) - sample) // size)
            if n_steps > 0:
                stretch = Stretch(step, sample, size, n_steps)
                yield stretch
                step, sample = step + n_steps, stretch.end_sample

    def n_steps(self, end_samples: int, start: int = 0) -> int:
        """Return the number of batches from sample `start` on that start before `end_samples`."""
        return sum(stretch.n_steps for stretch in self.runs(start, end_samples))

    def consumed_after(self, n_steps: int, start: int = 0) -> int:
        """Return the samples consumed after `n_steps` steps from sample `start`."""
        last_stage, last_size = self.stages[-1]
        sample = start
        for stretch in self.runs(start, last_stage):
            if n_steps <= stretch.n_steps:
                return stretch.first_sample + n_steps * stretch.size
            n_steps, sample = n_steps - stretch.n_steps, stretch.end_sample
        return sample + n_steps * last_size

    def end(
        self, train: schema.Train, seq_len: int, start_step: int = 0, start: int = 0
    ) -> tuple[int, int]:
        """Return (steps, samples consumed) at the end of the run: at the first of its limits.

        The run continues with this schedule from `start_step` and `start` (samples); earlier
        batches may have had other sizes. A run has whole batches: with a limit in samples or
        tokens it ends with the last batch that starts before the limit (`while consumed < limit`),
        so it may exceed the limit by part of a batch. (With a constant batch Megatron rounds
        `train_samples` down: at most one batch fewer.)
        """
        counts = [train.n_steps - start_step] if train.n_steps else []
        for limit in (train.n_samples, -(-train.n_tokens // seq_len)):
            if limit:
                counts.append(self.n_steps(limit, start))
        assert counts, "validation.validate requires a limit"
        n_steps = max(0, min(counts))
        return start_step + n_steps, self.consumed_after(n_steps, start)


def from_config(batch: schema.Batch, seq_len: int) -> BatchSchedule:
    """Return the schedule of a config. It must reach `global_batch_size`, and is capped there.

    Raises:
        UserError: the schedule or ramp cannot be read, shrinks, or ends below
            `global_batch_size`.
    """
    full = batch.global_batch_size
    stages: Stages = ((0, full),)
    if batch.schedule:
        stages = parse_schedule(batch.schedule, seq_len)
    elif batch.ramp:
        stages = ramp_stages(batch.ramp, full)
    if stages[-1][1] < full:
        raise errors.UserError(
            f'batch.schedule="{batch.schedule}" ends at {stages[-1][1]}, below '
            f"batch.global_batch_size={full}: lower the latter, or add a stage of {full}",
            page=_PAGE,
        )
    return BatchSchedule(_merge_equal((first, min(size, full)) for first, size in stages))


def parse_schedule(text: str, seq_len: int) -> Stages:
    """Return the (first sample, batch size) stages of "TOKENS:SIZE TOKENS:SIZE ...".

    Blanks or commas separate entries, in any order; K, M, B, T stand for 10^3 ... 10^12. A
    threshold in tokens is rounded down to whole samples of `seq_len` tokens.

    Raises:
        UserError: there is no entry, an entry cannot be read, the first threshold is not 0,
            thresholds do not grow, or sizes are not positive or shrink.
    """
    try:
        entries = text.replace(",", " ").split()
        stages = tuple(sorted(_parse_entry(entry, seq_len) for entry in entries))
        _check_stages(stages, seq_len)
    except ValueError as error:
        raise errors.UserError(f'batch.schedule="{text}": {error}', page=_PAGE) from None
    return stages


def _parse_entry(entry: str, seq_len: int) -> tuple[int, int]:
    threshold, _, size = entry.partition(":")
    try:
        return ranges.read_count(threshold) // seq_len, ranges.read_count(size)
    except ValueError:
        raise ValueError(f'entry "{entry}" must be TOKENS:SIZE, as in 2.4B:320') from None


def _check_stages(stages: Stages, seq_len: int) -> None:
    if not stages:
        raise ValueError('no entry: give one, as in "0:16 2.4B:320", or leave the field empty')
    for first, size in stages:
        if size < 1:
            raise ValueError(f"the batch size from sample {first} on is {size}: give at least 1")
    if stages[0][0] != 0:
        raise ValueError(
            f"the first stage starts at sample {stages[0][0]}: start with a threshold of 0"
        )
    for (first, size), (next_first, next_size) in itertools.pairwise(stages):
        if next_first <= first:
            raise ValueError(
                f"two stages start at sample {first} (of {seq_len} tokens): "
                "move their thresholds apart, or drop one"
            )
        if next_size < size:
            raise ValueError(
                f"the batch shrinks from {size} to {next_size} at sample {next_first}: "
                "let sizes grow"
            )


def ramp_stages(ramp: tuple[int, ...], global_batch_size: int) -> Stages:
    """Return the stages of Megatron's linear ramp: start size, increment, samples.

    size = start + increment floor(consumed / (samples / n_increments)), where n_increments =
    (global_batch_size - start) / increment. The full size is reached when consumed > samples, or
    earlier.

    Raises:
        UserError: not three positive numbers, or increments that miss `global_batch_size`.
    """
    _check_ramp(ramp, global_batch_size)
    start, increment, n_samples = ramp
    n_increments = (global_batch_size - start) // increment
    samples_per_increment = n_samples / n_increments  # a float, as in Megatron
    sizes = {0: start}
    for i in range(1, n_increments + 1):
        sizes[_first_with_quotient(i, samples_per_increment)] = start + i * increment
    return tuple(sizes.items())


def _first_with_quotient(quotient: int, divisor: float) -> int:
    """Return the smallest integer n with int(n / divisor) >= quotient, in floating point.

    The exact n may differ by one where quotient * divisor is whole.
    """
    n = max(int(quotient * divisor) - 1, 0)
    while int(n / divisor) < quotient:
        n += 1
    return n


def _check_ramp(ramp: tuple[int, ...], full: int) -> None:
    field = f"batch.ramp={' '.join(map(str, ramp))}"
    if len(ramp) != 3 or min(ramp) < 1:
        raise errors.UserError(
            f"{field} must be three positive numbers: start size, increment, samples", page=_PAGE
        )
    start, increment, _ = ramp
    if start >= full:
        raise errors.UserError(
            f"{field} starts at {start}, not below batch.global_batch_size={full}: "
            "start lower, or leave the ramp out",
            page=_PAGE,
        )
    if (full - start) % increment:
        raise errors.UserError(
            f"{field}: the increment {increment} does not divide batch.global_batch_size={full} "
            f"less the start, {full - start}: use one of {ranges.divisors(full - start)}",
            page=_PAGE,
        )


def _merge_equal(stages: Iterable[tuple[int, int]]) -> Stages:
    merged: dict[int, int] = {}  # size -> first sample
    for first, size in stages:
        merged.setdefault(size, first)
    return tuple((first, size) for size, first in merged.items())


def check(schedule: BatchSchedule, microbatch_size: int, data_parallel_size: int) -> None:
    """Check that each stage's batch divides into microbatches over the data-parallel ranks.

    Raises:
        UserError: it names the stage of the schedule.
    """
    for _, size in schedule.stages:
        check_size(schedule, size, microbatch_size, data_parallel_size)


def check_size(
    schedule: BatchSchedule, batch_size: int, microbatch_size: int, data_parallel_size: int
) -> None:
    """Check that a stage's batch divides into microbatches over the data-parallel ranks.

    Megatron fails when it enters a stage that does not divide; here it is an error before the run
    starts.

    Raises:
        UserError: it names the stage of the schedule.
    """
    rows = microbatch_size * data_parallel_size
    if batch_size % rows == 0:
        return
    first = next(first for first, size in schedule.stages if size == batch_size)
    stage = f"the batch of {batch_size} from sample {first} on (batch.schedule or batch.ramp)"
    if len(schedule.stages) == 1:
        stage = f"batch.global_batch_size={batch_size}"
    raise errors.UserError(
        f"{stage} is not divisible by batch.microbatch_size={microbatch_size} x "
        f"{data_parallel_size} data-parallel ranks (mesh.data x mesh.fsdp) = {rows}: "
        f"make it a multiple of {rows}, or use smaller microbatches or fewer ranks",
        page="parallelism.md#which-sizes-are-possible",
    )
