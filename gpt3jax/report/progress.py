"""How far a run is, how it is doing, and when it will be at its end."""

import dataclasses
import math

import numpy as np

from gpt3jax.config import batch_schedule
from gpt3jax.data import skipped_samples
from gpt3jax.record import console_line
from gpt3jax.report import run_folder

_RECENT = 10  # entries that say how fast a run is now
_SILENT = 120.0  # seconds; a run that takes steps writes goodput.json every 10 s


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """The position of a run."""

    step: int
    """The last step that is known."""
    end_step: int | None
    """None where the config does not say, or cannot be read."""
    status: str
    seconds_left: float
    """Of steps alone; NaN where it is not known, or nothing is left."""

    @property
    def share(self) -> float | None:
        """Return the share of the steps that are done."""
        return min(self.step / self.end_step, 1.0) if self.end_step else None


def of(run: run_folder.Run, now: float) -> Progress:
    """Return how far a run is at a moment (Unix time)."""
    table = run.metrics.steps
    step = int(table["step"][-1]) if len(table) else 0
    samples = table.last("consumed_samples")
    end = _end(run, step, samples)
    is_complete = bool(run.starts) and run.starts[-1].end == "complete"
    left = end[1] - samples if end else math.nan
    if is_complete or left <= 0:
        return Progress(step=step, end_step=step, status="complete", seconds_left=math.nan)
    return Progress(
        step=step,
        end_step=end[0] if end else None,
        status=_status(run, now),
        seconds_left=_seconds_left(run, left),
    )


def _seconds_left(run: run_folder.Run, n_samples: float) -> float:
    size = run.metrics.steps.last("batch_size")
    return n_samples / size * recent(run, "step_time") if size > 0 else math.nan


def recent(run: run_folder.Run, name: str) -> float:
    """Return the median of a field over the last entries, NaN if they have none."""
    known = run.metrics.steps.known(name)[-_RECENT:]
    return float(np.median(known)) if len(known) else math.nan


def _end(run: run_folder.Run, step: int, samples: float) -> tuple[int, int] | None:
    """Return (steps, samples) at the end of the run, if they are known."""
    cfg = run.config
    if cfg is None or not (cfg.train.n_steps or cfg.train.n_samples or cfg.train.n_tokens):
        return None
    start = (step, int(samples)) if 0 <= samples < 2**53 else (0, 0)
    try:
        schedule = batch_schedule.from_config(cfg.batch, cfg.model.seq_len)
        _, n_samples = skipped_samples.run_length(cfg, schedule, *start)
        return skipped_samples.from_config(cfg.data).end(schedule, *start, n_samples)
    except (ValueError, TypeError):  # a config of another version
        return None


def _status(run: run_folder.Run, now: float) -> str:
    if not run.starts:
        return "no account of its starts"
    last = run.starts[-1]
    if last.end == "stopped":
        return "stopped on request"
    if last.end == "refused":
        return "ended by an error that a restart does not cure"
    silent = now - last.began - last.total
    if silent < _SILENT:
        return "running"
    return f"no sign for {console_line.duration(silent)}: killed, failed, or in a long phase"
