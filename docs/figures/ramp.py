"""The layouts of a growing batch: 175B on 1,024 H100, and what each step takes.

    python docs/figures/ramp.py [--draw]

`gpt3jax.plan` says which layout a run would take for each batch size, and plans the same run in
layouts that stay the same. With the extra `plan` the steps are compiled; times are estimates.
"""

import json
import math
import pathlib
import tempfile

import measured
import style

GPUS = 1024
END = 15.0  # billions of tokens: the last batch size goes on to the end of the run
MEGATRON = "TP 8 x PP 16"
_REST = (
    "--mesh.copies=1", "--mesh.stage=1", "--mesh.virtual-stages=1", "--mesh.context=1",
    "--mesh.shard-optimizer=False", "--mesh.sequence-parallel=True", "--model.n-loss-chunks=1",
)  # fmt: skip
FOUND = "found for each size"
LAYOUTS = {
    FOUND: ("configs/175b.py",),
    MEGATRON: ("configs/175b_tp8_pp16.py",),
    "data 8 x fsdp 16 x tensor 8": (
        "configs/175b.py", "--mesh.data=8", "--mesh.fsdp=16", "--mesh.tensor=8",
        "--batch.microbatch-size=1", "--model.remat=full", *_REST,
    ),
    "fsdp 512 x tensor 2": (
        "configs/175b.py", "--mesh.data=1", "--mesh.fsdp=512", "--mesh.tensor=2",
        "--batch.microbatch-size=3", "--model.remat=mlp", *_REST,
    ),
}  # fmt: skip
BANDS = (style.TEAL, style.GOLD, style.PINK, style.RED, style.BLUE, style.GREEN)
ROWS = ("batch_size", "steps", "tokens", "layout", "peak_is", "step_seconds", "hours")


def measure():
    """Plan the run in each of the layouts, and return the rows of its batch sizes."""
    plans = {name: plan(*options) for name, options in LAYOUTS.items()}
    batches = {
        name: [{key: row[key] for key in ROWS} for row in report["batches"]]
        for name, report in plans.items()
    }
    whole = (name for name, rows in batches.items() if all(row["hours"] for row in rows))
    return {
        "gpus": GPUS,
        "gpu": "H100",
        "days": {name: plans[name]["run_days"] for name in whole},
        "tokens": plans[FOUND]["run_tokens"],
        "batches": batches,
    }


def plan(recipe, *options):
    """Return the report of a plan."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "plan.json"
        args = (f"--config={recipe}", f"--gpus={GPUS}", "--gpu=h100", f"--json={file}", *options)
        measured.run("gpt3jax.plan", *args, folder=measured.REPOSITORY)
        return json.loads(file.read_text())


def draw(data, folder):
    """Draw the batch size, the layouts and the times of a step, over the tokens of the run."""
    ratios = {"gridspec_kw": {"height_ratios": (2, 2, 4)}, "sharex": True}
    figure, ((batch,), (names,), (seconds,)) = style.panels(3, 6.6, **ratios)
    found = data["batches"][FOUND]
    ends = edges(found)
    draw_batch(batch, found, ends, data["tokens"])
    draw_layouts(names, found, ends, data)
    draw_seconds(seconds, data, ends)
    seconds.set(xlim=(0, END), xlabel="tokens, in billions")
    style.save(figure, folder / "ramp.svg", "The layouts of a growing batch", data["source"])


def edges(rows):
    """Return where the batch sizes begin and end, in billions of tokens; the last is cut off."""
    ends = [0.0]
    for row in rows:
        ends.append(ends[-1] + row["tokens"] / 1e9)
    return [*ends[:-1], END]


def draw_batch(panel, rows, ends, tokens):
    """Draw the batch size as stairs."""
    sizes = [row["batch_size"] for row in rows]
    panel.stairs(sizes, ends, baseline=None, color=style.BLUE, linewidth=1.6)
    for size, begin in zip(sizes, ends, strict=False):
        text = f"{size:,}"
        panel.annotate(text, (begin, size), (3, 3), textcoords="offset points", color=style.BLUE)
    panel.set(ylim=(0, 1.25 * sizes[-1]), ylabel="sequences")
    panel.set_title(
        f"Sequences of a step, configs/175b.py: the first {END:.0f} of {tokens / 1e9:.0f} billion "
        "tokens"
    )


def draw_layouts(panel, rows, ends, data):
    """Draw a band for each batch size, with the fields of its layout in it."""
    colors, before = {}, []
    for row, begin, end in zip(rows, ends, ends[1:], strict=False):
        lines = words(row["layout"])
        color = colors.setdefault(tuple(lines), BANDS[len(colors) % len(BANDS)])
        panel.axvspan(begin, end, color=color, alpha=0.1, linewidth=0)
        panel.axvline(begin, color=style.GREY, linewidth=0.5)
        for i, line in enumerate(["the same"] if lines == before else lines):
            place = {"xytext": (4, -12 - 10.5 * i), "textcoords": "offset points"}
            panel.annotate(line, (begin, 1), color=color, fontsize=7.5, **place)
        before = lines
    panel.set(ylim=(0, 1), yticks=[])
    panel.spines["left"].set_visible(False)
    panel.set_title(f"Layout of each batch size on {data['gpus']:,} {data['gpu']}, as found")


def words(fields):
    """Return a layout in short lines."""
    lines = [
        f"{axis} {fields[f'mesh.{axis}']}"
        for axis in ("copies", "data", "stage", "fsdp", "context", "tensor")
        if fields[f"mesh.{axis}"] > 1
    ]
    if fields["mesh.virtual_stages"] > 1:
        lines.append(f"{fields['mesh.virtual_stages']} virtual stages")
    if fields["mesh.shard_optimizer"]:
        lines.append("sharded optimizer")
    return [
        *lines,
        f"microbatch {fields['batch.microbatch_size']}",
        f"remat {fields['model.remat']}",
    ]


def draw_seconds(panel, data, ends):
    """Draw the time of a step in each layout; a layout has none for sizes that it cannot cut."""
    colors = (style.BLUE, style.ORANGE, style.PURPLE, style.GREEN)
    for (name, rows), color in zip(data["batches"].items(), colors, strict=True):
        times = [math.nan if row["step_seconds"] is None else row["step_seconds"] for row in rows]
        width = 2.4 if name == FOUND else 1.2
        panel.stairs(
            times, ends, baseline=None, color=color, linewidth=width, label=told(name, data)
        )
        label_times(panel, times, ends, color, above=name != FOUND)
    panel.set(yscale="log", ylim=(0.5, 80), ylabel="seconds")
    panel.set_yticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"], minor=False)
    panel.minorticks_off()
    panel.legend(loc="upper left")
    kinds = {row["peak_is"] for rows in data["batches"].values() for row in rows if row["peak_is"]}
    source = "by compiled steps" if kinds == {"compiled"} else "by closed forms"
    panel.set_title(f"Time of a step in it, and in layouts that stay (estimated {source})")


def label_times(panel, times, ends, color, *, above):
    """Write each time beside its line: above it, or below."""
    for time, begin in zip(times, ends, strict=False):
        if not math.isnan(time):
            place = {"textcoords": "offset points", "va": "bottom" if above else "top"}
            text = f"{time:.2f}" if time < 10 else f"{time:.1f}"
            panel.annotate(text, (begin, time), (4, 2 if above else -3), color=color, **place)


def told(name, data):
    """Return the entry of a layout in the legend."""
    if name in data["days"]:
        return f"{name}: {data['days'][name]:.1f} days for the run"
    possible = [row["batch_size"] for row in data["batches"][name] if row["step_seconds"]]
    return f"{name}: possible for batches of {' and '.join(f'{n:,}' for n in possible)} alone"


if __name__ == "__main__":
    measured.main("ramp", measure, draw)
