"""Events of a run for the axes of its charts: restarts, changes of layout, faults."""

import itertools
import math
from typing import NamedTuple

import numpy as np

from gpt3jax.page import charts
from gpt3jax.report import positions, run_folder


class _Event(NamedTuple):
    kind: str
    step: int
    n: int
    """How many there were."""
    text: str
    moment: float = math.nan
    """When it was (Unix time), where that is not the moment of the step."""


_N_GROUPS = 400  # marks of one kind on an axis: closer ones are one mark that counts them
_COUNTS = (
    ("skipped steps", "skipped_in_interval"),
    ("not finite", "nan_in_interval"),
    ("spike", "spikes_in_interval"),
)


def of(run: run_folder.Run, places: positions.Positions, prefix: str) -> list[charts.Mark]:
    """Return a run's marks; `prefix` begins their texts."""
    events = [
        *_restarts(run),
        *_layout_changes(run),
        *(event for kind, name in _COUNTS for event in _counted(run, kind, name)),
    ]
    marks = []
    for kind in dict.fromkeys(event.kind for event in events):
        of_kind = sorted((e for e in events if e.kind == kind), key=lambda e: e.step)
        marks += [_mark(group, places, prefix) for group in _grouped(of_kind)]
    return marks


def _restarts(run: run_folder.Run) -> list[_Event]:
    firsts = [(start.first_step, start.began) for start in run.starts[1:]]
    if not run.starts:
        firsts = [(resume.step, math.nan) for resume in run.resumes]
    return [
        _Event("restart", step, 1, f"restart after step {step:,}", began) for step, began in firsts
    ]


def _layout_changes(run: run_folder.Run) -> list[_Event]:
    changes = [(resume.step, resume.changes.get("mesh")) for resume in run.resumes]
    return [
        _Event("layout change", step, 1, f"from {mesh[0]} to {mesh[1]} after step {step:,}")
        for step, mesh in changes
        if mesh
    ]


def _counted(run: run_folder.Run, kind: str, name: str) -> list[_Event]:
    """Return faults by their files, and by the counts of intervals that no file explains."""
    by_file = [fault for fault in run.faults if fault.kind == kind]
    events = [
        _Event(kind, fault.step, 1, f"step {fault.step:,}: {_text(fault)}") for fault in by_file
    ]
    table = run.metrics.steps
    in_files = np.sort(np.array([fault.step for fault in by_file], float))
    earlier = np.concatenate([[0.0], table["step"][:-1]]) if len(table) else table["step"]
    for before, step, n in zip(earlier, table["step"], table[name], strict=True):
        if n > 0 and math.isfinite(n):
            n_files = int(np.diff(np.searchsorted(in_files, [before, step], side="right"))[0])
            if n_files < n:
                text = _interval(kind, n, before, step)
                events.append(_Event(kind, int(step), int(n) - n_files, text))
    return events


def _interval(kind: str, n: float, before: float, step: float) -> str:
    what = {"skipped steps": "skipped", "not finite": "with a loss not finite", "spike": "a spike"}
    is_one = step - before == 1
    where = f"step {step:,.0f}" if is_one else f"steps {before + 1:,.0f} to {step:,.0f}"
    return f"{n:,.0f} {what[kind]} in {where}"


def _text(fault: run_folder.Fault) -> str:
    what = (
        f"a spike, loss {fault.loss}" if fault.kind == "spike" else f"not finite, loss {fault.loss}"
    )
    return what + (", its update left out" if fault.is_skipped else "")


def _grouped(events: list[_Event]) -> list[list[_Event]]:
    """Return events, which are in the order of steps, such that close ones are together."""
    if len(events) <= _N_GROUPS:
        return [[event] for event in events]
    first, last = events[0].step, events[-1].step
    width = max((last - first) / _N_GROUPS, 1.0)
    groups = itertools.groupby(events, key=lambda event: int((event.step - first) / width))
    return [list(group) for _, group in groups]


def _mark(group: list[_Event], places: positions.Positions, prefix: str) -> charts.Mark:
    first, last = group[0], group[-1]
    n = sum(event.n for event in group)
    several = f"{first.kind}: {n:,} in steps {first.step:,} to {last.step:,}"
    xs = {key: float(place[0]) for key, place in places.at(np.array([float(first.step)])).items()}
    if math.isfinite(first.moment):
        xs[positions.TIME] = places.of_moment(first.moment)
    return charts.Mark(
        kind=first.kind,
        xs=xs,
        text=prefix + (first.text if len(group) == 1 else several),
        across=not prefix and first.kind in ("restart", "layout change"),
    )
