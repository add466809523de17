"""The checks as a table for people, and as one JSON object."""

from collections.abc import Sequence
from typing import Any

from rich import box, console, table

from gpt3jax.preflight import checks

_STYLES = {"ok": "green", "warn": "yellow", "retry": "red", "fail": "bold red"}


def show(found: Sequence[checks.Check], seconds: float, out: console.Console) -> None:
    """Print the table, then every finding in full."""
    rows = table.Table(title="Preflight", box=box.SIMPLE, title_justify="left")
    for column in ("check", "result", ""):
        rows.add_column(column, overflow="fold")
    for check in found:
        status = "fail" if check.status == "retry" else check.status
        rows.add_row(check.name, check.told, f"[{_STYLES[check.status]}]{status}[/]")
    out.print(rows)
    for check in found:
        for line in check.lines:
            out.print(f"{check.name}: {line.text}", markup=False, highlight=False, soft_wrap=True)
    out.print(f"{summary(found)} in {seconds:.1f} s", highlight=False)


def summary(found: Sequence[checks.Check]) -> str:
    """Return one line: how many checks were made, how many warn, which failed."""
    failed = [check.name for check in found if check.status in ("fail", "retry")]
    n_warn = sum(check.status == "warn" for check in found)
    told = f"{len(found)} checks, {n_warn} with warnings"
    return f"{told}, failed: {', '.join(failed)}" if failed else f"{told}, none failed"


def to_json(found: Sequence[checks.Check], seconds: float) -> dict[str, Any]:
    """Return the report as plain data."""
    passed = all(check.status in ("ok", "warn") for check in found)
    return {"passed": passed, "seconds": seconds, "checks": checks.to_json(found)}
