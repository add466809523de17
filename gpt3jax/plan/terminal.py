"""A report as tables on a terminal."""

from collections.abc import Mapping
from typing import Any

from rich import box, console, table

from gpt3jax.hardware import xla_flags
from gpt3jax.plan import rows, time_model


def show(found: Mapping[str, Any], out: console.Console) -> None:
    """Print a plan's report as tables, on a console that takes no markup.

    It has the layouts of a search under "search", of which it is the best; none without a search.
    """
    out.print(rows.head(found))
    out.print(_memory_table(found))
    out.print(_collectives_table(found))
    if found["compiled"]:
        out.print(_buffers_table(found))
    out.print(_time_table(found))
    out.print(
        "Times are estimates: nothing ran on a GPU. Assumed, as best / expected / worst (shares):"
    )
    for row in rows.of_assumptions(found):
        out.print(f"  {': '.join(row)}", highlight=False, soft_wrap=True)
    out.print(f"  {rows.network(found)}", highlight=False, soft_wrap=True)
    if not found["search"] and (advice := rows.advice(found)):
        out.print(advice, soft_wrap=True)
    for problem in found["problems"]:
        out.print(f"WARNING: gpt3jax.main would refuse this run: {problem}", soft_wrap=True)


def show_search(layouts: list[dict[str, Any]], out: console.Console) -> None:
    """Print the layouts that a search compiled, fastest first, with the options of each."""
    found = _table("Layouts, fastest first (estimates)", *rows.SEARCHED[:-1])
    for *cells, _ in rows.of_search(layouts):
        found.add_row(*cells)
    out.print(found)
    for i, row in enumerate(layouts):
        failed = f" ({row['failed']})" if row["failed"] else ""
        told = f"{i + 1}: {' '.join(row['overrides'])}{failed}"
        out.print(told, highlight=False, soft_wrap=True)
    if any(row["drops_schedule"] for row in layouts):
        out.print(
            "Layouts with --batch.schedule= or --batch.ramp leave out the recipe's growing batch, "
            "whose small ones do not divide over so many ranks.",
            soft_wrap=True,
        )
    if not any(row["fits"] for row in layouts):
        out.print("WARNING: none of these layouts fits.")


def _memory_table(found: Mapping[str, Any]) -> table.Table:
    lines = _table(f"Memory of a GPU ({found['peak_is']} peak)", "", "GiB")
    for name, n_bytes in found["memory"].items():
        exact = name in ("parameters", "optimizer", "batch")
        lines.add_row(f"{name}{'' if exact else ' (estimate)'}", rows.figure(n_bytes / rows.GIB))
    lines.add_section()
    lines.add_row("peak", rows.figure(found["peak_bytes_per_gpu"] / rows.GIB))
    if found["compiled"]:
        closed_form = found["estimated_peak_bytes_per_gpu"] / rows.GIB
        lines.add_row("peak by the closed forms", rows.figure(closed_form))
    lines.add_row(
        "headroom: cuDNN's workspace, fragmentation", f"{found['headroom_bytes'] / rows.GIB:.2f}"
    )
    lines.add_row(
        f"budget: XLA_PYTHON_CLIENT_MEM_FRACTION={xla_flags.MEMORY_FRACTION}",
        f"{found['budget_bytes'] / rows.GIB:.2f}",
    )
    lines.add_row("fits", "yes" if found["fits"] else "NO")
    return lines


def _collectives_table(found: Mapping[str, Any]) -> table.Table:
    title = f"Collectives of a step ({found['collectives_are']}; seconds estimated, each alone)"
    lines = _table(title, *rows.COLLECTIVES)
    least = rows.SMALL * found["step_seconds"]["expected"]
    for one, row in zip(found["collectives"], rows.of_collectives(found), strict=True):
        if max(one["seconds"], one["exposed"]) >= least:
            lines.add_row(*row)
    return lines


def _buffers_table(found: Mapping[str, Any]) -> table.Table:
    lines = _table("Largest temporary arrays (compiled)", *rows.BUFFERS)
    for row in rows.of_buffers(found):
        lines.add_row(*row)
    return lines


def _time_table(found: Mapping[str, Any]) -> table.Table:
    lines = _table("Time (estimate)", "", "")
    low, expected, high = (found["step_seconds"][case] for case in time_model.CASES)
    lines.add_row("step", f"{expected:.3g} s ({low:.3g} to {high:.3g})")
    parts = found["step_parts_expected"]
    for name in ("matmul", "attention", "elementwise", "exposed"):
        label = {"exposed": "exposed communication"}.get(name, name)
        lines.add_row(f"  {label}", f"{parts[name]:.3g} s")
    for name, value in rows.facts(found):
        lines.add_row(name, value)
    if found["compiled"]:
        lines.add_section()
        kernels = ", ".join(f"{name} {'yes' if used else 'no'}" for name, used
                            in found["compiled"]["cudnn"].items())  # fmt: skip
        lines.add_row("cuDNN attention in the program", kernels)
        lines.add_row("compiled in", f"{found['compile_seconds']:.1f} s")
    return lines


def _table(title: str, *columns: str) -> table.Table:
    lines = table.Table(title=title, box=box.SIMPLE, title_justify="left")
    words = {"", "kind", "axis", "network", "shape", "made by", "source"}
    for i, column in enumerate(columns):
        text = column in words and (i == 0 or bool(column))
        lines.add_column(column, justify="left" if text else "right")
    return lines
