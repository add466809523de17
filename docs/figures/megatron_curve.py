"""The losses that Megatron-LM printed, ours over them, and how far they are apart.

    python docs/figures/megatron_curve.py [--draw]

`tests/golden/megatron_run` has what Megatron's own `pretrain_gpt.py` printed, its corpus, and its
initial weights, from which we train. `tests/convert/test_takeover.py` tests the same.
"""

import json
import pathlib
import tempfile

import measured
import style

GOLDEN = measured.REPOSITORY / "tests" / "golden" / "megatron_run"
LAST_DIGIT = 1e-6  # Megatron prints seven


def measure():
    """Convert Megatron's weights, train on from them, and pair our losses with its own."""
    with tempfile.TemporaryDirectory() as folder:
        options = ("from-megatron", GOLDEN / "initial", "--output", "weights")
        measured.run("gpt3jax.convert", *options, folder=folder)
        options = (f"--config={GOLDEN}/recipe.py", "--mesh.cpu-devices=1", "--checkpoint.dir=saved")
        measured.run("gpt3jax.main", *options, folder=folder)
        ours = measured.losses(pathlib.Path(folder) / "logs")
        ours_validation = measured.losses(pathlib.Path(folder) / "logs", "validation_loss")
    ours[1] = (ours[0] + ours[1]) / 2  # Megatron's line of iteration 2 shows that
    theirs = json.loads((GOLDEN / "run.json").read_text())
    evaluations = [e for e in theirs["evaluations"] if e["on"] == ""]  # those while it trains
    return {
        "megatron_commit": theirs["versions"]["megatron_lm_commit"][:10],
        "megatron": [step["loss"] for step in theirs["steps"]], "ours": ours,
        "validation_steps": [e["iteration"] for e in evaluations],
        "megatron_validation": [e["loss"] for e in evaluations],
        "ours_validation": ours_validation,
    }  # fmt: skip


def draw(data, folder):
    """Draw both curves, and their difference on a log scale."""
    figure, ((curves,), (differences,)) = style.panels(2, 4.4, sharex=True, height_ratios=(3, 2))
    steps = range(1, len(data["ours"]) + 1)
    curves.plot(steps, data["megatron"], **style.RINGS, label="printed by Megatron-LM")
    curves.plot(steps, data["ours"], color=style.BLUE, label="gpt3jax")
    rings = style.RINGS | {"marker": "s", "markersize": 8}
    curves.plot(data["validation_steps"], data["megatron_validation"], **rings)
    squares = {"color": style.BLUE, "markersize": 4, "label": "validation"}
    curves.plot(data["validation_steps"], data["ours_validation"], "s", **squares)
    curves.legend()
    curves.set_title("Loss of Megatron-LM's pretrain_gpt.py, and of gpt3jax from the same weights")
    apart = [abs(a - b) for a, b in zip(data["megatron"], data["ours"], strict=True)]
    differences.semilogy(steps, apart, ".", color=style.BLUE)
    differences.axhline(LAST_DIGIT, color=style.GREY, linestyle="--", linewidth=1)
    differences.text(1, 1.4 * LAST_DIGIT, "the last digit that Megatron-LM prints")
    differences.set(ylim=(1e-8, 1e-5), xlabel="step")
    differences.set_title("Absolute difference")
    style.save(figure, folder / "megatron_curve.svg", "Megatron-LM's losses", data["source"])


if __name__ == "__main__":
    measured.main("megatron_curve", measure, draw)
