"""Weights & Biases: one run over all starts, and no failure of it that ends or slows ours."""

import contextlib
import json
import math
import os
import pathlib
import re
import signal
import sys
import threading
import time
import types

import pytest

from gpt3jax import errors
from gpt3jax.config import schema
from gpt3jax.record import recording, wandb_run

import corpus

VALUES = {"loss": 4.5, "grad_norm": 0.5, "loss_scale": 1.0, "interval_loss": 4.5}
VALUES |= {"skipped": 0, "skipped_in_interval": 0, "nan_in_interval": 0, "skipped_samples": 0}
VALUES |= {"spikes_in_interval": 0, "step_time": 0.25}


def make_config(log_dir, project="team/gpt3"):
    return schema.Config(
        model=schema.Model(n_layers=4, d_model=32, n_heads=4, seq_len=32, vocab_size=66),
        optimizer=schema.Optimizer(peak_lr=6e-3),
        batch=schema.Batch(global_batch_size=8),
        train=schema.Train(n_steps=30),
        log=schema.Log(dir=str(log_dir), wandb_project=project),
    )


def record(log_dir, start_step=0, **fields):
    span = recording.Span(
        start_step=start_step, start_samples=8 * start_step, end_step=30, end_samples=240
    )
    cfg = make_config(log_dir)
    return recording.Recorder(cfg, span, n_devices=2, peak_flops=None, **fields)


def log(recorder, *steps, **values):
    for step in steps:
        recorder.log_step(step, 8 * step, 8, 1e-3, VALUES | values)


def losses(log_dir):
    lines = (log_dir / "metrics.jsonl").read_text().splitlines()
    return {entry["step"]: entry["loss"] for entry in map(json.loads, lines)}


class CommError(Exception):
    """As wandb's."""


class _StandIn:
    """A module in the place of wandb, and the run that it begins."""

    def __init__(self):
        self.errors = types.SimpleNamespace(CommError=CommError)
        self.mode, self.logged_in, self.reachable = "online", True, True
        self.begun, self.rows, self.alerts, self.ends = [], [], [], []
        self.step, self.preempting = 0, False
        self.before_row = lambda: None

    def setup(self):
        settings = types.SimpleNamespace(mode=self.mode, base_url="https://w.b")
        return types.SimpleNamespace(settings=settings)

    def login(self, verify, prompt):
        assert not verify and not prompt
        return self.logged_in

    def Settings(self, **settings):
        return settings

    def init(self, **options):
        self.begun.append(options)
        if not self.reachable and options.get("mode") != "offline":
            raise CommError("no route to host")
        return self

    def teardown(self):
        self.begun.append("teardown")

    def define_metric(self, name, step_metric=None):
        pass

    def log(self, row, step, commit):
        assert commit
        self.before_row()
        self.rows.append(row | {"_step": step})

    def alert(self, title, text):
        self.alerts.append(text)

    def mark_preempting(self):
        self.preempting = True

    def finish(self, exit_code):
        self.ends.append(exit_code)


@pytest.fixture
def stand_in(monkeypatch):
    module = _StandIn()
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    return module


def warnings(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING")]


def test_a_run_without_the_package_is_refused_before_it_uses_a_device(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    folder = corpus.write_run(tmp_path)
    assert corpus.call_main(monkeypatch, folder, "--log.wandb-project=gpt3") == errors.REFUSED
    told = capsys.readouterr()
    assert "log.wandb_project=gpt3 needs the extra: pip install 'gpt3jax[wandb]'" in told.err
    assert told.out == "" and not (folder / "logs").exists()


def test_a_run_that_nobody_is_logged_in_for_is_refused(stand_in):
    stand_in.logged_in = False
    problem = wandb_run.problem(schema.Log(wandb_project="gpt3"))
    assert "nobody is logged in to https://w.b: run `wandb login`" in str(problem)
    stand_in.mode = "offline"
    assert wandb_run.problem(schema.Log(wandb_project="gpt3")) is None


def test_a_wandb_that_cannot_be_used_is_the_users_error(stand_in, monkeypatch):
    def login(**_):
        raise ValueError("API key must have 40+ characters, has 4")

    monkeypatch.setattr(stand_in, "login", login)
    problem = wandb_run.problem(schema.Log(wandb_project="gpt3"))
    assert "cannot be used (API key must have 40+ characters, has 4)" in str(problem)


def test_all_starts_are_one_run_whose_steps_may_come_again(tmp_path, stand_in):
    log_dir = tmp_path / "small" / "logs"
    with record(log_dir) as recorder:
        log(recorder, 1, 2, 3, 4)
        recorder.log_eval(4, 32, "validation", 4.0)
    with record(log_dir, start_step=2) as recorder:
        log(recorder, 3, 4, loss=3.0)
    first, second = stand_in.begun
    assert (first["entity"], first["project"], first["name"]) == ("team", "gpt3", "small")
    assert first["resume"] == "allow" and first["config"]["model"]["d_model"] == 32
    assert first["id"] == second["id"] and "name" not in second  # it may have a new one there
    assert [row["step"] for row in stand_in.rows] == [1, 2, 3, 4, 4, 3, 4]
    assert [row["_step"] for row in stand_in.rows] == list(range(7))
    assert [row["lm loss"] for row in stand_in.rows if "lm loss" in row] == [4.5] * 4 + [3.0] * 2
    assert stand_in.rows[4] == {
        "lm loss validation": 4.0, "lm loss validation ppl": math.exp(4.0),
        "step": 4, "consumed_samples": 32, "_step": 4,
    }  # fmt: skip


def test_the_servers_step_is_never_gone_behind(tmp_path, stand_in):
    stand_in.step = 100  # of a run whose metrics.jsonl was deleted
    with record(tmp_path) as recorder:
        log(recorder, 1)
    assert stand_in.rows[0]["_step"] == 100


def test_rows_have_tensorboards_names(tmp_path, stand_in):
    with record(tmp_path) as recorder:
        recorder.plot(5, {"goodput": 0.9})
        recorder.log_step(5, 40, 8, 1e-3, VALUES, {"bytes_in_use": 2**30})
    (row,) = stand_in.rows
    own = {"step": 5, "consumed_samples": 40, "_step": 0, "goodput": 0.9}
    both = {"learning-rate": 1e-3, "batch-size": 8, "lm loss": 4.5, "grad-norm": 0.5}
    assert row.items() >= (own | both | {"world-size": 2, "mem-allocated-bytes": 2**30}).items()


def test_a_fault_is_an_alert(tmp_path, stand_in):
    with record(tmp_path) as recorder:
        recorder.record_fault(7, {"fault": "spike", "policy": "skip"})
    assert stand_in.alerts == ["step 7: spike (policy skip)"]


@pytest.mark.parametrize("status", [errors.DONE, errors.REQUEUE])
def test_the_end_is_the_exit_status(tmp_path, stand_in, status):
    with record(tmp_path) as recorder:
        recorder.will_exit(status)
    assert stand_in.ends == [status] and stand_in.preempting == (status == errors.REQUEUE)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.UserError("it is full", page="plan.md"), errors.REFUSED),
        (errors.TransientError("it is full", page="plan.md"), errors.RETRY),
        (ZeroDivisionError(), errors.RETRY),
    ],
)
def test_an_error_ends_the_run_there_as_failed(tmp_path, stand_in, error, status):
    with contextlib.suppress(type(error)), record(tmp_path):
        raise error
    assert stand_in.ends == [status] and not stand_in.preempting


def test_only_the_first_process_records(tmp_path, stand_in):
    with record(tmp_path, active=False) as recorder:
        log(recorder, 1)
    assert stand_in.begun == []


def test_settings_send_no_code_and_no_console_unless_asked(tmp_path, stand_in, monkeypatch):
    monkeypatch.setenv("WANDB_CONSOLE", "wrap")
    with record(tmp_path):
        pass
    settings = stand_in.begun[0]["settings"]
    assert settings["disable_code"] and settings["disable_git"] and "console" not in settings


def test_without_a_network_a_start_is_recorded_offline(tmp_path, stand_in, capsys):
    stand_in.reachable = False
    with record(tmp_path) as recorder:
        log(recorder, 1)
    online, teardown, offline = stand_in.begun
    assert teardown == "teardown" and offline == online | {"mode": "offline"}
    assert len(stand_in.rows) == 1 and stand_in.ends == [errors.DONE]
    (warning,) = warnings(capsys)
    assert "cannot be used (no route to host)" in warning and "wandb sync" in warning


def test_a_lost_wandb_is_one_warning_and_no_more(tmp_path, stand_in, capsys):
    def lose():
        raise ConnectionResetError("Connection lost")

    with record(tmp_path) as recorder:
        log(recorder, 1)
        stand_in.before_row = lose
        log(recorder, 2, 3)
        recorder.record_fault(3, {"fault": "spike", "policy": "warn"})
    (warning,) = warnings(capsys)
    assert "gets nothing more (Connection lost)" in warning and f"{tmp_path}/wandb" in warning
    assert list(losses(tmp_path)) == [1, 2, 3]


def test_a_wandb_that_hangs_holds_up_no_step_and_not_the_end(
    tmp_path, stand_in, monkeypatch, capsys
):
    monkeypatch.setattr(wandb_run, "MAX_WAITING", 3)
    go_on = threading.Event()
    stand_in.before_row = go_on.wait
    begin = time.monotonic()
    with record(tmp_path) as recorder:
        log(recorder, *range(1, 9))
    assert time.monotonic() - begin < 5.0
    go_on.set()
    (warning,) = warnings(capsys)
    assert "it is 3 rows behind" in warning
    assert list(losses(tmp_path)) == list(range(1, 9))


def test_a_wandb_that_does_not_finish_does_not_keep_the_process(
    tmp_path, stand_in, monkeypatch, capsys
):
    go_on = threading.Event()
    monkeypatch.setattr(stand_in, "finish", lambda exit_code: go_on.wait())
    monkeypatch.setattr(wandb_run, "START_SECONDS", 0.1)
    monkeypatch.setattr(wandb_run, "FINISH_SECONDS", -5.0)
    with record(tmp_path) as recorder:
        log(recorder, 1)
    go_on.set()
    (warning,) = warnings(capsys)
    assert "it does not answer" in warning


def test_a_damaged_file_of_the_id_is_one_warning(tmp_path, stand_in, capsys):
    (tmp_path / "wandb.json").write_text("{")
    with record(tmp_path) as recorder:
        log(recorder, 1)
    (warning,) = warnings(capsys)
    assert "wandb.json cannot be read" in warning and stand_in.begun == []


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """Let the real wandb write files alone, and none in the user's home."""
    pytest.importorskip("wandb")
    variables = {"WANDB_MODE": "offline"}
    variables |= {f"WANDB_{n}_DIR": str(tmp_path / "home") for n in ("CONFIG", "CACHE", "DATA")}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    yield variables
    import wandb

    wandb.teardown()


def test_files_of_the_real_wandb_have_both_starts_under_one_id(tmp_path, offline):
    import wandb_files

    assert wandb_run.problem(schema.Log(wandb_project="gpt3")) is None
    with record(tmp_path / "logs") as recorder:
        log(recorder, 1, 2, 3, loss=0.1 + 0.2)
        recorder.record_fault(3, {"fault": "spike", "policy": "skip"})
        recorder.will_exit(errors.REQUEUE)
    with record(tmp_path / "logs", start_step=2) as recorder:
        log(recorder, 3, 4, loss=1 / 3)
    first, second = wandb_files.starts(tmp_path / "logs")
    assert first.run.run_id == second.run.run_id and first.run.resume and second.run.resume
    assert (first.run.entity, first.run.project) == ("team", "gpt3")
    assert (first.run.display_name, second.run.display_name) == (tmp_path.name, "")
    assert first.config["model"]["d_model"] == 32 and first.config["log"]["interval"] == 100
    assert first.step_metrics == second.step_metrics == {"step": "", "*": "step"}
    rows = [(r["_step"], r["step"], r["lm loss"]) for s in (first, second) for r in s.rows]
    assert rows == [(0, 1, 0.1 + 0.2), (1, 2, 0.1 + 0.2), (2, 3, 0.1 + 0.2), (3, 3, 1 / 3),
                    (4, 4, 1 / 3)]  # fmt: skip
    assert (first.alerts, first.is_preempting, first.exit_codes) == (
        ["step 3: spike (policy skip)"], True, [errors.REQUEUE],
    )  # fmt: skip
    assert (second.is_preempting, second.exit_codes) == (False, [errors.DONE])
    assert not list((tmp_path / "logs" / "wandb").rglob("code/*"))
    assert not list((tmp_path / "logs" / "wandb").rglob("output.log"))


SLOWLY = """
import time
from gpt3jax.record import recording
log_step = recording.Recorder.log_step
recording.Recorder.log_step = lambda *args: (time.sleep(0.1), log_step(*args))
"""


@pytest.mark.slow
def test_a_run_that_is_killed_and_goes_on_is_one_run_there(tmp_path, offline):
    import wandb_files

    folder = corpus.write_run(tmp_path)
    option = "--log.wandb-project=gpt3"
    process = corpus.start_main(folder, option, patch=SLOWLY, **offline)
    while process.poll() is None and n_rows(folder / "logs") < 13:
        time.sleep(0.1)
    process.send_signal(signal.SIGSTOP)
    time.sleep(2.0)  # wandb's own process writes its file each second
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    process = corpus.start_main(folder, option, **offline)
    told, _ = process.communicate(timeout=120)
    assert process.returncode == errors.DONE, told
    resumed = int(re.search(r"resumed from \S+ at step (\d+)", told)[1])
    first, second = wandb_files.starts(folder / "logs")
    assert first.run.run_id == second.run.run_id
    assert errors.DONE not in first.exit_codes and second.exit_codes == [errors.DONE]
    sent = [(row["step"], row["lm loss"]) for row in first.rows if row["step"] <= resumed]
    sent += [(row["step"], row["lm loss"]) for row in second.rows]
    assert sent == list(losses(folder / "logs").items())
    own_steps = [row["_step"] for start in (first, second) for row in start.rows]
    assert own_steps == sorted(set(own_steps))


def n_rows(log_dir):
    """Return how many rows W&B's files have by now."""
    import wandb_files

    try:
        return sum(len(start.rows) for start in wandb_files.starts(log_dir))
    except (AssertionError, KeyError):  # a file that has just been made
        return 0


def test_a_killed_service_of_wandb_ends_no_run(tmp_path, offline, capsys):
    with record(tmp_path / "logs") as recorder:
        log(recorder, 1)
        kill_wandb()
        step, deadline = 1, time.monotonic() + 20
        while "gets nothing more" not in capsys.readouterr().out and time.monotonic() < deadline:
            step += 1
            log(recorder, step)
            time.sleep(0.05)
        assert time.monotonic() < deadline
    assert list(losses(tmp_path / "logs")) == list(range(1, step + 1))


def kill_wandb():
    """Kill wandb's own process, once there is one."""
    task = pathlib.Path(f"/proc/{os.getpid()}/task")
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        for child in {c for file in task.glob("*/children") for c in file.read_text().split()}:
            if pathlib.Path(f"/proc/{child}/comm").read_text() == "wandb-core\n":
                os.kill(int(child), signal.SIGKILL)
                return
        time.sleep(0.05)
    raise AssertionError("wandb has no process")
