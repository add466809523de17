"""A run killed 20 times and started again each time, over an undisturbed one.

    python docs/figures/killed.py [--draw]

SIGKILL strikes a moment after random steps. `benchmarks/faults.py`, which also kills starts and
saves, compares: losses, evaluations, the samples of every step, and the final state.
"""

import collections
import pathlib
import random
import re
import signal
import sys
import tempfile
import time

import measured
import style

N_KILLS = 20
N_STEPS = 400
SEED = 3  # of the steps after which it is killed
CORPUS = measured.REPOSITORY / "tests" / "golden" / "megatron_run" / "shakespeare"
RECIPE = f"""
from gpt3jax import config


def get_config():
    return config.Config(
        model=config.Model(n_layers=2, d_model=64, n_heads=4, seq_len=32, vocab_size=66),
        optimizer=config.Optimizer(peak_lr=1e-2, warmup_samples=80, decay_samples={8 * N_STEPS}),
        batch=config.Batch(global_batch_size=8),
        data=config.Data(paths=("{CORPUS}",), split="949,50,1", eod_id=65),
        train=config.Train(
            n_steps={N_STEPS}, eval_interval=100, eval_batches=2, max_fruitless_starts=0
        ),
        checkpoint=config.Checkpoint(dir="checkpoints", save_interval=10),
        log=config.Log(dir="logs", interval=1),
    )
"""


def measure():
    """Train undisturbed, then with kills, and compare."""
    sys.path.append(str(measured.REPOSITORY / "benchmarks"))
    import faults

    faults.set_up()
    with tempfile.TemporaryDirectory() as folder:
        alone, killed = (new_run(pathlib.Path(folder) / name) for name in ("alone", "killed"))
        finish(faults, alone)
        rng = random.Random(SEED)
        kills_at = sorted(rng.sample(range(1, N_STEPS * 9 // 10), N_KILLS))  # not past the end
        moments = collections.Counter(kill_after(faults, killed, n, rng) for n in kills_at)
        finish(faults, killed)
        return {
            "options": {"seed": SEED, "kills_after_steps": kills_at},
            "undisturbed": measured.losses(alone / "logs"),
            "killed": measured.losses(killed / "logs"),
            "moments": dict(moments),
            "starts": starts((killed / "out.0.txt").read_text().split(faults.START)[1:]),
            "differences": faults.differences(killed, alone, 1),
        }


def new_run(folder):
    """Make the folder of a run."""
    folder.mkdir()
    (folder / "recipe.py").write_text(RECIPE)
    return folder


def finish(faults, folder):
    """Start a run and let it complete."""
    assert faults.wait(faults.start(folder, 1)) == [0], (folder / "out.0.txt").read_text()


def kill_after(faults, folder, step, rng):
    """Start a run, kill it a moment after a step, and return what it was doing."""
    (process,) = faults.start(folder, 1)
    while process.is_alive() and last_step(folder) < step:
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.1))
    moment = faults.moment_of(folder)
    process.kill()
    assert faults.wait([process]) == [-signal.SIGKILL], (folder / "out.0.txt").read_text()
    return moment


def last_step(folder):
    """Return the last step in the log of a run."""
    file = folder / "logs" / "metrics.jsonl"
    steps = re.findall(r'"step": (\d+)', file.read_text()) if file.exists() else []
    return int(steps[-1]) if steps else 0


def starts(outputs):
    """Return the step at which each start began and the last that it logged."""
    spans = []
    for output in reversed(outputs):
        steps = [int(number) for number in re.findall(r"iteration +(\d+)/", output)]
        # A start that came to no step saved nothing: the next one began where it did.
        none = (spans[-1][0] if spans else N_STEPS,) * 2
        spans.append((steps[0] - 1, steps[-1]) if steps else none)
    return spans[::-1]


def draw(data, folder):
    """Draw both curves, and below them the steps that each start took."""
    figure, ((curves,), (spans,)) = style.panels(2, 5, sharex=True, height_ratios=(3, 2))
    first_again = [first + 1 for first, _ in data["starts"][1:]]
    n_kills = len(first_again)
    steps, rings = range(1, N_STEPS + 1), slice(0, None, 8)
    curves.plot(steps[rings], data["undisturbed"][rings], **style.RINGS, label="undisturbed")
    curves.plot(steps, data["killed"], color=style.BLUE, linewidth=0.8, label="killed")
    curves.plot(
        first_again, [0.03] * n_kills, "^", color=style.RED, markersize=5, label="started again",
        transform=curves.get_xaxis_transform(),
    )  # fmt: skip
    curves.legend()
    told = "differs" if data["differences"] else "equal to the bit"
    curves.set_title(f"Loss of a run killed {n_kills} times, over an undisturbed one: {told}")
    for i, (first, last) in enumerate(data["starts"], 1):
        spans.plot((first, last), (i, i), color=style.BLUE, linewidth=3, solid_capstyle="butt")
        if i <= n_kills:
            spans.plot(last, i, "x", color=style.RED, markersize=5)
    spans.invert_yaxis()
    spans.set(xlabel="step", ylabel="start", yticks=(1, 5, 10, 15, 20))
    spans.set_title(f"Steps that each of the {len(data['starts'])} starts took, until the kill (x)")
    style.save(figure, folder / "killed.svg", f"A run killed {n_kills} times", data["source"])


if __name__ == "__main__":
    measured.main("killed", measure, draw)
