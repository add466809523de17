"""Console lines as Megatron's, files that survive crashes, and no bar where nobody watches."""

import errno
import io
import json
import math
import os
import pathlib
import re
import struct
import subprocess
import sys
import time

import pytest
from tensorboardX import event_file_writer
from tensorboardX.proto import event_pb2

from gpt3jax import errors
from gpt3jax.config import schema
from gpt3jax.hardware import flops
from gpt3jax.record import console_line, log_folder, metrics, recording, tensorboard

# As Megatron-LM printed them (a run of 30 iterations of 8 samples); see tests/golden.
MEGATRON_STEPS = [
    " [2026-11-24 09:10:16.184966] iteration        1/      30 | consumed samples:            8 | elapsed time per iteration (ms): 166.4 | learning rate: 1.500000E-03 | global batch size:     8 | lm loss: 4.898907E+00 | loss scale: 1.0 | grad norm: 4.103 | number of skipped iterations:   0 | number of nan iterations:   0 |",  # noqa: E501
    " [2026-11-24 09:10:16.559887] iteration        4/      30 | consumed samples:           32 | elapsed time per iteration (ms): 74.0 | learning rate: 6.000000E-03 | global batch size:     8 | lm loss: 4.269797E+00 | loss scale: 1.0 | grad norm: 1.541 | number of skipped iterations:   0 | number of nan iterations:   0 |",  # noqa: E501
    " [2026-11-24 09:10:20.361962] iteration       27/      30 | consumed samples:          216 | elapsed time per iteration (ms): 236.7 | learning rate: 2.158931E-03 | global batch size:     8 | lm loss: 3.485592E+00 | loss scale: 1.0 | grad norm: 1.555 | number of skipped iterations:   0 | number of nan iterations:   0 |",  # noqa: E501
]
MEGATRON_EVALS = {
    ("validation", 10, 33.39242): " validation loss at iteration 10 | lm loss value: 3.508329E+00 | lm loss PPL: 3.339242E+01 |",  # noqa: E501
    ("test", 30, 38.09494): " validation loss at iteration 30 on test set | lm loss value: 3.640081E+00 | lm loss PPL: 3.809494E+01 |",  # noqa: E501
}  # fmt: skip
STAMP = r" \[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}\]"
# What readers of Megatron's logs look for.
MEGATRON_LINE = re.compile(
    rf"^{STAMP} iteration +(?P<step>\d+)/ *(?P<steps>\d+) \| "
    r"consumed samples: +(?P<samples>\d+) \| "
    r"(?:skipped samples: +(?P<skipped_samples>\d+) \| )?"
    r"elapsed time per iteration \(ms\): (?P<ms>[\d.]+) \| "
    r"(?:throughput per GPU \(TFLOP/s/GPU\): (?P<tflops>[\d.]+) \| )?"
    r"learning rate: (?P<lr>[\d.E+-]+) \| global batch size: +(?P<batch>\d+) \| "
    r"(?:lm loss: (?P<loss>[\d.E+-]+) \| )?loss scale: (?P<scale>[\d.]+) \| "
    r"(?:grad norm: (?P<norm>[\d.]+) \| )?number of skipped iterations: +(?P<skipped>\d+) \| "
    r"number of nan iterations: +(?P<nan>\d+) \|"
)
VALUES = {"loss": 0.1 + 0.2, "grad_norm": 1 / 3, "loss_scale": 1.0, "interval_loss": 2 / 3}
VALUES |= {"skipped": 0, "skipped_in_interval": 0, "nan_in_interval": 0, "skipped_samples": 0}
VALUES |= {"spikes_in_interval": 0}
VALUES |= {"step_time": 0.25}
MACHINE = {"n_devices": 2, "peak_flops": None}


def make_config(log_dir="", checkpoint_dir=""):
    return schema.Config(
        model=schema.Model(n_layers=4, d_model=32, n_heads=4, seq_len=32, vocab_size=66),
        optimizer=schema.Optimizer(peak_lr=6e-3),
        batch=schema.Batch(global_batch_size=8),
        train=schema.Train(n_steps=30),
        checkpoint=schema.Checkpoint(dir=checkpoint_dir),
        log=schema.Log(dir=str(log_dir)),
    )


def record(log_dir="", start_step=0, checkpoint_dir="", **fields):
    span = recording.Span(
        start_step=start_step, start_samples=8 * start_step, end_step=30, end_samples=240
    )
    return recording.Recorder(make_config(log_dir, checkpoint_dir), span, **MACHINE | fields)


def log(recorder, *steps, **values):
    for step in steps:
        recorder.log_step(step, 8 * step, 8, 1e-3, VALUES | values)


def entries(log_dir):
    text = (log_dir / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def events(folder):
    """Read a folder's TensorBoard files: TFRecords of length, its CRC, an Event, its CRC."""
    found = []
    for file in sorted(folder.glob("events.out.tfevents.*")):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(event_pb2.Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def scalars(folder):
    """Return what a TensorBoard reader shows, {tag: {step: value}}, purging as it does."""
    shown = {}
    for event in events(folder):
        if event.session_log.status == event_pb2.SessionLog.START:
            for points in shown.values():
                for step in [step for step in points if step >= event.step]:
                    del points[step]
        for value in event.summary.value:
            if value.HasField("simple_value"):
                shown.setdefault(value.tag, {})[event.step] = value.simple_value
    return shown


@pytest.mark.parametrize("line", MEGATRON_STEPS)
def test_console_line_is_megatrons_to_the_letter(line, capsys):
    fields = MEGATRON_LINE.match(line).groupdict()
    step, samples, batch = (int(fields[name]) for name in ("step", "samples", "batch"))
    values = VALUES | {"loss": 9.0, "interval_loss": float(fields["loss"])}
    values |= {"grad_norm": float(fields["norm"]), "step_time": float(fields["ms"]) / 1e3}
    with record() as recorder:
        recorder.log_step(step, samples, batch, float(fields["lr"]), values)
    ours = capsys.readouterr().out
    assert MEGATRON_LINE.match(ours)["tflops"] is not None
    ours = re.sub(r"throughput per GPU \(TFLOP/s/GPU\): [\d.]+ \| ", "", ours)
    assert re.sub(STAMP, "", ours).startswith(re.sub(STAMP, "", line))


def test_console_line_of_skipped_steps_leaves_out_what_has_no_value(capsys):
    skipped = {"skipped": 1, "skipped_in_interval": 2, "nan_in_interval": 1, "skipped_samples": 16}
    with record() as recorder:
        log(recorder, 3, loss=math.nan, interval_loss=math.nan, grad_norm=math.inf, **skipped)
    found = MEGATRON_LINE.match(capsys.readouterr().out)
    assert found["loss"] is None and found["norm"] is None
    assert (found["skipped_samples"], found["skipped"], found["nan"]) == ("16", "2", "1")


def test_own_fields_follow_megatrons(capsys):
    flops_per_token = flops.flops_per_token(make_config().model)
    # 8 x 32 tokens in 0.25 s: 1024 a second, 512 a second and device.
    with record(peak_flops=512 * flops_per_token / 0.425) as recorder:
        log(recorder, 12)
    line = capsys.readouterr().out
    own = line[MEGATRON_LINE.match(line).end() :]
    # 18 steps of 0.25 s are left: 4.5 s, rounded to even.
    assert own == " tokens/s: 1024.0 | MFU: 42.5% | tokens: 3.07K/7.68K | ETA: 0m04s |\n"


def test_unknown_peak_leaves_the_mfu_out(tmp_path, capsys):
    with record(tmp_path) as recorder:
        log(recorder, 1)
    assert "MFU" not in capsys.readouterr().out
    assert "mfu" not in entries(tmp_path)[0] and "mfu" not in scalars(tmp_path)


def test_clock_that_stands_still_ends_no_run(tmp_path):
    with record(tmp_path, peak_flops=1e9) as recorder:
        log(recorder, 1, step_time=0.0)
    assert entries(tmp_path)[0]["tokens_per_second"] == "NaN"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0m00s"), (250, "4m10s"), (11_100, "3h05m"), (183_600, "2d03h"), (math.nan, "?")],
)
def test_eta_has_no_colon(seconds, text):
    assert console_line.duration(seconds) == text


@pytest.mark.parametrize(("split", "step", "perplexity"), MEGATRON_EVALS)
def test_evaluation_line_is_megatrons(split, step, perplexity, capsys):
    with record() as recorder:
        recorder.log_eval(step, 8 * step, split, math.log(perplexity))
    above, line, below = capsys.readouterr().out.splitlines()
    assert line == MEGATRON_EVALS[split, step, perplexity]
    assert above == below == "-" * len(line)


def test_jsonl_keeps_every_bit(tmp_path):
    with record(tmp_path, peak_flops=1e9) as recorder:
        recorder.log_step(5, 40, 8, 1 / 7, VALUES)
        recorder.log_eval(5, 40, "validation", 0.7)
        recorder.log_eval(5, 40, "test", 30.0)
    step, validation, test = entries(tmp_path)
    now = time.time()
    assert all(now - 60 < entry.pop("time") <= now for entry in (step, validation, test))
    per_device = 8 * 32 / 0.25 / 2
    flops_per_second = per_device * flops.flops_per_token(make_config().model)
    assert step == VALUES | {
        "step": 5,
        "consumed_samples": 40,
        "consumed_tokens": 1280,
        "learning_rate": 1 / 7,
        "batch_size": 8,
        "tokens_per_second": 1024.0,
        "tokens_per_second_per_device": per_device,
        "tflops_per_device": flops_per_second / 1e12,
        "mfu": flops_per_second / 1e9,
    }
    place = {"step": 5, "consumed_samples": 40}
    assert validation == place | {"validation_loss": 0.7, "validation_ppl": math.exp(0.7)}
    assert test == place | {"test_loss": 30.0, "test_ppl": math.exp(20)}


def test_jsonl_stays_json_where_floats_are_not_finite(tmp_path):
    with record(tmp_path) as recorder:
        log(recorder, 1, loss=math.nan, grad_norm=math.inf, interval_loss=-math.inf, skipped=1)
        recorder.log_eval(1, 8, "validation", math.nan)

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    step, evaluation = (json.loads(line, parse_constant=refuse) for line in lines)
    assert math.isnan(float(step["loss"])) and float(step["grad_norm"]) == math.inf
    assert float(step["interval_loss"]) == -math.inf
    assert evaluation["validation_loss"] == evaluation["validation_ppl"] == "NaN"


def test_what_is_recorded_has_a_meaning(tmp_path):
    with record(tmp_path, peak_flops=1e12) as recorder:
        recorder.log_step(1, 8, 8, 0.5, VALUES, {"bytes_in_use": 1, "peak_bytes_in_use": 2})
        for split in ("validation", "test"):
            recorder.log_eval(1, 8, split, 4.5)
    names = {name for entry in entries(tmp_path) for name in entry}
    assert names == {*metrics.STEP, *metrics.EVALUATION}
    tags = tensorboard.TAGS | tensorboard.EVALUATION_TAGS
    tags |= tensorboard.STEP_TAGS | tensorboard.MEMORY_TAGS
    assert scalars(tmp_path).keys() == tags.keys()
    assert set(tags.values()) - names == set(metrics.TENSORBOARD)


def test_jsonl_is_there_line_by_line(tmp_path):
    with record(tmp_path) as recorder:
        for step in (1, 2):
            log(recorder, step)
            assert [entry["step"] for entry in entries(tmp_path)] == list(range(1, step + 1))


def test_tensorboard_has_megatrons_names(tmp_path):
    memory = {"bytes_in_use": 2**30, "peak_bytes_in_use": 2**31, "num_allocs": 3}
    with record(tmp_path, peak_flops=1e9) as recorder:
        recorder.log_step(5, 40, 8, 0.5, VALUES | {"loss": 4.5, "skipped_samples": 16}, memory)
        recorder.log_eval(5, 40, "validation", 0.0)
        recorder.log_eval(5, 40, "test", 0.0)
    over_steps, over_samples = scalars(tmp_path), scalars(tmp_path / "vs_samples")
    both = {"learning-rate": 0.5, "batch-size": 8, "lm loss": 4.5, "loss-scale": 1}
    both |= {"grad-norm": pytest.approx(1 / 3), "world-size": 2}
    both |= {"lm loss validation": 0, "lm loss validation ppl": 1}
    both |= {"lm loss test": 0, "lm loss test ppl": 1}
    assert over_samples == {f"{tag} vs samples": {40: value} for tag, value in both.items()}
    alone = {"skipped-train-samples": 16, "iteration-time": 0.25, "tokens-per-second": 1024}
    alone |= {"tokens-per-second-per-device": 512, "skipped-steps": 0, "loss-spikes": 0}
    alone |= {"mem-allocated-bytes": 2**30, "mem-max-allocated-bytes": 2**31}
    flops_per_second = 512 * flops.flops_per_token(make_config().model)
    alone |= {"throughput": pytest.approx(flops_per_second / 1e12)}
    alone |= {"mfu": pytest.approx(flops_per_second / 1e9)}
    assert over_steps == {tag: {5: value} for tag, value in (both | alone).items()}


def test_resolved_config_is_beside_the_run(tmp_path):
    cfg = make_config(tmp_path)
    with record(tmp_path):
        pass
    flat = json.loads((tmp_path / "config.json").read_text())
    assert flat == json.loads(json.dumps(schema.flatten(cfg)))
    (text,) = [v for e in events(tmp_path) for v in e.summary.value if v.tag.startswith("config")]
    assert text.metadata.plugin_data.plugin_name == "text"
    assert b"| model.d_model | 32 |" in text.tensor.string_val[0]


def test_resume_leaves_each_step_once(tmp_path, capsys):
    with record(tmp_path) as recorder:
        log(recorder, 1, 2, 3, 4, loss=1.0)
        recorder.log_eval(4, 32, "validation", 1.0)
    with record(tmp_path, start_step=2) as recorder:
        assert "moved 3 entries past step 2" in capsys.readouterr().out
        log(recorder, 3, 5, loss=2.0)
    found = [(entry["step"], entry["loss"]) for entry in entries(tmp_path)]
    assert found == [(1, 1.0), (2, 1.0), (3, 2.0), (5, 2.0)]
    aside = (tmp_path / "metrics.dropped.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in aside] == [3, 4, 4]
    # Without a step 4 in the second run only the purge can have removed the first run's.
    assert scalars(tmp_path)["lm loss"] == {1: 1.0, 2: 1.0, 3: 2.0, 5: 2.0}
    over_samples = scalars(tmp_path / "vs_samples")["lm loss vs samples"]
    assert over_samples == {8: 1.0, 16: 1.0, 24: 2.0, 40: 2.0}


@pytest.mark.parametrize(
    ("ours", "start_step", "is_refused"),
    [
        ("", 0, True),
        ("elsewhere", 0, True),
        ("", 2, True),
        ("", 4, False),  # nothing would be set aside
        ("elsewhere", 2, False),  # it has resumed from a folder that was moved
        ("a/../checkpoints", 0, False),
    ],
)
def test_a_run_displaces_no_log_of_a_run_that_can_go_on(
    tmp_path, monkeypatch, ours, start_step, is_refused
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    with record("logs", checkpoint_dir="checkpoints") as recorder:
        log(recorder, 1, 2, 3, 4)
    problem = log_folder.problem(make_config("logs", ours), start_step)
    assert bool(problem) == is_refused
    if problem:
        words = rf"log\.dir=logs .* in checkpoints, .*checkpoint\.dir='{ours}'.* another log\.dir"
        assert re.match(words, problem.message)


@pytest.mark.parametrize("config", [None, "{", "{}", '{"checkpoint.dir": ""}'])
def test_a_run_without_checkpoints_may_be_repeated(tmp_path, config):
    with record(tmp_path) as recorder:
        log(recorder, 1, 2)
    if config:
        (tmp_path / "config.json").write_text(config)
    else:
        (tmp_path / "config.json").unlink()
    assert log_folder.problem(make_config(tmp_path), 0) is None


@pytest.mark.parametrize(
    "tail", [b'{"step": 1, "cut sh', b'{"step": 1}', b"\0\0\n", b"{}\n", b"7\n"]
)
def test_resume_repairs_the_end_that_a_crash_left(tmp_path, tail):
    with record(tmp_path) as recorder:
        log(recorder, 1)
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(tail)
    with record(tmp_path, start_step=1) as recorder:
        log(recorder, 2)
    assert [entry["step"] for entry in entries(tmp_path)] == [1, 2]
    assert (tmp_path / "metrics.dropped.jsonl").read_bytes() == tail.rstrip(b"\n") + b"\n"


def test_crash_while_dropping_keeps_the_whole_file(tmp_path, monkeypatch):
    with record(tmp_path) as recorder:
        log(recorder, 1, 2, 3)
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        record(tmp_path, start_step=1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_unwritable_folder_is_the_users_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.UserError, match=rf"log\.dir={tmp_path}/file/log .*another folder"):
        record(tmp_path / "file" / "log")


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="Linux's full device")
def test_full_disk_is_the_users_error(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    monkeypatch.setattr(pathlib.Path, "read_bytes", lambda _: b"")  # /dev/full reads for ever
    full = pytest.raises(errors.UserError, match=rf"log\.dir={tmp_path} .*No space left")
    with full, record(tmp_path) as recorder:
        log(recorder, 1)


def test_full_disk_under_tensorboard_is_an_error_and_no_hang(tmp_path, monkeypatch):
    def flush(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with record(tmp_path) as recorder:
        monkeypatch.setattr(tensorboard, "FLUSH_SECONDS", -1.0)
        with monkeypatch.context() as full:
            full.setattr(event_file_writer.EventsWriter, "flush", flush)
            with pytest.raises(errors.UserError, match=r"log\.dir=.*No space left"):
                log(recorder, 1)


def test_full_disk_at_the_end_does_not_hide_why_the_run_ended(tmp_path, monkeypatch):
    def close(_):
        raise errors.UserError("log.dir", page="operations.md#by-symptom")

    real_close = log_folder.LogFolder.close
    with pytest.raises(ZeroDivisionError), record(tmp_path) as recorder:
        monkeypatch.setattr(log_folder.LogFolder, "close", close)
        raise ZeroDivisionError
    with pytest.raises(errors.UserError), recorder:
        pass
    real_close(recorder.folder)


def test_lines_are_out_at_once(monkeypatch):
    class Stdout(io.StringIO):
        shown = ""

        def flush(self):
            self.shown = self.getvalue()

    stdout = Stdout()
    monkeypatch.setattr(sys, "stdout", stdout)
    with record() as recorder:
        recorder.say("the mesh is (2, 1)")
        assert stdout.shown == "the mesh is (2, 1)\n"


def on_a_terminal(log_dir, monkeypatch):
    """Return what a terminal gets of a step, a line and an evaluation."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with record(log_dir, start_step=10) as recorder:
        recorder.advance(15, 4.5, 1e-3)
        log(recorder, 15)
        recorder.say("saved")
        recorder.log_eval(15, 120, "validation", 4.5)
    return terminal.getvalue()


def test_the_view_on_a_terminal_takes_the_place_of_lines_that_the_folder_keeps(
    tmp_path, monkeypatch
):
    shown = on_a_terminal(tmp_path, monkeypatch)
    fields = (
        "step 15/30  50%",
        "loss 4.5000",
        "learning rate 1.00e-03",
        "1.02K tokens/s",
        "ETA 0m",
    )
    assert all(field in shown for field in fields)
    assert "saved\n" in shown and " iteration " not in shown.replace("at iteration", "")
    assert "validation loss at iteration 15 |" in shown and "---" not in shown
    assert [entry["step"] for entry in entries(tmp_path)] == [15, 15]


def test_a_terminal_gets_all_lines_where_no_folder_keeps_them(monkeypatch):
    shown = on_a_terminal("", monkeypatch)
    assert any(MEGATRON_LINE.match(line) for line in re.split(r"[\r\n]|\x1b\[\d?[A-Z]", shown))


def test_inactive_recorder_does_nothing(tmp_path, capsys):
    with record(tmp_path / "log", active=False) as recorder:
        log(recorder, 1)
        recorder.log_eval(1, 8, "test", 1.0)
        recorder.advance(1, 1.0, 1e-3)
        recorder.say("hello")
    assert capsys.readouterr() == ("", "") and not (tmp_path / "log").exists()


def test_without_log_dir_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with record() as recorder:
        log(recorder, 1)
    recorder.close()  # once more, which is harmless
    assert list(tmp_path.iterdir()) == []


def test_new_recorder_in_the_same_second_leaves_the_first_ones_events(tmp_path, monkeypatch):
    monkeypatch.setattr(event_file_writer.time, "time", lambda: 1.8e9)
    for step in (1, 2):
        with record(tmp_path, start_step=step - 1) as recorder:
            log(recorder, step)
    assert set(scalars(tmp_path)["lm loss"]) == {1, 2}


def test_recording_imports_no_jax():
    code = "import sys, gpt3jax.record.recording; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
