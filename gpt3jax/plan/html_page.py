"""A plan's report as one HTML page that needs nothing else: bars of memory and time, tables."""

from gpt3jax.page import bars, document, elements, tables
from gpt3jax.plan import report, report_rows, step_report

Html = elements.Html
tag = elements.tag
GIB = report_rows.GIB


def render(plan: report.Report, command_line: str) -> str:
    """Return the page of a report, with the command line that gave it."""
    body = [
        document.header("Plan", tag("p", report_rows.head(plan)), tag("code", command_line)),
        *(document.warning(line) for line in (*plan.problems, *plan.notes)),
        tables.tiles(_figures(plan)),
        document.section(
            f"Batch sizes (layouts: {plan.layouts_are})",
            tables.table(report_rows.BATCHES, report_rows.batches(plan)),
            document.note(report_rows.run(plan)),
        ),
        document.section("Memory of a GPU in a full batch", *_memory(plan.peak)),
        document.section("Time of a step of a full batch", *_time(plan)),
        document.section(
            f"Collectives of a step ({plan.time.collectives_are})",
            tables.table(report_rows.COLLECTIVES, report_rows.collectives(plan)),
        ),
    ]
    if plan.search:
        ranked = tables.table(report_rows.SEARCHED, report_rows.searched(plan.search))
        title = "Layouts of the search, best first"
        body.append(document.section(title, ranked))
    if plan.compiled:
        arrays = tables.table(report_rows.BUFFERS, report_rows.buffers(plan.compiled))
        body.append(document.section("Largest temporary arrays (compiled)", arrays))
    body.append(document.section("Assumptions", *_assumptions(plan)))
    return document.document("gpt3jax plan", body)


def _figures(plan: report.Report) -> list[tables.Tile]:
    seconds, run, peak = plan.time.step_seconds, plan.run, plan.peak
    spread = f"{seconds.low:.3g} to {seconds.high:.3g}"
    per_gpu = plan.time.tokens_per_second_per_gpu
    shown = [
        (
            "memory of a GPU",
            f"{peak.peak_bytes_per_gpu / GIB:.1f} GiB",
            f"{'fits' if peak.fits else 'does not fit'} in {peak.budget_bytes / GIB:.1f}",
        ),
        ("step, estimated", f"{seconds.expected:.3g} s", spread),
        ("MFU, estimated", f"{plan.time.mfu:.1%}", f"{per_gpu:,.0f} tokens/s a GPU"),
        ("run", f"{run.run_days:,.1f} days", f"{run.gpu_hours:,.0f} GPU-hours"),
        ("tokens", f"{run.run_tokens / 1e9:,.1f}B", f"{run.run_steps:,} steps"),
    ]
    if run.cost is not None:
        shown.append(("cost", f"{run.cost:,.0f}", "at the price given"))
    return shown


def _memory(peak: step_report.Peak) -> list[Html]:
    sizes = {name: n_bytes / GIB for name, n_bytes in peak.memory.items()}
    sizes["headroom"] = peak.headroom_bytes / GIB
    free = peak.budget_bytes / GIB - sum(sizes.values())
    note = (
        f"Budget {peak.budget_bytes / GIB:.1f} GiB, peak {peak.peak_is}; parameters, optimizer and "
        "batch are exact, the rest of the split is estimated. Headroom is what the compiler cannot "
        "see: cuDNN's workspace, fragmentation."
    )
    bar = bars.bar(bars.colored(sizes), lambda size: f"{size:.3g} GiB", free)
    verdict = tag("p", "fits", class_="yes") if peak.fits else tag("p", "no fit", class_="no")
    return [verdict, bar, document.note(note)]


def _time(plan: report.Report) -> list[Html]:
    parts = plan.time.step_parts_expected
    sizes = {
        "matmul": parts.matmul, "attention": parts.attention, "elementwise": parts.elementwise,
    }  # fmt: skip
    waits: dict[str, float] = {}
    for traffic in plan.time.collectives:
        name = f"waiting for {traffic.axis}"
        waits[name] = waits.get(name, 0.0) + traffic.exposed
    least = report_rows.SMALL * plan.time.step_seconds.expected
    waits = {name: seconds for name, seconds in waits.items() if seconds > least}
    bar = bars.bar(bars.colored(sizes | waits), lambda size: f"{size:.3g} s")
    return [bar, tables.table((), report_rows.facts(plan))]


def _assumptions(plan: report.Report) -> list[Html]:
    versions = ", ".join(f"{name} {version}" for name, version in plan.versions.items())
    head = ("", "best / expected / worst", "")
    note = f"{report_rows.network(plan)}. Versions: {versions}"
    return [tables.table(head, report_rows.assumptions(plan)), document.note(note)]
