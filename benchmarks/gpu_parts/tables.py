"""The results of `benchmarks/gpu.py` as Markdown: how each part ended; training beside the plan."""


def render(results):
    """Return a table of all parts, and one of the training steps if any were measured."""
    rows = [
        [r["part"], r["status"], f"{r['seconds']:.0f} of {r['limit']:.0f}", in_words(r)]
        for r in results
    ]
    parts = table(["part", "result", "seconds", "found"], rows)
    steps = {r["part"]: r["values"] for r in results if "tokens/s" in r["values"]}
    if not steps:
        return parts
    head = ["training", "layout", "peak GiB: run, compiled, plan", "tokens/s", "plan"]
    head += ["run / plan", "MFU", "plan"]
    return parts + "\n" + table(head, [training(name, steps) for name in steps])


def training(name, steps):
    """Return the row of a training step: what was measured beside the plan's closed forms."""
    v = steps[name]
    low, expected, high = v["plan tokens/s"]
    gib = ", ".join(f"{v[key]:.1f}" if key in v else "-" for key in ("GiB", "compiled GiB"))
    varied = name.partition(" ")[0]
    change = f" ({v['tokens/s'] / steps[varied]['tokens/s'] - 1:+.1%})" if (
        name != varied and varied in steps
    ) else ""  # fmt: skip
    return [
        name,
        f"{v['layout']}, {v['attention']}",
        f"{gib}, {v['plan GiB']:.1f}",
        f"{v['tokens/s']:,.0f}{change}",
        f"{expected:,.0f} ({low:,.0f} to {high:,.0f})",
        f"{v['tokens/s'] / expected:.2f}",
        f"{v['MFU']:.1%}" if "MFU" in v else "-",
        f"{v['plan MFU']:.1%}",
    ]


def in_words(result):
    """Return what a part found, and first why it did not end well."""
    values = result["values"]
    if "tokens/s" in values:  # the rest is in the other table
        values = {name: v for name, v in values.items() if isinstance(v, dict)}
    shown = [f"{name}: {value_in_words(value)}" for name, value in values.items()]
    return "; ".join([*([f"**{result['why']}**"] if "why" in result else []), *shown])


def value_in_words(value):
    """Return a value in words: of a check first its error and limit."""
    if isinstance(value, list):
        return ", ".join(map(value_in_words, value))
    if not isinstance(value, dict):
        return str(value)
    first = [f"{value['error']}"] if "error" in value else []
    first += [f"limit {value['limit']}"] if "limit" in value else []
    rest = [f"{k} {value_in_words(v)}" for k, v in value.items() if k not in ("error", "limit")]
    return ", ".join([*first, *rest])


def table(head, rows):
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(c.replace("|", "/") for c in row) + " |\n" for row in lines)
