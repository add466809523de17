"""The parts of the page besides its charts: what happened to runs, and how they differ."""

from collections.abc import Iterable, Sequence

import numpy as np

from gpt3jax.page import document, elements, scales, tables
from gpt3jax.report import figures, run_folder

Html = elements.Html
tag = elements.tag
_N_ROWS = 100  # of the table of faults


def headline(runs: Sequence[run_folder.Run], labels: Sequence[str], now: float) -> Html:
    """Return the figures of one run as tiles, of several side by side."""
    if len(runs) == 1:
        return tables.tiles(figures.of(runs[0], now))
    rows = [[name, *cells] for name, cells in figures.side_by_side(runs, now).items()]
    return tables.table(["", *labels], rows)


def resumes(run: run_folder.Run) -> list[Html]:
    """Return what each resume changed, a table each."""
    parts: list[Html] = []
    for resume in run.resumes:
        rows = [(name, _value(then), _value(now)) for name, (then, now) in resume.changes.items()]
        parts.append(tag("h3", f"Resumed after step {resume.step:,}"))
        parts.append(tables.table(["", "then", "now"], rows))
    return parts


def _value(value: object) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or '""'
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text or '""'


def retaken(run: run_folder.Run) -> list[Html]:
    """Return how the steps that a resumed run took again compare with the first time."""
    before, after = run.dropped.steps, run.metrics.steps
    n = len(before) + len(run.dropped.evaluations)
    if not n:
        return []
    text = f"{n:,} entries were set aside (metrics.dropped.jsonl): a start takes their steps again"
    _, first, second = np.intersect1d(before["step"], after["step"], return_indices=True)
    losses = before["loss"][first], after["loss"][second]
    both = np.isfinite(losses[0]) & np.isfinite(losses[1])
    if both.any():
        difference = np.abs(losses[0] - losses[1])[both]
        worst = "none" if not difference.max() else f"{difference.max():.3g} at most"
        text += f". Difference of the loss in {both.sum():,} steps logged both times: {worst}"
    return [tag("p", f"{text}.")]


def faults(run: run_folder.Run) -> Html:
    """Return the steps that have a file in faults/."""
    head = ("step", "fault", "policy", "loss", "limit", "update", "samples")
    rows = [
        (
            f"{fault.step:,}", fault.kind, fault.policy, fault.loss, fault.limit,
            "left out" if fault.is_skipped else "applied", fault.samples,
        )
        for fault in run.faults[-_N_ROWS:]
    ]  # fmt: skip
    more = len(run.faults) - _N_ROWS
    notes = [document.note(f"The first {more:,} are left out.")] if more > 0 else []
    return tag("div", tables.table(head, rows), *notes)


def checkpoints(run: run_folder.Run) -> Html:
    """Return the checkpoints that are there."""
    if run.checkpoints is None:
        folder = run.fields.get("checkpoint.dir", "")
        missing = (
            f"checkpoint.dir={folder} is not visible from here" if folder else "none are saved"
        )
        return document.note(missing)
    if not run.checkpoints:
        return document.note("none yet")
    head = ("step", "written (UTC)", "size", "state", "mesh", "jax", "gpt3jax")
    rows = []
    for entry in run.checkpoints:
        meta = entry.meta
        rows.append((
            f"{entry.step:,}", f"{scales.utc(entry.written):%Y-%m-%d %H:%M:%S}",
            f"{scales.short(entry.n_bytes)}B", entry.state,
            *((meta.mesh, meta.jax_version, meta.version) if meta else ("", "", "")),
        ))  # fmt: skip
    return tables.table(head, rows)


def differences(runs: Sequence[run_folder.Run], labels: Sequence[str]) -> Html:
    """Return the fields of the config in which runs differ."""
    names = dict.fromkeys(name for run in runs for name in run.fields)
    missing = object()
    rows = []
    for name in names:
        values = [run.fields.get(name, missing) for run in runs]
        if any(value != values[0] for value in values):
            rows.append([name, *("" if v is missing else _value(v) for v in values)])
    return tables.table(["", *labels], rows) if rows else document.note("no field differs")


def notes(runs: Sequence[run_folder.Run]) -> list[Html]:
    """Return what could not be read."""
    found = [f"{run.name}: {note}" for run in runs for note in run.notes]
    cut = (run.name for run in runs if run.metrics.has_cut_end)
    found += [f"{name}: the last line of metrics.jsonl is not whole, and left out" for name in cut]
    return [document.warning(note) for note in found]


def per_run(
    runs: Sequence[run_folder.Run], labels: Sequence[str], parts: Iterable[list[Html]]
) -> list[Html]:
    """Return what there is of each run, under its name where there are several runs."""
    found: list[Html] = []
    for _, label, part in zip(runs, labels, parts, strict=True):
        if part and len(runs) > 1:
            found.append(tag("h3", label))
        found += part
    return found
