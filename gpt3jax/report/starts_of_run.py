"""How a run spent its time: its starts by the clock on the wall, and by what each did."""

import math
from collections.abc import Sequence

from gpt3jax.page import bars, charts, document, elements, scales, tables
from gpt3jax.record import console_line
from gpt3jax.report import run_folder
from gpt3jax.watch import goodput, phases

Html = elements.Html
tag = elements.tag
# What the time of a start goes into, about in the order of a start; and the colour of each.
_KINDS = {
    phases.START: 0, phases.RESTORE: 5, phases.COMPILE: 1, "steps": 2, phases.DATA: 8,
    phases.EVALUATE: 6, phases.SAVE: 3, "lost steps": 4,
}  # fmt: skip
_ENDS = {"": "killed, failed, or still running", "refused": "an error", "stopped": "stopped"}
_N_ROWS = 200  # of the table of starts


def goodput_bar(run: run_folder.Run) -> Html:
    """Return the time of all starts as a bar, by what it went into."""
    totals = goodput.shares(list(run.starts))
    between = totals.pop("between starts")
    total = math.fsum(totals.values())
    ordered = sorted(totals.items(), key=lambda item: (item[0] != "steps", -item[1]))
    parts = [bars.Part(kind, seconds, _color(kind)) for kind, seconds in ordered]
    n = len(run.starts)
    note = f"{console_line.duration(total)} in {n:,} start{'s' if n > 1 else ''}"
    note += f", and {console_line.duration(between)} between them" if n > 1 else ""

    def shown(seconds: float) -> str:
        return f"{seconds / total:.1%}, {console_line.duration(seconds)}"

    return tag("div", bars.bar(parts, shown), document.note(note))


def _color(kind: str) -> str:
    return bars.color_class(_KINDS.get(kind, 9))


def timeline(runs: Sequence[run_folder.Run], labels: Sequence[str]) -> Html:
    """Return the starts of runs as blocks over real time, a row for each run."""
    with_starts = [(run, label) for run, label in zip(runs, labels, strict=True) if run.starts]
    began = min(run.starts[0].began for run, _ in with_starts)
    ended = max(start.began + start.total for run, _ in with_starts for start in run.starts)
    scale = scales.Scale(low=began, high=max(ended, began + 1))
    ticks = [(scale.share(at), name) for at, name in scales.time_ticks(began, scale.high, 5)]
    rows = [
        (label if len(runs) > 1 else "", elements.join(_blocks(run, scale)))
        for run, label in with_starts
    ]
    day = f"{scales.utc(began):%d %b %Y %H:%M} to {scales.utc(ended):%d %b %Y %H:%M} UTC"
    return tag("div", charts.stacked(rows, ticks), document.note(day))


def _blocks(run: run_folder.Run, scale: scales.Scale) -> list[Html]:
    """Return a start's parts, each kind once: the order within a start is not recorded."""
    blocks = []
    for number, (start, parts) in enumerate(
        zip(run.starts, goodput.spent(list(run.starts)), strict=True)
    ):
        at, about = start.began, f"start {number + 1}, steps {start.first_step:,} to {start.step:,}"
        for kind in sorted(
            parts, key=lambda kind: list(_KINDS).index(kind) if kind in _KINDS else 99
        ):
            if parts[kind] > 0:
                left, width = scale.share(at), parts[kind] / (scale.high - scale.low)
                title = f"{about}: {kind} {console_line.duration(parts[kind])}"
                style = f"left:{left:.3%};width:{width:.3%}"
                blocks.append(tag("i", class_=_color(kind), title=title, style=style))
                at += parts[kind]
    for entry in run.checkpoints or ():
        title = f"checkpoint of step {entry.step:,}"
        style = f"left:{scale.share(entry.written):.3%}"
        blocks.append(tag("i", class_="point", title=title, style=style))
    return blocks


def table(run: run_folder.Run) -> Html:
    """Return the starts of a run as a table: when, how far, on which layout, and how it ended."""
    starts = list(run.starts)
    lost = goodput.lost_steps(starts)
    head = [
        "start",
        "began (UTC)",
        "took",
        "pause before",
        "steps",
        "lost",
        "mesh",
        "devices",
        "jax",
        "ended",
    ]
    rows = []
    for i, start in enumerate(starts):
        pause = start.began - starts[i - 1].began - starts[i - 1].total if i else math.nan
        rows.append((
            f"{i + 1}", f"{scales.utc(start.began):%Y-%m-%d %H:%M:%S}",
            console_line.duration(start.total), console_line.duration(pause) if i else "",
            f"{start.first_step:,} to {start.step:,}", f"{lost[i]:,}" if lost[i] else "",
            *(start.layout.get(name, "") for name in ("mesh", "devices", "jax")),
            _ENDS.get(start.end, start.end) if i + 1 == len(starts) or start.end else "killed or failed",
        ))  # fmt: skip
    more = [document.note(f"The first {len(rows) - _N_ROWS:,} starts are left out.")]
    return tag("div", tables.table(head, rows[-_N_ROWS:]), *(more if len(rows) > _N_ROWS else []))
