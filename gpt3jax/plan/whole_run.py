"""The whole run: a row for each batch size, and their sums.

The names of the fields are keys of the plan's JSON, which other programs read: do not rename them.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from gpt3jax.config import batch_schedule, layout, schema
from gpt3jax.plan import step_report

Fields = layout.Layout  # Batch has a field of the name `layout`
Steps = Mapping[int, step_report.StepReport | str]
"""The step of each batch size, smallest first; or why `gpt3jax.main` would refuse the size."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """The steps of one batch size; figures are None where `gpt3jax.main` would refuse it."""

    batch_size: int
    """Sequences of a step."""
    steps: int
    tokens: int
    layout: Fields | None = None
    fits: bool = False
    peak_bytes_per_gpu: int | None = None
    peak_is: step_report.Origin | None = None
    step_seconds: float | None = None
    mfu: float | None = None
    tokens_per_second_per_gpu: float | None = None
    hours: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The length and the cost of the whole run, evaluations, saves and restarts left out."""

    run_steps: int
    run_tokens: int
    run_days: float
    gpu_hours: float
    """With the GPUs that idle."""
    cost: float | None
    """None where no price was given."""
    ramp_hours: float
    """Hours of the batches below the full size."""
    ramp_extra_hours: float
    """How much longer these take than the same tokens in full batches."""


def batches(cfg: schema.Config, steps: Steps) -> list[Batch]:
    """Return the rows of a run's batch sizes; one that the run does not reach has no steps."""
    schedule = batch_schedule.from_config(cfg.batch, cfg.model.seq_len)
    _, n_samples = schedule.end(cfg.train, cfg.model.seq_len)
    n_steps = {stretch.size: stretch.n_steps for stretch in schedule.runs(0, n_samples)}
    return [_batch(cfg, size, n_steps.get(size, 0), step) for size, step in steps.items()]


def _batch(
    cfg: schema.Config, size: int, n_steps: int, step: step_report.StepReport | str
) -> Batch:
    counts = Batch(batch_size=size, steps=n_steps, tokens=n_steps * size * cfg.model.seq_len)
    if isinstance(step, str):
        return counts
    seconds = step.time.step_seconds.expected
    return dataclasses.replace(
        counts,
        layout=layout.of(step.cfg),
        fits=step.peak.fits,
        peak_bytes_per_gpu=step.peak.peak_bytes_per_gpu,
        peak_is=step.peak.peak_is,
        step_seconds=seconds,
        mfu=step.time.mfu,
        tokens_per_second_per_gpu=step.time.tokens_per_second_per_gpu,
        hours=n_steps * seconds / 3600,
    )


def run(rows: Sequence[Batch], n_gpus: int, price: float) -> Run:
    """Return the sums of a run's batch sizes, of which the last is the full one.

    Steps that would be refused count as if they were as efficient as full ones.
    """
    full = rows[-1]
    assert full.step_seconds is not None, "the full batch has a layout"
    hours_per_sequence = full.step_seconds / full.batch_size / 3600
    at_full_speed = [row.steps * row.batch_size * hours_per_sequence for row in rows]
    hours = [
        fast if row.hours is None else row.hours
        for row, fast in zip(rows, at_full_speed, strict=True)
    ]
    gpu_hours = sum(hours) * n_gpus
    return Run(
        run_steps=sum(row.steps for row in rows),
        run_tokens=sum(row.tokens for row in rows),
        run_days=sum(hours) / 24,
        gpu_hours=gpu_hours,
        cost=gpu_hours * price if price else None,
        ramp_hours=sum(hours[:-1]),
        ramp_extra_hours=sum(hours[:-1]) - sum(at_full_speed[:-1]),
    )
