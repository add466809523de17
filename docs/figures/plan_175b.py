"""The plan of 175B on 1,024 H100: memory of a GPU by part, time of a step by part.

    python docs/figures/plan_175b.py [--draw]

`gpt3jax.plan` compiles the training step for GPUs that are not there. With the extra `plan` the
peak of the memory is the compiler's; times are estimates.
"""

import json
import pathlib
import tempfile

import measured
import style

OPTIONS = ("--config=configs/175b_fsdp512_tp2.py", "--gpus=1024", "--gpu=h100")
GIB = 2**30
SMALLEST = 0.002  # share of the whole: smaller parts are left out


def measure():
    """Plan, and return what the figure shows of the report."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "plan.json"
        measured.run("gpt3jax.plan", *OPTIONS, f"--json={file}", folder=measured.REPOSITORY)
        report = json.loads(file.read_text())
    names = (
        "peak_bytes_per_gpu", "peak_is", "headroom_bytes", "budget_bytes", "memory",
        "step_seconds", "step_parts_expected", "collectives", "gpus", "gpu", "mesh",
    )  # fmt: skip
    return {"options": OPTIONS} | {name: report[name] for name in names}


def draw(data, folder):
    """Draw the parts as stairs: memory above, time below."""
    figure, ((memory,), (seconds,)) = style.panels(2, 5)
    draw_memory(memory, data)
    draw_time(seconds, data)
    style.save(figure, folder / "plan_175b.svg", "The plan of 175B", data["source"])


def draw_memory(panel, data):
    """Draw the memory of a GPU, and how much of it there is."""
    peak, budget = data["peak_bytes_per_gpu"] / GIB, data["budget_bytes"] / GIB
    parts = data["memory"] | {"headroom": data["headroom_bytes"]}
    sizes = {name: n_bytes / GIB for name, n_bytes in parts.items()}
    stairs(panel, {name: size for name, size in sizes.items() if size > SMALLEST * budget})
    panel.axvline(budget, color=style.RED, linestyle="--", linewidth=1)
    style.label(panel, budget, 0, f"budget {budget:.1f}", color=style.RED)
    panel.set(xlim=(0, 82), xlabel="GiB")
    axes = " x ".join(f"{axis} {size}" for axis, size in data["mesh"].items() if size > 1)
    panel.set_title(
        f"GPT-3 175B on {data['gpus']:,} H100 ({axes}). Memory of a GPU, peak {peak:.1f} GiB\n"
        f"({data['peak_is']}; parameters and optimizer exact, the rest of the split estimated)"
    )


def draw_time(panel, data):
    """Draw the time of a step, and the range of its estimate."""
    parts, time = data["step_parts_expected"], data["step_seconds"]
    shares = {name: parts[name] for name in ("matmul", "attention", "elementwise")}
    for traffic in data["collectives"]:
        name = f"waiting for {traffic['axis']} over {traffic['network']}"
        shares[name] = shares.get(name, 0.0) + traffic["exposed"]
    shares = {name: share for name, share in shares.items() if share > SMALLEST * time["expected"]}
    stairs(panel, shares)
    low, high = time["low"], time["high"]
    around = [[time["expected"] - low], [high - time["expected"]]]
    panel.errorbar(time["expected"], len(shares), xerr=around, fmt="o", color=style.GREY, capsize=4)
    style.label(panel, high, len(shares), f"between {low:.1f} and {high:.1f}")
    panel.set(xlim=(0, 82 / 8), xlabel="s")
    panel.set_title(f"Time of a step, {time['expected']:.1f} s (estimated: nothing ran on a GPU)")


def stairs(panel, parts):
    """Draw bars below each other, each from where the one above ends."""
    begin = 0.0
    for i, (name, size) in enumerate(parts.items()):
        panel.barh(i, size, left=begin, color=style.COLORS[i % len(style.COLORS)], height=0.7)
        begin += size
        style.label(panel, begin, i, f"{name} {size:.2f}")
    panel.set_yticks([])
    panel.invert_yaxis()
    panel.spines["left"].set_visible(False)


if __name__ == "__main__":
    measured.main("plan_175b", measure, draw)
