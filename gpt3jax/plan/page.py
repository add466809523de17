"""A plan's report as one HTML page that needs nothing else: bars of memory and time, tables."""

import html
from collections.abc import Iterable, Mapping
from typing import Any

from gpt3jax.plan import rows

GIB = rows.GIB
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


def render(found: Mapping[str, Any], command: str) -> str:
    """Return the page of a report, as `terminal.show` takes it, that a command line gave."""
    fits = '<span class="yes">fits</span>' if found["fits"] else '<span class="no">no fit</span>'
    low, expected, high = found["step_seconds"].values()
    parts = [
        "<h1>gpt3jax plan</h1>",
        f"<p>{html.escape(rows.head(found))}</p>",
        f"<p><code>{html.escape(command)}</code></p>",
        *(f'<p class="no">{html.escape(problem)}</p>' for problem in found["problems"]),
        f"<h2>Memory of a GPU: {found['peak_bytes_per_gpu'] / GIB:.1f} GiB, {fits}</h2>",
        _memory(found),
        f"<h2>Step: {expected:.3g} s (estimate; {low:.3g} to {high:.3g} s)</h2>",
        _time(found),
        f"<h2>Collectives of a step ({found['collectives_are']})</h2>",
        _table(rows.COLLECTIVES, rows.of_collectives(found)),
    ]
    if found["search"]:
        ranked = _table(rows.SEARCHED, rows.of_search(found["search"]))
        parts += ["<h2>Layouts of the search, fastest first; the first is this page's</h2>", ranked]
    if found["compiled"]:
        arrays = _table(rows.BUFFERS, rows.of_buffers(found))
        parts += ["<h2>Largest temporary arrays (compiled)</h2>", arrays]
    parts += ["<h2>Assumptions</h2>", _assumptions(found)]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>gpt3jax plan</title><style>{_STYLE}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )


def _memory(found: Mapping[str, Any]) -> str:
    shares = {name: n / GIB for name, n in found["memory"].items()}
    shares["headroom"] = found["headroom_bytes"] / GIB
    free = found["budget_bytes"] / GIB - sum(shares.values())
    note = (
        f"Budget {found['budget_bytes'] / GIB:.1f} GiB, peak {found['peak_is']}; the split is "
        "estimated but for parameters, optimizer and batch. Headroom is what the compiler cannot "
        "see: cuDNN's workspace, fragmentation."
    )
    return _bar(shares, "GiB", free) + f"<p><small>{note}</small></p>"


def _time(found: Mapping[str, Any]) -> str:
    parts = found["step_parts_expected"]
    shares = {name: parts[name] for name in ("matmul", "attention", "elementwise")}
    waits = {f"waiting for {one['axis']}": 0.0 for one in found["collectives"]}
    for one in found["collectives"]:
        waits[f"waiting for {one['axis']}"] += one["exposed"]
    least = rows.SMALL * found["step_seconds"]["expected"]
    waits = {name: seconds for name, seconds in waits.items() if seconds > least}
    return _bar(shares | waits, "s") + _table((), rows.facts(found))


def _assumptions(found: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    told = html.escape(f"{rows.network(found)}. Versions: {versions}")
    head = ("", "best / expected / worst", "")
    return _table(head, rows.of_assumptions(found)) + f"<p><small>{told}</small></p>"


def _bar(shares: Mapping[str, float], unit: str, free: float = 0.0) -> str:
    whole = sum(shares.values()) + max(free, 0.0)
    blocks, keys = [], []
    for i, (name, share) in enumerate(shares.items()):
        color = _COLORS[i % len(_COLORS)]
        told = html.escape(f"{name}: {share:.3g} {unit}")
        blocks.append(
            f'<div title="{told}" style="width:{share / whole:.3%};background:{color}"></div>'
        )
        keys.append(f'<span><i style="background:{color}"></i>{told}</span>')
    if free > 0:
        keys.append(f"<span>free: {free:.3g} {unit}</span>")
    return f'<div class="bar">{"".join(blocks)}</div><p class="key">{"".join(keys)}</p>'


def _table(head: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    """Return a table; a column is as the cells of its first row are, numbers or text."""
    cells = [tuple(row) for row in body]
    numbers = [cell[:1].isdigit() for cell in cells[0]] if cells else []

    def line(kind: str, row: Iterable[str]) -> str:
        marks = [' class="n"' if number else "" for number in numbers]
        told = (
            f"<{kind}{mark}>{html.escape(cell)}</{kind}>"
            for mark, cell in zip(marks, row, strict=False)
        )
        return f"<tr>{''.join(told)}</tr>"

    lines = [line("th", head), *(line("td", row) for row in cells)]
    return "<table>" + "\n".join(lines) + "</table>"
