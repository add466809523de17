"""How a run spent its time: its starts by the clock on the wall, and by what each did."""

import math
from collections.abc import Sequence

from gpt3jax.page import bars, document, elements, scales, tables, timelines
from gpt3jax.record import console_line
from gpt3jax.report import positions, run_folder
from gpt3jax.watch import goodput, phases

Html = elements.Html
tag = elements.tag
# What the time of a start goes into, about in the order of a start; and the colour of each.
_KINDS = {
    phases.START: 0, phases.RESTORE: 5, phases.COMPILE: 1, phases.MOVE: 7, "steps": 2,
    phases.DATA: 8, phases.EVALUATE: 6, phases.SAVE: 3, "lost steps": 4,
}  # fmt: skip
_HEAD = (
    "start", "began (UTC)", "took", "pause before", "steps", "lost", "mesh", "devices", "jax",
    "ended",
)  # fmt: skip
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
    note += f", and {console_line.duration(between)} between them" if between >= 1 else ""

    def shown(seconds: float) -> str:
        return f"{seconds / total:.1%}, {console_line.duration(seconds)}"

    return tag("div", bars.bar(parts, shown), document.note(note))


def _color(kind: str) -> str:
    return bars.color_class(_KINDS.get(kind, 9))


def timeline(runs: Sequence[run_folder.Run], labels: Sequence[str]) -> Html:
    """Return the starts of a run as blocks over real time; of several, each since its begin."""
    with_starts = [(run, label) for run, label in zip(runs, labels, strict=True) if run.starts]
    length = max(_ended(run) - run.starts[0].began for run, _ in with_starts) or 1.0
    rows = [
        (label if len(runs) > 1 else "", elements.join(_blocks(run, length)))
        for run, label in with_starts
    ]
    run = with_starts[0][0]
    if len(runs) == 1:
        began, ended = run.starts[0].began, _ended(run)
        moments = scales.time_ticks(began, began + length, 5)
        ticks = [((moment - began) / length, name) for moment, name in moments]
        note = f"{scales.utc(began):%d %b %Y %H:%M} to {scales.utc(ended):%d %b %Y %H:%M} UTC"
    else:
        unit = positions.unit_of(length)
        scale = scales.Scale(low=0.0, high=length / unit.seconds)
        ticks = [(scale.share(tick), scales.short(tick)) for tick in scale.ticks(6)]
        note = f"{unit.name} since the first start of each run"
    if any(run.checkpoints for run, _ in with_starts):
        note += "; small marks are checkpoints"
    return tag("div", timelines.timeline(rows, ticks), document.note(note))


def _ended(run: run_folder.Run) -> float:
    return max(start.began + start.total for start in run.starts)


def _blocks(run: run_folder.Run, length: float) -> list[Html]:
    """Return a start's parts, each kind once: the order within a start is not recorded."""
    blocks, began = [], run.starts[0].began
    all_spent = goodput.spent(list(run.starts))
    for number, (start, spent) in enumerate(zip(run.starts, all_spent, strict=True), 1):
        at, about = start.began - began, f"start {number}, steps {start.first_step:,} to "
        for kind in sorted(spent, key=_place):
            title = f"{about}{start.step:,}: {kind} {console_line.duration(spent[kind])}"
            style = f"left:{at / length:.3%};width:{spent[kind] / length:.3%}"
            if spent[kind] > 0:
                blocks.append(tag("i", class_=_color(kind), title=title, style=style))
            at += spent[kind]
    for entry in run.checkpoints or ():
        style = f"left:{(entry.written - began) / length:.3%}"
        title = f"checkpoint of step {entry.step:,}"
        blocks.append(tag("i", class_="point", title=title, style=style))
    return blocks


def _place(kind: str) -> int:
    return list(_KINDS).index(kind) if kind in _KINDS else len(_KINDS)


def table(run: run_folder.Run) -> Html:
    """Return the starts of a run as a table: when, how far, on which layout, and how it ended."""
    starts = list(run.starts)
    lost = goodput.lost_steps(starts)
    rows = [_row(starts, i, lost[i]) for i in range(len(starts))]
    notes = []
    if len(rows) > _N_ROWS:
        notes.append(document.note(f"The first {len(rows) - _N_ROWS:,} starts are left out."))
    if any(not start.end for start in starts[:-1]):
        known = "What is known of a killed start ends up to 10 s before the kill."
        notes.append(document.note(known))
    return tag("div", tables.table(_HEAD, rows[-_N_ROWS:]), *notes)


def _row(starts: list[goodput.Start], i: int, n_lost: int) -> tuple[str, ...]:
    start = starts[i]
    is_over = i + 1 < len(starts)
    pause = start.began - starts[i - 1].began - starts[i - 1].total if i else math.nan
    return (
        f"{i + 1}",
        f"{scales.utc(start.began):%Y-%m-%d %H:%M:%S}",
        console_line.duration(start.total),
        console_line.duration(pause) if i else "",
        f"{start.first_step:,} to {start.step:,}",
        f"{n_lost:,}" if n_lost else "",
        *(start.layout.get(name, "") for name in ("mesh", "devices", "jax")),
        start.end or ("killed or failed" if is_over else "killed, failed, or still running"),
    )
