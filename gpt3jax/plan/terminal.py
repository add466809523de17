"""A report as tables on a terminal."""

from rich import box, console, table

from gpt3jax.hardware import xla_flags
from gpt3jax.plan import report, report_rows


def show(plan: report.Report, out: console.Console) -> None:
    """Print a report as tables, on a console that takes no markup."""
    if plan.search:
        _show_search(plan.search, out)
    out.print(report_rows.head(plan))
    out.print(_memory_table(plan))
    out.print(_collectives_table(plan))
    if plan.compiled:
        out.print(_buffers_table(plan.compiled))
    out.print(_time_table(plan))
    out.print(
        "Times are estimates: nothing ran on a GPU. Assumed, as best / expected / worst (shares):"
    )
    for row in report_rows.assumptions(plan):
        out.print(f"  {': '.join(row)}", highlight=False, soft_wrap=True)
    out.print(f"  {report_rows.network(plan)}", highlight=False, soft_wrap=True)
    out.print(_batches_table(plan))
    out.print(report_rows.run(plan), highlight=False, soft_wrap=True)
    if advice := report_rows.advice(plan):
        out.print(advice, soft_wrap=True)
    for problem in plan.problems:
        out.print(f"WARNING: gpt3jax.main would refuse this run: {problem}", soft_wrap=True)


def _show_search(layouts: list[report.SearchedLayout], out: console.Console) -> None:
    """Print the layouts of a search, with the options of each."""
    title = "Layouts of each batch size, best first (times are estimates)"
    lines = _table(title, *report_rows.SEARCHED[:-1])
    for *cells, _ in report_rows.searched(layouts):
        lines.add_row(*cells)
    out.print(lines)
    for i, row in enumerate(layouts):
        failed = f" ({row.failed})" if row.failed else ""
        out.print(f"{i + 1}: {' '.join(row.overrides)}{failed}", highlight=False, soft_wrap=True)


def _memory_table(plan: report.Report) -> table.Table:
    peak = plan.peak
    lines = _table(f"Memory of a GPU ({peak.peak_is} peak)", "", "GiB")
    for name, n_bytes in peak.memory.items():
        exact = name in ("parameters", "optimizer", "batch")
        lines.add_row(
            f"{name}{'' if exact else ' (estimate)'}", report_rows.figure(n_bytes / report_rows.GIB)
        )
    lines.add_section()
    lines.add_row("peak", report_rows.figure(peak.peak_bytes_per_gpu / report_rows.GIB))
    if plan.compiled:
        closed_form = peak.estimated_peak_bytes_per_gpu / report_rows.GIB
        lines.add_row("peak by the closed forms", report_rows.figure(closed_form))
    lines.add_row(
        "headroom: cuDNN's workspace, fragmentation", f"{peak.headroom_bytes / report_rows.GIB:.2f}"
    )
    lines.add_row(
        f"budget: XLA_CLIENT_MEM_FRACTION={xla_flags.MEMORY_FRACTION}",
        f"{peak.budget_bytes / report_rows.GIB:.2f}",
    )
    lines.add_row("fits", "yes" if peak.fits else "NO")
    return lines


def _batches_table(plan: report.Report) -> table.Table:
    title = f"Batch sizes (layouts: {plan.layouts_are}; times are estimates; tokens/s a GPU)"
    lines = _table(title, *report_rows.BATCHES)
    for cells in report_rows.batches(plan):
        lines.add_row(*cells)
    return lines


def _collectives_table(plan: report.Report) -> table.Table:
    origin = plan.time.collectives_are
    title = f"Collectives of a step ({origin}; seconds estimated, each alone)"
    lines = _table(title, *report_rows.COLLECTIVES)
    least = report_rows.SMALL * plan.time.step_seconds.expected
    for traffic, cells in zip(plan.time.collectives, report_rows.collectives(plan), strict=True):
        if max(traffic.seconds, traffic.exposed) >= least:
            lines.add_row(*cells)
    return lines


def _buffers_table(compiled: report.CompiledStep) -> table.Table:
    lines = _table("Largest temporary arrays (compiled)", *report_rows.BUFFERS)
    for cells in report_rows.buffers(compiled):
        lines.add_row(*cells)
    return lines


def _time_table(plan: report.Report) -> table.Table:
    lines = _table("Time (estimate)", "", "")
    seconds, parts = plan.time.step_seconds, plan.time.step_parts_expected
    lines.add_row("step", f"{seconds.expected:.3g} s ({seconds.low:.3g} to {seconds.high:.3g})")
    for label, part in (
        ("matmul", parts.matmul),
        ("attention", parts.attention),
        ("elementwise", parts.elementwise),
        ("exposed communication", parts.exposed),
    ):
        lines.add_row(f"  {label}", f"{part:.3g} s")
    for name, value in report_rows.facts(plan):
        lines.add_row(name, value)
    if plan.compiled:
        lines.add_section()
        passes = plan.compiled.fused_attention
        used = {name: "yes" if is_used else "no" for name, is_used in passes.items()}
        kernels = ", ".join(f"{name} {answer}" for name, answer in used.items())
        lines.add_row("fused attention in the program", kernels)
        lines.add_row("compiled in", f"{plan.compile_seconds:.1f} s")
    return lines


def _table(title: str, *columns: str) -> table.Table:
    lines = table.Table(title=title, box=box.SIMPLE, title_justify="left")
    words = {"", "kind", "axis", "network", "shape", "made by", "source", "layout"}
    for i, column in enumerate(columns):
        text = column in words and (i == 0 or bool(column))
        lines.add_column(column, justify="left" if text else "right")
    return lines
