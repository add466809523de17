"""The report as one HTML page that needs nothing else."""

import pathlib
from collections.abc import Callable, Sequence

from gpt3jax.page import document, elements, scales
from gpt3jax.report import curves, run_folder, sections, starts_of_run

Html = elements.Html
tag = elements.tag


def render(runs: Sequence[run_folder.Run], now: float) -> str:
    """Return the page of runs as they are at a moment (Unix time)."""
    names = labels(runs)
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    made = f"Run report of {scales.utc(now):%Y-%m-%d %H:%M} UTC"
    body = [
        document.header(title, document.note(made)),
        *sections.notes(runs),
        sections.headline(runs, names, now),
        document.section("Curves", curves.draw(runs, names)),
        *_time(runs, names),
        *_part("What resumes changed", runs, names, sections.resumes),
        *_part("Steps taken again", runs, names, sections.retaken),
        *_part("Faults", runs, names, lambda run: [sections.faults(run)] if run.faults else []),
        *_part("Checkpoints", runs, names, lambda run: [sections.checkpoints(run)]),
    ]
    if len(runs) > 1:
        body.append(document.section("Differences of config", sections.differences(runs, names)))
    return document.document(f"gpt3jax: {title}", body, has_charts=True)


def labels(runs: Sequence[run_folder.Run]) -> list[str]:
    """Return short names of runs: the last parts of their folders, if these differ."""
    folders = [pathlib.Path(run.name) for run in runs]
    last = [folder.parent.name if folder.name == "logs" else folder.name for folder in folders]
    return last if len(set(last)) == len(last) and all(last) else [run.name for run in runs]


def _time(runs: Sequence[run_folder.Run], names: Sequence[str]) -> list[Html]:
    """Return goodput and starts of the runs that have an account of their time."""
    if not any(start.total > 0 for run in runs for start in run.starts):
        return []
    bars_of = _part(
        "Goodput", runs, names, lambda run: [starts_of_run.goodput_bar(run)] if run.starts else []
    )
    tables_of = sections.per_run(
        runs, names, [[starts_of_run.table(run)] if run.starts else [] for run in runs]
    )
    return [*bars_of, document.section("Starts", starts_of_run.timeline(runs, names), *tables_of)]


def _part(
    title: str,
    runs: Sequence[run_folder.Run],
    names: Sequence[str],
    of: Callable[[run_folder.Run], list[Html]],
) -> list[Html]:
    """Return a section of what there is of each run; nothing where there is nothing."""
    content = sections.per_run(runs, names, [of(run) for run in runs])
    return [document.section(title, *content)] if content else []
