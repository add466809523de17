"""`python -m gpt3jax.report RUN [RUN ...] [--html FILE]`: how runs went, side by side.

RUN is the log.dir of a run, or a folder that has it as logs/, such as runs/quickstart. With --html
the report is a page: one file that needs no network. Else a summary is printed. Nothing of a run is
changed, and it may go on meanwhile.
"""

import dataclasses
import sys
import time
from typing import Annotated

import tyro
from rich import box, console, markup, table

from gpt3jax import errors
from gpt3jax.config import command_line, user_paths
from gpt3jax.report import figures, html_page, run_folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to report on, and where to."""

    runs: tyro.conf.Positional[
        Annotated[tuple[user_paths.Path, ...], tyro.conf.arg(metavar="RUN [RUN ...]")]
    ]
    """log.dir of a run, or a folder that has it as logs/. Several are compared."""
    html: user_paths.Path = ""
    """File for the report as a web page."""


def main() -> int:
    """Report; the exit status is 2 for errors."""
    return command_line.run(_report)


def _report() -> int:
    options = command_line.parse(Options, "report", __doc__)
    if not options.runs:
        raise errors.UserError(
            "no RUN is given: name the log.dir of a run, such as runs/quickstart",
            page="watching.md#the-report",
        )
    runs, now = run_folder.read_all(options.runs), time.time()
    out = console.Console(highlight=False)
    if options.html:
        user_paths.write(options.html, html_page.render(runs, now))
        out.print(f"wrote {options.html}", markup=False, soft_wrap=True)
    else:
        _print_summary(runs, now, out)
    return errors.DONE


def _print_summary(runs: list[run_folder.Run], now: float, out: console.Console) -> None:
    shown = table.Table(box=box.SIMPLE)
    shown.add_column("")
    for label in html_page.labels(runs):
        shown.add_column(markup.escape(label))
    for name, cells in figures.side_by_side(runs, now).items():
        shown.add_row(name, *map(markup.escape, cells))
    out.print(shown)
    for run in runs:
        for note in run.notes:
            out.print(f"{run.name}: {note}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
