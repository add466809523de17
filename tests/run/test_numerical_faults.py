"""Steps that are not finite, and loss spikes: each policy, what is kept, resuming, meshes."""

import json
import math
import pathlib

import jax
import numpy as np
import pytest

from gpt3jax import errors, optimizer, train
from gpt3jax.checkpoint import metadata
from gpt3jax.data import inspect, loader
from gpt3jax.run import numerical_faults, stopping

import tiny

MESH = {"data": 8}
BAD_STEP = 6  # of samples 40 to 47


def make_config(folder, mesh=MESH, **policy):
    folder.mkdir(exist_ok=True)
    prefix = tiny.write_corpus(folder.parent / "corpus", 7, 300)
    return tiny.make_config(
        data={"paths": (prefix,), "split": "90,5,5", "prefetch": 0},
        mesh=mesh,
        model={"n_layers": 2, "d_model": 32},
        optimizer={"peak_lr": 1e-4, "warmup_samples": 0},
        batch={"global_batch_size": 8},
        train={"n_steps": 9, "eval_interval": 0},
        faults={"spike_window": 3, "spike_deviations": 8.0} | policy,
        checkpoint={"dir": str(folder / "checkpoints"), "save_interval": 100},
        log={"dir": str(folder / "logs"), "interval": 1},
    )


@pytest.fixture
def spoil(monkeypatch):
    """Make steps easy, so that one left as it is has a spike; or let steps have a NaN."""
    get = loader.Batches.__getitem__

    def with_bad_steps(kind, bad_steps=(BAD_STEP,)):
        def spoilt(batches, k):
            batch = get(batches, k)
            bad = int(batch["samples"].min()) // 8 + 1 in bad_steps
            if not (bad and kind == "spike"):
                batch["targets"] = batch["tokens"]  # tied embeddings copy well
            if bad and kind == "nan":
                mask = batch["loss_mask"].copy()
                mask[0, 0, 3] = np.nan
                batch["loss_mask"] = mask
            return batch

        monkeypatch.setattr(loader.Batches, "__getitem__", spoilt)

    return with_bad_steps


def records(cfg):
    lines = pathlib.Path(cfg.log.dir, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def seen(cfg, step_number=BAD_STEP):
    return json.loads(pathlib.Path(cfg.log.dir, "faults", f"step-{step_number}.json").read_text())


def rates(cfg, n_good):
    """Return the learning rate of each step after so many samples of successful steps."""
    return [optimizer.learning_rate(cfg.optimizer, 72, 8 * n) for n in n_good]


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_nan_stops_the_run_or_costs_one_step(tmp_path, capsys, spoil, policy):
    cfg = make_config(tmp_path / "run", nonfinite=policy)
    spoil("nan")
    if policy == "stop":
        with pytest.raises(errors.UserError, match="step 6: the gradient is not finite"):
            train.train(cfg)
        assert [r["step"] for r in records(cfg)] == [1, 2, 3, 4, 5]
    else:
        assert train.train(cfg)
        assert [r["skipped"] for r in records(cfg)] == [0] * 5 + [1] + [0] * 3
        assert [r["learning_rate"] for r in records(cfg)] == rates(cfg, [0, 1, 2, 3, 4, 5, 5, 6, 7])
        (line,) = [x for x in capsys.readouterr().out.splitlines() if "WARNING: step" in x]
        assert "step 6: the gradient is not finite" in line and "update was left out" in line
        assert records(cfg)[-1]["skipped_samples"] == 8
    entry = seen(cfg)
    assert (entry["fault"], entry["policy"], entry["samples"]) == ("not finite", policy, ["40:48"])
    assert entry["loss"] == entry["grad_norms"]["blocks/mlp/w_in_DF"] == "NaN"
    words = entry["inspect"][0].split()
    options = inspect.Options(config=words[4], samples=words[6])
    shown = [line for line in inspect.inspect(options) if line.startswith("sample ")]
    assert [int(line.split()[1][:-1]) for line in shown] == list(range(40, 48))


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["skip", "warn"])
def test_nans_in_a_row_end_the_run_unless_it_only_warns(tmp_path, spoil, policy):
    cfg = make_config(tmp_path / "run", nonfinite=policy, max_skipped_steps=2)
    spoil("nan", (3, 5, 6, 7))
    if policy == "warn":
        assert train.train(cfg)
        assert [r["nan_in_interval"] for r in records(cfg)] == [0, 0, 1, 0, 1, 1, 1, 0, 0]
        return
    with pytest.raises(errors.UserError, match="2 steps in a row were skipped"):
        train.train(cfg)
    assert len(records(cfg)) == 5 and seen(cfg, 6)["step"] == 6


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["skip", "off", "warn", "stop"])
def test_a_spike_is_told_left_out_or_ends_the_run(tmp_path, capsys, spoil, policy):
    cfg = make_config(tmp_path / "run", spike=policy)
    spoil("spike")
    if policy == "stop":
        with pytest.raises(errors.UserError, match=r"step 6: the loss .* is a spike"):
            train.train(cfg)
    else:
        assert train.train(cfg)
        found = records(cfg)
        counts = [0] * 5 + [int(policy != "off")] + [0] * 3
        assert [r["spikes_in_interval"] for r in found] == counts
        assert [r["skipped"] for r in found] == [n * (policy == "skip") for n in counts]
        assert found[5]["loss"] > found[4]["loss"] + 0.3
        n_good = [0, 1, 2, 3, 4, 5, 5, 6, 7] if policy == "skip" else range(9)
        assert [r["learning_rate"] for r in found] == rates(cfg, n_good)
        told = capsys.readouterr().out
        assert ("is a spike, above the limit" in told) == (policy != "off")
    if policy != "off":
        losses = [r["loss"] for r in records(cfg)][1:4]
        limit = np.float32(np.mean(losses) + 8 * np.std(losses))
        assert seen(cfg)["loss_limit"] == pytest.approx(limit, rel=1e-6)
        norms = np.array(list(seen(cfg)["grad_norms"].values()))
        np.testing.assert_allclose(np.sqrt((norms**2).sum()), seen(cfg)["grad_norm"], rtol=1e-5)


@pytest.mark.slow
def test_limits_survive_restarts_and_do_not_depend_on_the_mesh(tmp_path, spoil, monkeypatch):
    spoil("spike", (6, 8))
    whole = make_config(tmp_path / "whole", spike="skip")
    train.train(whole)
    expected = records(whole)
    assert [r["skipped"] for r in expected] == [0, 0, 0, 0, 0, 1, 0, 1, 0]
    cfg = make_config(tmp_path / "resumed", spike="skip")
    for stop in (2, 4, 5, 6, 7):
        with monkeypatch.context() as patched:
            patched.setattr(stopping.Stop, "requested", lambda _, n, stop=stop: n == stop)
            train.train(cfg)
    train.train(cfg)
    timed = (
        "time", "step_time", "tokens_per_second", "tokens_per_second_per_device",
        "tflops_per_device",
    )  # fmt: skip
    plain = [
        [{k: v for k, v in r.items() if k not in timed} for r in x]
        for x in (records(cfg), expected)
    ]
    assert plain[0] == plain[1]
    assert {k: v for k, v in seen(cfg).items() if k != "inspect"} == {
        k: v for k, v in seen(whole).items() if k != "inspect"
    }
    mixed = make_config(tmp_path / "mixed", {"data": 2, "fsdp": 2, "tensor": 2}, spike="skip")
    train.train(mixed)
    assert [r["skipped"] for r in records(mixed)] == [r["skipped"] for r in expected]
    for name in ("loss", "grad_norm"):
        found, wanted = ([r[name] for r in x] for x in (records(mixed), expected))
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert seen(mixed)["loss_limit"] == pytest.approx(seen(whole)["loss_limit"], rel=1e-5)


def test_a_limit_does_not_depend_on_what_was_read_already(tmp_path):
    cfg = make_config(tmp_path / "run", spike="warn")
    rng, early, late = (
        np.random.default_rng(5),
        numerical_faults.Faults(cfg, ()),
        numerical_faults.Faults(cfg, ()),
    )
    for number in range(1, 40):
        loss = float(np.float32(rng.normal(3)))
        values = {"loss": loss, "grad_norm": 1.0, "skipped": int(rng.random() < 0.2)}
        late.note(number, values)
        assert late.loss_limit(number + 1) == early.loss_limit(number + 1)
        early.note(number, values)
        restored = numerical_faults.Faults(cfg, ())
        restored.restore(json.loads(json.dumps(early.as_json())))
        assert restored.loss_limit(number + 1) == early.loss_limit(number + 1)
        assert restored.loss_limit(number + 2) == early.loss_limit(number + 2)
    assert math.isfinite(early.loss_limit(40))


def test_losses_of_a_stretch_without_limits_do_not_return(tmp_path):
    """Spikes were watched, then not: when they are again, the old losses are no measure."""
    watched, off = (make_config(tmp_path / "run", spike=spike) for spike in ("warn", "off"))
    seen_before, unwatched, again = (
        numerical_faults.Faults(cfg, ()) for cfg in (watched, off, watched)
    )
    for number in range(1, 10):
        seen_before.note(number, {"loss": 3.0 + number % 2, "grad_norm": 1.0, "skipped": 0})
    assert math.isfinite(seen_before.loss_limit(11))
    unwatched.restore(seen_before.as_json())
    again.restore(unwatched.as_json())
    assert again.loss_limit(110) == math.inf


def test_a_checkpoint_without_losses_still_loads(tmp_path):
    meta = metadata.Meta(step=1, consumed_samples=1, data_order={}, config={})
    history = numerical_faults.Faults(make_config(tmp_path / "run", spike="warn"), ())
    history.note(1, {"loss": 3.0, "grad_norm": 1.0, "skipped": 0})
    history.restore(meta.faults)
    assert history.as_json() == {"losses": [], "skipped_in_row": 0}


def test_a_verdict_changes_nothing_and_ends_the_run_at_the_last_skip_allowed(tmp_path):
    cfg = make_config(tmp_path / "run", nonfinite="skip", max_skipped_steps=2)
    history, before = numerical_faults.Faults(cfg, ()), {"losses": [], "skipped_in_row": 0}
    values = {"loss": math.nan, "grad_norm": math.nan, "loss_scale": 1.0, "skipped": 1}
    fault = history.judge(6, 48, 8, values, np.array([]))
    assert history.as_json() == before and fault.kind == "not finite" and not fault.error
    assert fault.warning.endswith("its update was left out")
    history.note(6, values)
    assert "2 steps in a row were skipped" in history.judge(7, 56, 8, values, np.array([])).error
    assert history.judge(7, 56, 8, values | {"loss": 3.0, "grad_norm": 1.0}, np.array([])) is None


def test_gradient_norms_are_those_of_the_arrays():
    rng = np.random.default_rng(3)
    tree = {"a": rng.normal(size=(3, 4)), "b": rng.normal(size=7) * 5}
    norm, norms = optimizer.gradient_norms(jax.tree.map(jax.numpy.float32, tree))
    np.testing.assert_allclose(norms, [np.linalg.norm(x) for x in tree.values()], rtol=1e-6)
    np.testing.assert_allclose(norm, np.linalg.norm(norms), rtol=1e-6)
