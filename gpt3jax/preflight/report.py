"""The report: the checks as a table, and as one JSON object."""

from collections.abc import Sequence

from rich import box, console, table

from gpt3jax.preflight import checks

_STYLES = {"ok": "green", "warn": "yellow", "retry": "red", "fail": "bold red"}


def show(results: Sequence[checks.Check], seconds: float, out: console.Console) -> None:
    """Print the table, then every line of each check in full."""
    rows = table.Table(title="Preflight", box=box.SIMPLE, title_justify="left")
    for column in ("check", "result", ""):
        rows.add_column(column, overflow="fold")
    for check in results:
        status = "fail" if check.status == "retry" else check.status
        rows.add_row(check.name, check.result, f"[{_STYLES[check.status]}]{status}[/]")
    out.print(rows)
    for check in results:
        for line in check.lines:
            out.print(f"{check.name}: {line.text}", markup=False, highlight=False, soft_wrap=True)
    out.print(f"{summary(results)} in {seconds:.1f} s", highlight=False)


def summary(results: Sequence[checks.Check]) -> str:
    """Return one line: the number of checks, how many warn, and which failed."""
    failed = [check.name for check in results if check.status in ("fail", "retry")]
    n_warn = sum(check.status == "warn" for check in results)
    counts = f"{len(results)} checks, {n_warn} with warnings"
    return f"{counts}, failed: {', '.join(failed)}" if failed else f"{counts}, none failed"


def to_json(results: Sequence[checks.Check], seconds: float) -> dict[str, object]:
    """Return the report as plain data."""
    passed = all(check.status in ("ok", "warn") for check in results)
    return {"passed": passed, "seconds": seconds, "checks": checks.to_json(results)}
