"""A batch that grows, each of its sizes in another layout: the losses and the state stay the same.

The layouts come from a file, which forces unlike ones on the 8 emulated devices: stages, then fsdp
x tensor, then data x context.
"""

import json
import random
import signal

import growing_batch
import numpy as np
import pytest

from gpt3jax.checkpoint import parameters, storage

import corpus
import tiny

pytestmark = pytest.mark.slow  # each layout compiles

# 5 steps of 8 samples, 4 of 16, 3 of 32; sequences of 16 tokens, 20 of which are left out.
SCHEDULE = "0:8 640:16 1920:32"
N_STEPS = 12
CHANGES = (5, 9)  # steps after which the layout changes
GROWING = (
    "--batch.global-batch-size=32", f"--batch.schedule={SCHEDULE}", "--train.n-samples=240",
    "--train.eval-interval=4", "--train.eval-batches=2", "--model.n-layers=4",
    "--data.skip-samples", "50:70",
)  # fmt: skip
LAYOUTS = {
    8: {"mesh.stage": 4, "mesh.data": 2, "mesh.virtual_stages": 1, "model.remat": "full"},
    16: {"mesh.fsdp": 2, "mesh.tensor": 4, "batch.microbatch_size": 4, "model.remat": "none"},
    32: {"mesh.data": 4, "mesh.context": 2, "mesh.shard_optimizer": True, "model.remat": "mlp"},
}


def run(monkeypatch, folder, *args):
    """Train in this process and return the losses of all steps."""
    assert corpus.call_main(monkeypatch, folder, "--mesh.data=auto", *GROWING, *args) == 0
    return [record["loss"] for record in corpus.records(folder) if "loss" in record]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Return the folder of a run that nothing disturbed."""
    folder = corpus.write_run(tmp_path_factory.mktemp("undisturbed"))
    options = growing_batch.write_layouts(folder, LAYOUTS)
    with pytest.MonkeyPatch.context() as monkeypatch:
        run(monkeypatch, folder, options, "--checkpoint.save-interval=2")
    return folder


def arrays(folder):
    """Return the arrays of a run's last checkpoint, by name."""
    store = storage.Checkpoints(str(folder / "checkpoints"), read_only=True)
    [last, *_] = store.steps()
    assert last == N_STEPS
    abstract = parameters.abstract_state(corpus.config_of(folder, *GROWING))
    return tiny.leaves(store.restore(last, abstract))


def test_losses_are_those_of_one_device(undisturbed, tmp_path, monkeypatch):
    corpus.write_run(tmp_path)
    one_device = growing_batch.write_layouts(tmp_path, {size: {} for size in LAYOUTS})
    losses = run(monkeypatch, tmp_path, one_device, "--checkpoint.dir=")
    ours = [r["loss"] for r in corpus.records(undisturbed) if "loss" in r]
    np.testing.assert_allclose(ours, losses, rtol=1e-5)
    assert len(losses) == N_STEPS
    evaluated = [
        [r["validation_loss"] for r in corpus.records(f) if "validation_loss" in r]
        for f in (undisturbed, tmp_path)
    ]
    np.testing.assert_allclose(*evaluated, rtol=1e-5)


def test_the_log_config_and_checkpoints_say_which_layout(undisturbed):
    config = json.loads((undisturbed / "logs" / "config.json").read_text())
    assert config["mesh.data"] == "auto"
    stored = config["layout of each batch size"]["by_size"]
    assert {int(size): rows[0]["fields"]["mesh.stage"] for size, rows in stored.items()} == {
        8: 4, 16: 1, 32: 1,
    }  # fmt: skip
    store = storage.Checkpoints(str(undisturbed / "checkpoints"), read_only=True)
    meta = store.read_meta(N_STEPS)
    assert meta.layout["mesh.context"] == 2 and meta.layouts["by_size"]["16"]


def kill_and_go_on(folder, rng):
    """Kill a run at a random moment near a change of its layout, then let it end."""
    change = rng.choice(CHANGES)
    args = ("--mesh.data=auto", *GROWING, "--layouts=layouts.json")
    process = corpus.start_main(
        folder, *args, f"--checkpoint.save-interval={rng.choice((1, 2, 3))}"
    )
    metrics = folder / "logs" / "metrics.jsonl"
    n = change + rng.choice((-1, 0, 0, 0, 1))
    wait_until(process, lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= n)
    signal.sigtimedwait([], rng.random() * 4)  # a change takes seconds: it compiles
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    again = corpus.start_main(folder, *args)
    out, err = again.communicate(timeout=240)
    assert again.returncode == 0, err
    return out


def wait_until(process, condition):
    while process.poll() is None and not condition():
        signal.sigtimedwait([], 0.01)


def assert_same_end(folder, undisturbed):
    ours, theirs = arrays(folder), arrays(undisturbed)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)
    records = (corpus.records(f) for f in (folder, undisturbed))
    ours, theirs = ({r["step"]: r["loss"] for r in rows if "loss" in r} for rows in records)
    assert ours == theirs


SEEDS = [pytest.param(n, marks=pytest.mark.slower if n > 1 else ()) for n in range(20)]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_kill_around_a_change_loses_nothing(tmp_path, undisturbed, seed):
    folder = corpus.write_run(tmp_path)
    growing_batch.write_layouts(folder, LAYOUTS)
    kill_and_go_on(folder, random.Random(seed))
    assert_same_end(folder, undisturbed)
