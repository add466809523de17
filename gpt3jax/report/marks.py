"""Events of a run for the axes of its charts: restarts, changes of layout, faults."""

import math
from collections.abc import Callable

import numpy as np

from gpt3jax.page import charts, decimation
from gpt3jax.report import positions, run_folder

_N_GROUPS = 400  # marks of one kind on an axis: closer ones are one mark that counts them
_COUNTS = (
    ("skipped steps", "skipped_in_interval"),
    ("not finite", "nan_in_interval"),
    ("spike", "spikes_in_interval"),
)


def of(run: run_folder.Run, places: positions.Positions, prefix: str) -> list[charts.Mark]:
    """Return a run's marks; `prefix` begins their texts."""
    found = [
        *_restarts(run),
        *_layout_changes(run),
        *(event for kind, name in _COUNTS for event in _counted(run, kind, name)),
    ]
    marks = []
    for kind in dict.fromkeys(kind for kind, _, _, _ in found):
        events = sorted((event for event in found if event[0] == kind), key=lambda e: e[1])
        marks += _grouped(kind, events, places.at, prefix)
    return marks


_Event = tuple[str, int, int, str]  # kind, step, how many, text


def _restarts(run: run_folder.Run) -> list[_Event]:
    firsts = [start.first_step for start in run.starts[1:]] or [r.step for r in run.resumes]
    return [("restart", step, 1, f"restart after step {step:,}") for step in firsts]


def _layout_changes(run: run_folder.Run) -> list[_Event]:
    changes = [(resume.step, resume.changes.get("mesh")) for resume in run.resumes]
    return [
        ("layout change", step, 1, f"after step {step:,}: {mesh[0]} became {mesh[1]}")
        for step, mesh in changes
        if mesh
    ]


def _counted(run: run_folder.Run, kind: str, name: str) -> list[_Event]:
    """Return faults by their files, and by the counts of intervals that no file explains."""
    by_file = [fault for fault in run.faults if fault.kind == kind]
    events = [(kind, fault.step, 1, f"step {fault.step:,}: {_text(fault)}") for fault in by_file]
    table = run.metrics.steps
    in_files = np.sort(np.array([fault.step for fault in by_file], float))
    befores = np.concatenate([[0.0], table["step"][:-1]]) if len(table) else table["step"]
    for before, step, n in zip(befores, table["step"], table[name], strict=True):
        if n > 0 and math.isfinite(n):
            n_files = int(np.diff(np.searchsorted(in_files, [before, step], side="right"))[0])
            if n_files < n:
                events.append((kind, int(step), int(n) - n_files, _interval(kind, n, before, step)))
    return events


def _interval(kind: str, n: float, before: float, step: float) -> str:
    what = {"skipped steps": "skipped", "not finite": "with a loss not finite", "spike": "a spike"}
    return f"{n:,.0f} {what[kind]} in steps {before + 1:,.0f} to {step:,.0f}"


def _text(fault: run_folder.Fault) -> str:
    what = (
        f"a spike, loss {fault.loss}" if fault.kind == "spike" else f"not finite, loss {fault.loss}"
    )
    return what + (", its update left out" if fault.is_skipped else "")


def _grouped(
    kind: str,
    events: list[_Event],
    at: Callable[[decimation.Array], dict[str, decimation.Array]],
    prefix: str,
) -> list[charts.Mark]:
    steps = np.array([step for _, step, _, _ in events], float)
    width = (steps[-1] - steps[0]) / _N_GROUPS or 1.0
    group = (
        ((steps - steps[0]) / width).astype(int)
        if len(steps) > _N_GROUPS
        else np.arange(len(steps))
    )
    marks = []
    for members in np.split(np.arange(len(events)), np.flatnonzero(np.diff(group)) + 1):
        first, last = events[members[0]], events[members[-1]]
        n = sum(events[i][2] for i in members)
        text = (
            first[3] if len(members) == 1 else f"{kind}: {n:,} in steps {first[1]:,} to {last[1]:,}"
        )
        xs = {key: float(place[0]) for key, place in at(steps[members[:1]]).items()}
        across = kind in ("restart", "layout change")
        marks.append(charts.Mark(kind=kind, xs=xs, text=prefix + text, across=across))
    return marks
