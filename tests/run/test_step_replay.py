"""A step taken twice: it repeats, or what differs is named; nothing is written."""

import dataclasses
import json

import jax
import pytest

from gpt3jax import errors, train
from gpt3jax.data import loader
from gpt3jax.run import startup, step_replay

import tiny


def make_config(folder, **train_fields):
    folder.mkdir(exist_ok=True)
    prefix = tiny.write_corpus(folder.parent / "corpus", 7, 300)
    return tiny.make_config(
        data={"paths": (prefix,), "split": "90,5,5"},
        mesh={"data": 8},
        model={"n_layers": 2, "d_model": 32},
        optimizer={"peak_lr": 1e-4, "warmup_samples": 0},
        batch={"global_batch_size": 8},
        train={"n_steps": 9, "eval_interval": 0, "checksum_interval": 2} | train_fields,
        faults={"spike": "skip", "spike_window": 3},
        checkpoint={"dir": str(folder / "checkpoints"), "save_interval": 4},
        log={"dir": str(folder / "logs"), "interval": 1},
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replay") / "run"
    train.train(make_config(folder))
    return folder


def files(folder):
    return sorted((str(p), p.stat().st_mtime_ns) for p in folder.rglob("*"))


@pytest.mark.slow
def test_a_step_repeats_from_the_checkpoint_before_it(trained, capsys):
    before = files(trained)
    assert step_replay.replay(make_config(trained, replay_step=7)) == errors.DONE
    told = capsys.readouterr().out
    assert "at step 4, 32 samples" in told and "step 7 repeats bit for bit" in told
    lines = (trained / "logs" / "metrics.jsonl").read_text().splitlines()
    of_run = next(json.loads(line) for line in lines if json.loads(line)["step"] == 7)
    assert f"step 7: loss {of_run['loss']!r}, gradient norm {of_run['grad_norm']!r}" in told
    assert files(trained) == before


@pytest.mark.slow
@pytest.mark.parametrize("which", ["state", "batch"])
def test_what_does_not_repeat_is_named(trained, capsys, monkeypatch, which):
    """The second pass has one value altered: of an array after its last step, or of a batch."""
    start, calls = startup.start_or_resume, []

    def with_a_fault(*args):
        started = start(*args)
        run = started.run

        def spoilt(state, batch, *limit):
            calls.append(1)
            state, metrics = run.program.train(state, batch, *limit)
            if which == "state" and len(calls) == 6:
                params = jax.tree.map_with_path(
                    lambda path, x: x + 1e-3 if "w_in" in jax.tree_util.keystr(path) else x,
                    state.params,
                )
                state = dataclasses.replace(state, params=params)
            return state, metrics

        program = tiny.with_train(run.program, spoilt)
        laid = dataclasses.replace(run.laid, program=program)
        return dataclasses.replace(started, run=dataclasses.replace(run, laid=laid))

    batches = loader.train_batches

    def with_a_bad_batch(*args):
        for batch, *rest in batches(*args):
            if which == "batch" and len(calls) == 4:
                batch = batch | {"tokens": batch["tokens"].at[0, 0, 3].add(1)}
            yield batch, *rest

    monkeypatch.setattr(loader, "train_batches", with_a_bad_batch)
    monkeypatch.setattr(startup, "start_or_resume", with_a_fault)
    assert step_replay.replay(make_config(trained, replay_step=7)) == errors.RETRY
    told = capsys.readouterr().out
    assert "repeats" not in told
    if which == "state":
        assert "does not repeat" not in told
        assert told.endswith("after the last step differs in: params/blocks/mlp/w_in_DF\n")
    else:
        assert "step 6 does not repeat: grad_norm, grad_norms, loss, batch tokens differ" in told
        assert "gradient norm of blocks/mlp/w_in_DF: " in told and "params/norm/bias_D" in told


@pytest.mark.slow
def test_a_step_that_the_run_does_not_have_is_refused(trained):
    with pytest.raises(errors.UserError, match="the run ends at 9"):
        step_replay.replay(make_config(trained, replay_step=10))
