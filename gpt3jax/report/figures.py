"""The figures that say most about a run, for the page and for the terminal."""

import math
from collections.abc import Sequence

import numpy as np

from gpt3jax.page import tables
from gpt3jax.record import console_line
from gpt3jax.report import metric_tables, progress, run_folder
from gpt3jax.watch import goodput

Figure = tables.Tile
_ORDER = (
    "steps", "tokens", "time left", "loss", "validation loss", "test loss", "tokens/s", "MFU",
    "TFLOP/s a device", "goodput", "starts", "skipped steps",
)  # fmt: skip


def side_by_side(runs: Sequence[run_folder.Run], now: float) -> dict[str, list[str]]:
    """Return the figures of runs by their names, as texts; "" where a run has none."""
    known = [{name: (value, remark) for name, value, remark in of(run, now)} for run in runs]
    names = sorted({name for of_run in known for name in of_run}, key=_ORDER.index)
    shown = {}
    for name in names:
        cells = [of_run.get(name, ("", "")) for of_run in known]
        shown[name] = [f"{value} ({remark})" if remark else value for value, remark in cells]
    return shown


def of(run: run_folder.Run, now: float) -> list[Figure]:
    """Return the figures of a run that are known at a moment (Unix time)."""
    return [
        *_progress(run, progress.of(run, now)),
        *_losses(run),
        *_rates(run),
        *_time(run),
        *_faults(run),
    ]


def _progress(run: run_folder.Run, at: progress.Progress) -> list[Figure]:
    goes_on = at.end_step is not None and at.status != "complete"
    whole = f" of {at.end_step:,}" if goes_on else ""
    share = f"{at.share:.0%}, " if goes_on else ""
    shown = [("steps", f"{at.step:,}{whole}", f"{share}{at.status}")]
    tokens = run.metrics.steps.last("consumed_tokens")
    if math.isfinite(tokens):
        shown.append(("tokens", console_line.short_count(tokens), _samples(run)))
    if math.isfinite(at.seconds_left):
        left = console_line.duration(at.seconds_left)
        shown.append(("time left", left, "of steps, at the recent speed"))
    return shown


def _samples(run: run_folder.Run) -> str:
    samples, size = (run.metrics.steps.last(name) for name in ("consumed_samples", "batch_size"))
    return f"{samples:,.0f} samples, batch {size:,.0f}" if math.isfinite(samples + size) else ""


def _losses(run: run_folder.Run) -> list[Figure]:
    steps, evaluations = run.metrics.steps, run.metrics.evaluations
    name = "interval_loss" if len(steps.known("interval_loss")) else "loss"
    shown = [_loss("loss", steps, name)]
    shown += [_loss("validation loss", evaluations, "validation_loss")]
    shown += [_loss("test loss", evaluations, "test_loss")]
    return [figure for figure in shown if figure[1]]


def _loss(title: str, table: metric_tables.Table, name: str) -> Figure:
    values = table[name]
    if not len(table.known(name)):
        return title, "", ""
    last, best = table.last(name), int(np.nanargmin(np.where(np.isfinite(values), values, np.nan)))
    remark = f"best {values[best]:.4f} at step {table['step'][best]:,.0f}"
    if title != "loss":
        remark = f"perplexity {math.exp(min(last, 20.0)):,.1f}; {remark}"
    return title, f"{last:.4f}", remark


def _rates(run: run_folder.Run) -> list[Figure]:
    tokens, tflops, mfu, per_device = (
        progress.recent(run, name)
        for name in ("tokens_per_second", "tflops_per_device", "mfu",
            "tokens_per_second_per_device",)
    )  # fmt: skip
    shown = []
    if math.isfinite(tokens):
        remark = f"{console_line.short_count(per_device)} a device" if per_device > 0 else ""
        shown.append(("tokens/s", console_line.short_count(tokens), remark))
    if math.isfinite(mfu):
        shown.append(("MFU", f"{mfu:.1%}", f"{tflops:.4g} TFLOP/s a device"))
    elif math.isfinite(tflops):
        shown.append(("TFLOP/s a device", f"{tflops:.3g}", "MFU: the device's peak is not known"))
    return shown


def _time(run: run_folder.Run) -> list[Figure]:
    if not run.starts:
        return []
    totals = goodput.shares(list(run.starts))
    between = totals.pop("between starts")
    total = math.fsum(totals.values())
    shown = []
    if total > 0:
        remark = f"steps that count, of {console_line.duration(total)}"
        shown.append(("goodput", f"{totals['steps'] / total:.1%}", remark))
    gaps = f"{console_line.duration(between)} between them" if between >= 1 else ""
    return [*shown, ("starts", f"{len(run.starts):,}", gaps)]


def _faults(run: run_folder.Run) -> list[Figure]:
    names = ("skipped_in_interval", "nan_in_interval", "spikes_in_interval")
    skipped, nan, spikes = (run.metrics.steps.known(name).sum() for name in names)
    if not len(run.metrics.steps):
        return []
    return [
        ("skipped steps", f"{skipped:,.0f}", f"{nan:,.0f} losses not finite, {spikes:,.0f} spikes")
    ]
