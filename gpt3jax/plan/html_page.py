"""A plan's report as one HTML page that needs nothing else: bars of memory and time, tables."""

import html
from collections.abc import Iterable, Mapping

from gpt3jax.plan import report, report_rows

GIB = report_rows.GIB
_COLORS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5")
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #1c1e21; }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse; margin: .6rem 0 } td, th { padding: .15rem .8rem .15rem 0;
  text-align: left; vertical-align: top } td.n, th.n { text-align: right }
tr + tr td { border-top: 1px solid #e4e6eb }
.bar { display: flex; height: 2rem; border: 1px solid #bbb; border-radius: 3px; overflow: hidden }
.key span { display: inline-block; margin-right: 1rem } .key i { display: inline-block;
  width: .8rem; height: .8rem; margin-right: .3rem; border-radius: 2px }
.no { color: #b00020; font-weight: bold } .yes { color: #1b7f3b; font-weight: bold }
code { background: #f2f3f5; padding: .1rem .3rem; border-radius: 3px }
small { color: #606770 }
"""


def render(plan: report.Report, command_line: str) -> str:
    """Return the page of a report, with the command line that gave it."""
    seconds = plan.time.step_seconds
    fits = '<span class="yes">fits</span>' if plan.peak.fits else '<span class="no">no fit</span>'
    peak = f"{plan.peak.peak_bytes_per_gpu / GIB:.1f} GiB, {fits}"
    spread = f"{seconds.low:.3g} to {seconds.high:.3g} s"
    parts = [
        "<h1>gpt3jax plan</h1>",
        f"<p>{html.escape(report_rows.head(plan))}</p>",
        f"<p><code>{html.escape(command_line)}</code></p>",
        *(f'<p class="no">{html.escape(problem)}</p>' for problem in plan.problems),
        f"<h2>Memory of a GPU: {peak}</h2>",
        _memory(plan.peak),
        f"<h2>Step: {seconds.expected:.3g} s (estimate; {spread})</h2>",
        _time(plan),
        f"<h2>Collectives of a step ({plan.time.collectives_are})</h2>",
        _table(report_rows.COLLECTIVES, report_rows.collectives(plan)),
    ]
    if plan.search:
        ranked = _table(report_rows.SEARCHED, report_rows.searched(plan.search))
        parts += ["<h2>Layouts of the search, fastest first; the first is this page's</h2>", ranked]
    if plan.compiled:
        arrays = _table(report_rows.BUFFERS, report_rows.buffers(plan.compiled))
        parts += ["<h2>Largest temporary arrays (compiled)</h2>", arrays]
    parts += ["<h2>Assumptions</h2>", _assumptions(plan)]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>gpt3jax plan</title><style>{_STYLE}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )


def _memory(peak: report.Peak) -> str:
    shares = {name: n_bytes / GIB for name, n_bytes in peak.memory.items()}
    shares["headroom"] = peak.headroom_bytes / GIB
    free = peak.budget_bytes / GIB - sum(shares.values())
    note = (
        f"Budget {peak.budget_bytes / GIB:.1f} GiB, peak {peak.peak_is}; parameters, optimizer and "
        "batch are exact, the rest of the split is estimated. Headroom is what the compiler cannot "
        "see: cuDNN's workspace, fragmentation."
    )
    return _bar(shares, "GiB", free) + f"<p><small>{note}</small></p>"


def _time(plan: report.Report) -> str:
    parts = plan.time.step_parts_expected
    shares = {
        "matmul": parts.matmul, "attention": parts.attention, "elementwise": parts.elementwise,
    }  # fmt: skip
    waits: dict[str, float] = {}
    for traffic in plan.time.collectives:
        name = f"waiting for {traffic.axis}"
        waits[name] = waits.get(name, 0.0) + traffic.exposed
    least = report_rows.SMALL * plan.time.step_seconds.expected
    waits = {name: seconds for name, seconds in waits.items() if seconds > least}
    return _bar(shares | waits, "s") + _table((), report_rows.facts(plan))


def _assumptions(plan: report.Report) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in plan.versions.items())
    note = html.escape(f"{report_rows.network(plan)}. Versions: {versions}")
    head = ("", "best / expected / worst", "")
    return _table(head, report_rows.assumptions(plan)) + f"<p><small>{note}</small></p>"


def _bar(shares: Mapping[str, float], unit: str, free: float = 0.0) -> str:
    whole = sum(shares.values()) + max(free, 0.0)
    blocks, keys = [], []
    for i, (name, share) in enumerate(shares.items()):
        color = _COLORS[i % len(_COLORS)]
        label = html.escape(f"{name}: {share:.3g} {unit}")
        blocks.append(
            f'<div title="{label}" style="width:{share / whole:.3%};background:{color}"></div>'
        )
        keys.append(f'<span><i style="background:{color}"></i>{label}</span>')
    if free > 0:
        keys.append(f"<span>free: {free:.3g} {unit}</span>")
    return f'<div class="bar">{"".join(blocks)}</div><p class="key">{"".join(keys)}</p>'


def _table(head: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    """Return a table; its first row decides which columns are numbers."""
    cells = [tuple(row) for row in body]
    numbers = [cell[:1].isdigit() for cell in cells[0]] if cells else []

    def line(kind: str, row: Iterable[str]) -> str:
        marks = [' class="n"' if number else "" for number in numbers]
        columns = (
            f"<{kind}{mark}>{html.escape(cell)}</{kind}>"
            for mark, cell in zip(marks, row, strict=False)
        )
        return f"<tr>{''.join(columns)}</tr>"

    lines = [line("th", head), *(line("td", row) for row in cells)]
    return "<table>" + "\n".join(lines) + "</table>"
