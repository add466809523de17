"""Whole runs of `gpt3jax.main`: do two of them agree, does a resumed one, is a profile written?"""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np

from gpu_parts import sizes

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
RUN = (
    f"--config={REPOSITORY}/configs/gpt3/125m.py", "--batch.global-batch-size=8",
    "--batch.microbatch-size=4", "--train.n-tokens=0", "--train.n-steps=6",
    "--train.eval-interval=0", "--log.interval=1", "--checkpoint.save-interval=3",
)  # fmt: skip


def train(task, name, *args):
    """Train into a folder of this name."""
    folder = task.folder / name
    command = [sys.executable, "-m", "gpt3jax.main", f"--log.dir={folder}/logs"]
    done = subprocess.run(
        [*command, *sizes.recipe_args(task, *RUN, *task.args), *args], check=False
    )
    if done.returncode:
        raise RuntimeError(f"gpt3jax.main ended with status {done.returncode}: see log.txt")
    return folder


def repeat(task):
    """Yield what differs between two runs, and between a run and itself resumed from step 3.

    On a GPU it must be nothing only where deterministic operations are asked for.
    """
    asked = any("deterministic" in text for text in (*task.args, os.environ["XLA_FLAGS"]))
    limit = {"limit": 0} if task.tiny or asked else {}
    first, again = (
        train(task, name, f"--checkpoint.dir={task.folder}/{name}/checkpoints")
        for name in ("first", "again")
    )
    steps = records(first)
    yield {"losses of another run": {**compare(steps, records(again)), **limit}}
    (first / "whole").mkdir()
    (first / "checkpoints" / "6").rename(first / "whole" / "6")  # so that 3 is the newest
    train(task, "first", f"--checkpoint.dir={first}/checkpoints")
    resumed = records(first)
    assert [a == b for a, b in zip(steps, resumed, strict=True)] == [True] * 3 + [False] * 3, (
        "the run was not resumed from step 3"  # their times differ, if nothing else
    )
    yield {"losses resumed": {**compare(steps[3:], resumed[3:]), **limit}}
    whole = digests(first / "whole")
    for name, folder in {"of another run": again, "resumed": first}.items():
        n_different = int((whole != digests(folder / "checkpoints")).any(axis=1).sum())
        yield {f"arrays {name}": {"error": n_different, "of": len(whole), **limit}}


def records(folder):
    """Return what was logged of each step."""
    lines = map(json.loads, (folder / "logs" / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "grad_norm" in line]


def compare(first, second):
    """Return in how many steps loss or gradient norm differ, and by how much at most."""
    ours, theirs = ([(r["loss"], r["grad_norm"]) for r in records] for records in (first, second))
    apart = np.abs(np.subtract(ours, theirs)) / np.abs(theirs)
    different = int(apart.any(axis=1).sum())
    return {"error": different, "of": len(ours), "largest relative": float(apart.max())}


def digests(folder):
    """Return the digests of all arrays of the newest checkpoint, `[arrays, 2]`."""
    import jax

    from gpt3jax.checkpoint import parameters

    jax.config.update("jax_platforms", "cpu")  # the runs needed the GPU for themselves
    store, step, cfg = parameters.find(str(folder))
    abstract = parameters.abstract_state(cfg)
    return np.stack(list(store.read_digests(step, store.read_meta(step), abstract).values()))


def profile(task):
    """Yield the size of the profile of two steps."""
    folder = train(task, "profiled", "--log.profile-steps", "4", "5")
    files = list((folder / "logs").glob("**/*.xplane.pb"))
    yield {"files": [f"{file.name}, {file.stat().st_size / 2**20:.1f} MiB" for file in files]}
    yield {"without a profile": {"error": int(not files), "limit": 0}}
