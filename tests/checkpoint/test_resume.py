"""A run that goes on under another config: the config decides, and changes are reported."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt3jax import optimizer, step
from gpt3jax.checkpoint import metadata, resume, storage
from gpt3jax.config import recipe, schema
from gpt3jax.record import recording
from gpt3jax.run import startup, step_log
from gpt3jax.watch import phases

import tiny

START = step_log.Position(20, 320)
SAVED_SCALE = optimizer.LossScale(
    scale=jnp.float32(2**20), good_steps=jnp.int32(300), hysteresis=jnp.int32(1)
)
FLOAT16 = {"compute_dtype": "float16"}
EARLIER = {"step": 4, "samples": 64, "changes": {"log.interval": {"then": 1, "now": 100}}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a corpus and the checkpoint of a float16 run at its end, step 20."""
    folder = tmp_path_factory.mktemp("resuming")
    tiny.write_corpus(folder / "corpus", 7, 1000)
    cfg, store = make_config(folder), storage.Checkpoints(str(folder / "checkpoints"))
    run = tiny.prepared(cfg, store)
    zeros = jax.tree.map(
        lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding),
        run.program.abstract_state,
    )
    state = dataclasses.replace(
        zeros, loss_scale=SAVED_SCALE, step=jnp.int32(20), schedule_samples=jnp.int32(320)
    )
    store.save(state, dataclasses.replace(startup.meta_of(run, START), history=(EARLIER,)))
    assert store.wait() == ""
    return folder


def make_config(folder, **groups):
    """Return the config that the checkpoint is of, or with other groups."""
    usual = {
        "model": {"n_layers": 1, "d_model": 32},
        "data": {"paths": (str(folder / "corpus"),), "split": "90,5,5"},
        "mesh": {"data": 8},
        "precision": FLOAT16,
        "train": {"n_steps": 20},
        "optimizer": {"peak_lr": 1.2e-3, "min_lr": 2.1e-4},
        "checkpoint": {"dir": str(folder / "checkpoints")},
    }
    return tiny.make_config(**usual | groups)


def resumed(folder, **groups):
    started = startup.start_or_resume(make_config(folder, **groups), phases.Phases())
    return started.run, started.state, started.position, started.lines


def table_of(lines):
    """Return the rows after the line "resumed from": {name: (then, now)}."""
    assert lines[0].startswith("resumed from ")
    cut = [re.split("  +", line.strip()) for line in lines[1:]]
    assert not cut or cut[0] == ["changed since that checkpoint", "then", "now"]
    return {name: (then, now) for name, then, now in cut[1:]}


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        (FLOAT16, (2**20, 300, 1)),
        (FLOAT16 | {"static_loss_scale": 128.0}, (128, 0, 2)),
        ({"compute_dtype": "bfloat16"}, (1, 0, 2)),
    ],
    ids=["dynamic", "static", "bfloat16"],
)
def test_the_config_decides_whether_a_loss_scale_goes_on(folder, precision, expected):
    run, state, start, lines = resumed(folder, precision=precision)
    found = tuple(np.asarray(x).item() for x in jax.tree.leaves(state.loss_scale))
    assert start == START and found == expected
    # What the first step compiles must be what the preflight lowered from shapes.
    shapes = run.program.abstract_state.loss_scale
    for leaf, shape in zip(jax.tree.leaves(state.loss_scale), jax.tree.leaves(shapes), strict=True):
        assert (leaf.dtype, leaf.weak_type, leaf.sharding) == (shape.dtype, False, shape.sharding)
    shown = table_of(lines).get("loss scale of step 21", ("1.04858e+06",) * 2)
    assert shown == ("1.04858e+06", f"{expected[0]:.6g}")


def test_an_unchanged_run_has_nothing_to_tell(folder):
    """Where it lies, and how it is started, is no change."""
    elsewhere = {"dir": str(folder / "new"), "load": str(folder / "checkpoints")}
    launch = schema.Distributed(heartbeat_timeout=5)
    cfg = make_config(folder, checkpoint=elsewhere, log={"dir": str(folder / "logs")})
    cfg = dataclasses.replace(cfg, distributed=launch)
    started = startup.start_or_resume(cfg, phases.Phases())
    assert started.position == START and table_of(started.lines) == {}
    assert started.run.history == (EARLIER,)


def test_a_longer_run_says_what_becomes_of_its_learning_rate(folder):
    run, _, _, lines = resumed(folder, train={"n_steps": 40})
    rate = float(optimizer.learning_rate(run.cfg.optimizer, 640, 320))
    assert rate > 3 * 2.1e-4
    expected = {
        "train.n_steps": (20, 40),
        "end of the run": ("step 20, 320 samples", "step 40, 640 samples"),
        "learning rate of step 21": (2.1e-4, rate),
    }
    shown = {name: (str(then), str(now)) for name, (then, now) in expected.items()}
    shown["learning rate of step 21"] = ("0.00021", f"{rate:.6g}")
    assert table_of(lines) == shown
    changes = {name: {"then": then, "now": now} for name, (then, now) in expected.items()}
    assert run.history == (EARLIER, {"step": 20, "samples": 320, "changes": changes})
    assert startup.meta_of(run, START).history == run.history


def test_the_history_is_kept_in_a_config_that_its_readers_still_take(folder, tmp_path):
    cfg, entry = make_config(folder, log={"dir": str(tmp_path)}), EARLIER
    span = recording.Span(start_step=20, end_step=40, start_samples=320, end_samples=640)
    with recording.Recorder(cfg, span, n_devices=8, peak_flops=None, history=(entry,)):
        pass
    kept = json.loads((tmp_path / "config.json").read_text())
    assert kept.pop("history") == [entry]
    assert kept == json.loads(json.dumps(schema.flatten(cfg)))
    assert recipe.load(str(tmp_path / "config.json")) == cfg


def changes(then, now):
    """Return what differs between two metas, with the same state of the schedules."""
    scales = optimizer.LossScale(scale=1.0, good_steps=0, hysteresis=2)
    state = step.TrainState(
        step=then.step, schedule_samples=then.consumed_samples, params=None, opt_state=None,
        loss_scale=scales,
    )  # fmt: skip
    changed = resume.changes(then, state, now, state)
    return {name: (change.then, change.now) for name, change in changed.items()}


def meta(cfg):
    return metadata.Meta(
        step=20, consumed_samples=320, config=schema.flatten(cfg), data_order={"n_epochs": "1"},
        mesh="data 8", jax_version="0.10.2",
    )  # fmt: skip


def test_mesh_versions_and_the_order_of_samples_are_compared():
    now = meta(tiny.make_config())
    other = {"mesh": "data 4 x tensor 2", "jax_version": "0.9.0", "version": "0.0.9"}
    then = dataclasses.replace(now, **other, data_order={"n_epochs": "2"})
    assert changes(then, now) == {
        "epochs (from the length of the run)": ("2", "1"),
        "mesh": ("data 4 x tensor 2", "data 8"),
        "jax": ("0.9.0", "0.10.2"),
        "gpt3jax": ("0.0.9", now.version),
    }


def test_what_an_earlier_version_did_not_write_is_not_compared():
    """A field that it did not have had its default."""
    now = meta(tiny.make_config(train={"checksum_interval": 7}))
    fields = {name: value for name, value in now.config.items() if "checksum" not in name}
    then = dataclasses.replace(now, config=fields, data_order={}, mesh="", jax_version="")
    assert changes(then, now) == {"train.checksum_interval": (100, 7)}


def test_another_batch_size_is_reported_with_the_end_of_the_run():
    then, now = (meta(tiny.make_config(batch={"global_batch_size": n})) for n in (16, 8))
    then, now = (dataclasses.replace(m, step=10, consumed_samples=160) for m in (then, now))
    changed = changes(then, now)
    assert changed.pop("learning rate of step 11")[0] > 0
    assert changed == {
        "batch.global_batch_size": (16, 8),
        "end of the run": ("step 20, 320 samples", "step 20, 240 samples"),
        "batch size of step 11": (16, 8),
    }


def test_a_schedule_that_no_run_may_have_now_can_be_left():
    """An earlier version took a final decay longer than the run."""
    wsd = {"decay": "wsd", "wsd_decay_samples": 400}
    then = meta(tiny.make_config(optimizer=wsd))
    now = meta(tiny.make_config(optimizer=wsd | {"decay_samples": 1000}))
    assert changes(then, now)["optimizer.decay_samples"] == (0, 1000)
