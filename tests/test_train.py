"""The loop: resuming, what it records, how often it compiles."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

from gpt3jax import errors, optimizer, step, train
from gpt3jax.checkpoint import storage
from gpt3jax.config import batch_schedule, layout, schema
from gpt3jax.data import loader, splits
from gpt3jax.run import layout_choice, start_report, step_log, stopping
from gpt3jax.sharding import meshes

import tiny

TIMES = (
    "time", "step_time", "tokens_per_second", "tokens_per_second_per_device", "tflops_per_device",
)  # fmt: skip
MESH_A = {"data": 2, "fsdp": 2, "tensor": 2}
MESH_B = {"data": 1, "fsdp": 4, "tensor": 2}


@pytest.fixture
def corpus(tmp_path):
    """Write 300 random documents and return their prefix."""
    return tiny.write_corpus(tmp_path / "corpus", 7, 300)


def make_config(corpus, folder, mesh, **groups):
    return tiny.make_config(
        data={"paths": (corpus,), "split": "90,5,5"},
        mesh=mesh,
        train={"n_steps": 4, "eval_interval": 2, "eval_batches": 1} | groups.pop("train", {}),
        checkpoint={"dir": str(folder / "checkpoints"), "save_interval": 2},
        log={"dir": str(folder / "logs"), "interval": 1},
        **groups,
    )


def records(folder):
    """Return the steps' and the evaluations' records, without what depends on the clock."""
    lines = (folder / "logs" / "metrics.jsonl").read_text().splitlines()
    found = [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]
    steps = [r for r in found if "loss" in r]
    return steps, [r for r in found if "loss" not in r]


def final_arrays(cfg, n_steps):
    """Return the arrays of a run's last checkpoint, restored on one device."""
    program = step.build(
        layout.plain(dataclasses.replace(cfg, mesh=schema.Mesh())), tiny.make_mesh(), 64
    )
    store = storage.Checkpoints(cfg.checkpoint.dir)
    return tiny.leaves(store.restore(n_steps, program.abstract_state))


def stop_after(monkeypatch, n_steps):
    monkeypatch.setattr(
        stopping.Stop, "requested", lambda self, step_number: step_number == n_steps
    )


@pytest.fixture
def uninterrupted(corpus, tmp_path):
    cfg = make_config(corpus, tmp_path / "whole", MESH_A)
    train.train(cfg)
    return cfg


@pytest.mark.parametrize("second_mesh", [MESH_A, pytest.param(MESH_B, marks=pytest.mark.slow)])
def test_a_resumed_run_goes_on_as_if_never_stopped(
    corpus, tmp_path, uninterrupted, monkeypatch, second_mesh
):
    folder = tmp_path / "resumed"
    stop_after(monkeypatch, 2)
    train.train(make_config(corpus, folder, MESH_A))
    assert [r["step"] for r in records(folder)[0]] == [1, 2]
    stop_after(monkeypatch, None)
    cfg = make_config(corpus, folder, second_mesh)
    train.train(cfg)
    steps, evals = records(folder)
    whole_steps, whole_evals = records(tmp_path / "whole")
    ours, theirs = final_arrays(cfg, 4), final_arrays(uninterrupted, 4)
    told = json.loads((folder / "logs" / "config.json").read_text()).get("history")
    if second_mesh == MESH_A:
        assert told is None
        assert steps == whole_steps and evals[-2:] == whole_evals[-2:]
        for name, array in ours.items():
            np.testing.assert_array_equal(array, theirs[name], err_msg=name)
        return
    [meshes] = [start["changes"]["mesh"] for start in told]
    assert meshes == {"then": "data 2 x fsdp 2 x tensor 2", "now": "fsdp 4 x tensor 2"}
    assert storage.Checkpoints(cfg.checkpoint.dir).read_meta(4).history == told
    assert [r["consumed_samples"] for r in steps] == [16, 32, 48, 64]
    for one, other in zip(steps, whole_steps, strict=True):
        np.testing.assert_allclose(one["loss"], other["loss"], rtol=1e-6)
    for name, array in ours.items():
        # Where a gradient is rounding noise, Adam scales it up: hence not element by element.
        error = np.linalg.norm(array - theirs[name]) / max(np.linalg.norm(theirs[name]), 1e-3)
        assert error < 1e-3, f"{name}: {error}"


@pytest.mark.slow
@pytest.mark.parametrize("limit", [{"n_steps": 5}, {"n_steps": 0, "n_samples": 56}])
def test_a_run_goes_on_with_another_batch_size(corpus, tmp_path, uninterrupted, monkeypatch, limit):
    """2 steps of 16 samples, then 3 of 8: each sample once, in order."""
    read, get = [], loader.Batches.__getitem__

    def spy(batches, k):
        batch = get(batches, k)
        read.append(batch["samples"].ravel().tolist())
        return batch

    folder = tmp_path / "resumed"
    stop_after(monkeypatch, 2)
    train.train(make_config(corpus, folder, MESH_A))
    stop_after(monkeypatch, None)
    monkeypatch.setattr(loader.Batches, "__getitem__", spy)
    batch = {"global_batch_size": 8}
    cfg = make_config(corpus, folder, MESH_B, train={**limit, "eval_interval": 0}, batch=batch)
    train.train(cfg)
    steps, _ = records(folder)
    assert [r["consumed_samples"] for r in steps] == [16, 32, 40, 48, 56]
    assert sorted(read) == [list(range(first, first + 8)) for first in (32, 40, 48)]


def test_a_run_leaves_curves_and_its_config(corpus, tmp_path, uninterrupted):
    steps, evals = records(tmp_path / "whole")
    assert [r["step"] for r in steps] == [1, 2, 3, 4]
    assert [r["step"] for r in evals if "validation_loss" in r] == [2, 4]
    assert [r["step"] for r in evals if "test_loss" in r] == [4]
    lr = [optimizer.learning_rate(uninterrupted.optimizer, 64, 16 * i) for i in range(4)]
    assert [r["learning_rate"] for r in steps] == lr
    assert list((tmp_path / "whole" / "logs").glob("events.out.tfevents.*"))
    saved = json.loads((tmp_path / "whole" / "logs" / "config.json").read_text())
    assert saved["model.n_layers"] == 4


@pytest.mark.slower
def test_each_batch_size_compiles_once_and_counts_right(corpus, tmp_path, monkeypatch):
    built = []
    build = step.build
    monkeypatch.setattr(step, "build", lambda *a: built.append(build(*a)) or built[-1])
    # 8, 8, 8, 16, 16, ... samples: 8 until 20 samples are consumed.
    batch = {"global_batch_size": 16, "schedule": f"0:8 {20 * 32}:16"}
    cfg = make_config(corpus, tmp_path / "ramp", {"data": 8}, batch=batch, train={"n_steps": 6})
    train.train(cfg)
    steps, _ = records(tmp_path / "ramp")
    assert [r["batch_size"] for r in steps] == [8, 8, 8, 16, 16, 16]
    assert [r["consumed_samples"] for r in steps] == [8, 16, 24, 40, 56, 72]
    before = [0, 8, 16, 24, 40, 56]
    lr = [optimizer.learning_rate(cfg.optimizer, 72, n) for n in before]
    assert [r["learning_rate"] for r in steps] == lr
    assert built[0].train.jitted._cache_size() == 2


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param({"data": 8}, id="data", marks=pytest.mark.slower),
        pytest.param({"data": 2, "stage": 2, "tensor": 2}, id="stages", marks=pytest.mark.slow),
        pytest.param(
            {"fsdp": 2, "context": 2, "tensor": 2}, id="context", marks=pytest.mark.slower
        ),
        pytest.param(
            {"data": 4, "stage": 2, "shard_optimizer": True}, id="zero", marks=pytest.mark.slower
        ),
    ],
)
def test_a_growing_batch_has_one_loss_on_every_mesh(corpus, tmp_path, monkeypatch, mesh):
    batch = {"global_batch_size": 16, "schedule": f"0:8 {20 * 32}:16"}
    for name, cut in {"mesh": mesh, "alone": {}}.items():
        if not cut:
            monkeypatch.setattr(meshes, "make_mesh", lambda *_: tiny.make_mesh())
        train.train(make_config(corpus, tmp_path / name, cut, batch=batch, train={"n_steps": 6}))
    (ours, _), (alone, _) = records(tmp_path / "mesh"), records(tmp_path / "alone")
    assert [r["batch_size"] for r in alone] == [8, 8, 8, 16, 16, 16]
    for key in ("loss", "grad_norm"):
        np.testing.assert_allclose([r[key] for r in ours], [r[key] for r in alone], rtol=1e-5)


@pytest.mark.slower
def test_checkpoint_load_starts_a_new_run_from_an_old_one(corpus, tmp_path, uninterrupted):
    cfg = make_config(corpus, tmp_path / "branch", MESH_A, train={"n_steps": 6})
    old = dataclasses.replace(cfg.checkpoint, load=uninterrupted.checkpoint.dir)
    train.train(dataclasses.replace(cfg, checkpoint=old))
    steps, _ = records(tmp_path / "branch")
    assert [r["step"] for r in steps] == [5, 6]


@pytest.mark.slower
def test_only_the_parameters_of_another_run_start_a_new_one(corpus, tmp_path, uninterrupted):
    """At step 0, with fresh moments, though seed and order differ; then it resumes its own."""
    cfg = make_config(
        corpus, tmp_path / "tuned", MESH_B, train={"n_steps": 2, "seed": 7},
        optimizer={"warmup_samples": 0, "peak_lr": 1e-30, "weight_decay": 0.0},
    )  # fmt: skip
    load = dataclasses.replace(cfg.checkpoint, load=uninterrupted.checkpoint.dir, only_params=True)
    cfg = dataclasses.replace(cfg, checkpoint=load)
    train.train(cfg)
    steps, _ = records(tmp_path / "tuned")
    assert [(r["step"], r["consumed_samples"]) for r in steps] == [(1, 16), (2, 32)]
    ours, theirs = final_arrays(cfg, 2), final_arrays(uninterrupted, 4)
    for name in (n for n in ours if n.startswith("params/")):  # steps of 1e-30 change none
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    assert ours["opt_state/count"] == 2
    train.train(dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, n_steps=3)))
    assert [r["step"] for r in records(tmp_path / "tuned")[0]] == [1, 2, 3]


def test_evaluation_is_the_mean_over_its_tokens(corpus, tmp_path, uninterrupted):
    """By hand: the validation loss at step 2 from the weights saved there."""
    cfg = uninterrupted
    mesh = tiny.make_mesh()
    program = step.build(cfg, mesh, 64)
    store = storage.Checkpoints(cfg.checkpoint.dir)
    params = store.restore(2, program.abstract_state).params
    parts = splits.open_splits(cfg, 4, 64)
    tokens, _ = parts.validation.tokens(np.arange(16))
    positions = np.broadcast_to(np.arange(32), (16, 32))
    x = params(jax.numpy.asarray(tokens[:, :-1]), jax.numpy.asarray(positions))
    logits = np.asarray(x @ params.embedding_VD[...].T, np.float64)[..., : tiny.VOCAB]
    lse = np.log(np.exp(logits).sum(-1))
    target = np.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0]
    recorded = records(tmp_path / "whole")[1][0]
    assert recorded["step"] == 2
    np.testing.assert_allclose(recorded["validation_loss"], (lse - target).mean(), rtol=1e-5)


def test_a_step_that_cannot_fit_is_refused_before_it_runs(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(layout_choice, "memory_limit", lambda: 10_000)
    with pytest.raises(errors.UserError, match=r"no layout fits into 0\.0 GiB a device"):
        train.train(make_config(corpus, tmp_path / "run", MESH_A, train={"n_steps": 1}))
    assert not (tmp_path / "run" / "logs" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_fields_without_effect_are_warned_of(corpus, tmp_path, capsys):
    groups = {"train": {"n_steps": 1}, "faults": {"spike_window": 7}}
    train.train(make_config(corpus, tmp_path / "run", MESH_A, **groups))
    told = capsys.readouterr().out
    assert "WARNING: faults.spike_window=7 has no effect with faults.spike=off" in told
    assert "WARNING: the warm-up of 64 samples is longer than the run of 16" in told


def test_what_has_no_effect_before_the_end_of_the_run_is_warned_of():
    log = {"profile_steps": (21, 30), "profile_memory": 21, "dir": "logs"}
    cfg = tiny.make_config(log=log, data={"mock": True})
    cfg = dataclasses.replace(cfg, faults=schema.Faults(spike="warn", spike_window=19))
    schedule = batch_schedule.BatchSchedule(((0, 8), (160, 16)))
    lines = start_report.beyond_the_end(cfg, schedule, step_log.Position(20, 160))
    end = "has no effect: the run ends at step 20"
    assert len(lines) == 4 and all(end in line for line in lines)
    fields = ["log.profile_steps=21 30", "log.profile_memory=21", "spike_window=19"]
    for words in (*fields, "the batch of 16 from sample 160"):
        assert any(words in line for line in lines)
    assert start_report.beyond_the_end(cfg, schedule, step_log.Position(21, 161)) == []


def contents(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("n_steps", [4, 3])
def test_a_start_with_nothing_left_to_do_leaves_the_log_as_it_is(
    corpus, tmp_path, uninterrupted, capsys, n_steps
):
    before = contents(tmp_path / "whole")
    cfg = make_config(corpus, tmp_path / "whole", MESH_B, train={"n_steps": n_steps})
    assert train.train(cfg)
    assert capsys.readouterr().out.endswith("nothing left to do: the run ended at step 4\n")
    assert contents(tmp_path / "whole") == before


def test_a_run_without_checkpoints_displaces_no_other_runs_log(corpus, tmp_path, uninterrupted):
    before = contents(tmp_path / "whole")
    nowhere = dataclasses.replace(uninterrupted.checkpoint, dir="")
    with pytest.raises(errors.UserError, match=r"log\.dir=.*/whole/logs has the log of another"):
        train.train(dataclasses.replace(uninterrupted, checkpoint=nowhere))
    assert contents(tmp_path / "whole") == before


def test_files_are_where_the_docs_say(uninterrupted):
    folder = pathlib.Path(uninterrupted.checkpoint.dir)
    assert sorted(p.name for p in folder.iterdir()) == ["2", "4"]
