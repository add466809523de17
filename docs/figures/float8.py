"""The loss of a small GPT with products in 8 bits, beside bfloat16 and fp32.

    python docs/figures/float8.py [--draw]

The quickstart's recipe, twice as wide, trains 1,000 steps on the source of Python's own library:
the same weights, batches and learning rates in each format. A CPU emulates the 8 bits.
"""

import pathlib
import tempfile

import measured
import style

N_STEPS, EVALUATED = 1000, 50
OPTIONS = (
    "--config=configs/quickstart.py", "--model.d-model=256", "--optimizer.peak-lr=1e-3",
    "--mesh.cpu-devices=1", "--mesh.data=1", "--mesh.tensor=1", "--batch.microbatch-size=16",
    f"--train.n-steps={N_STEPS}", f"--train.eval-interval={EVALUATED}", "--checkpoint.dir=",
    "--log.interval=1",
)  # fmt: skip
FORMATS = {
    "fp32": ("--precision.compute-dtype=float32",),
    "bfloat16": ("--precision.compute-dtype=bfloat16",),
    "8 bits": ("--precision.compute-dtype=bfloat16", "--precision.matmul-dtype=float8"),
}
COLORS = {"fp32": style.GREY, "bfloat16": style.BLUE, "8 bits": style.ORANGE}
SMOOTHED = 20  # steps of which a point shows the mean
LAST = 100  # steps of which the text tells the mean


def measure():
    """Train in each format."""
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: train(pathlib.Path(folder), name) for name in FORMATS}
    return {"options": OPTIONS, **runs}


def train(folder, name):
    """Return the losses in a format; the first call also makes the corpus in the folder."""
    paths = {
        "data.paths": "corpus", "data.vocab-file": "vocab.json", "data.merge-file": "merges.txt",
        "log.dir": name,
    }  # fmt: skip
    options = [f"--{field}={folder / path}" for field, path in paths.items()]
    measured.run("gpt3jax.main", *OPTIONS, *FORMATS[name], *options, folder=measured.REPOSITORY)
    print(f"{name}: done", flush=True)
    logs = folder / name
    return {
        "loss": measured.losses(logs),
        "validation": measured.losses(logs, "validation_loss")[: N_STEPS // EVALUATED],
    }


def draw(data, folder):
    """Draw the training loss, and how far the held-out loss is from fp32's."""
    figure, ((curves,), (differences,)) = style.panels(2, 4.6, sharex=True, height_ratios=(3, 2))
    for name in FORMATS:
        losses = data[name]["loss"]
        smooth = [sum(losses[i - SMOOTHED : i]) / SMOOTHED for i in ends()]
        last = sum(losses[-LAST:]) / LAST
        label = f"{name}: {last:.3f} in the mean of the last {LAST} steps"
        curves.plot(list(ends()), smooth, color=COLORS[name], label=label)
    curves.legend()
    curves.set(ylim=(None, 7.5))
    curves.set_title(f"Training loss, the mean of {SMOOTHED} steps")
    steps = range(EVALUATED, N_STEPS + 1, EVALUATED)
    for name in ("bfloat16", "8 bits"):
        pairs = zip(data[name]["validation"], data["fp32"]["validation"], strict=True)
        apart = [ours - exact for ours, exact in pairs]
        differences.plot(
            steps, apart, ".-", color=COLORS[name], label=f"{name}: {apart[-1]:+.4f} at the end"
        )
    differences.axhline(0, color=style.GREY, linewidth=0.8)
    differences.legend()
    differences.set_title("Loss on held-out text, difference from fp32 (nats a token)")
    differences.set_xlabel("step")
    style.save(figure, folder / "float8.svg", "Products in 8 bits", data["source"])


def ends():
    """Return the steps up to which the points of a curve are means."""
    return range(SMOOTHED, N_STEPS + 1, SMOOTHED // 4)


if __name__ == "__main__":
    measured.main("float8", measure, draw)
