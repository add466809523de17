"""What runs leave is read as it is: half-written, damaged in part, of earlier versions."""

import json
import math
import shutil

import numpy as np
import pytest

from gpt3jax import errors
from gpt3jax.report import figures, marks, metric_tables, positions, progress, run_folder

import made_up_run
from made_up_run import NOW


def read(folder):
    (run,) = run_folder.read_all([str(folder)])
    return run


@pytest.fixture
def folder(tmp_path):
    return made_up_run.write(tmp_path / "run")


def test_a_run_is_found_by_its_log_dir_and_by_the_folder_around_it(folder):
    assert run_folder.find(str(folder)) == run_folder.find(str(folder / "logs")) == folder / "logs"


def test_what_is_no_run_is_refused_with_what_was_looked_for(folder, tmp_path):
    (tmp_path / "other").mkdir()
    for name, words in (
        ("other", "no metrics.jsonl, neither in itself nor in"),
        ("x", "no folder"),
    ):
        with pytest.raises(errors.UserError, match=words):
            run_folder.read_all([str(tmp_path / name)])
    file = folder / "logs" / "metrics.jsonl"
    for text in ("step,loss\n1,2\n", "{}\n[1]\n", '{"loss": 3}\n', "\x00\xff\n"):
        file.write_text(text)
        with pytest.raises(errors.UserError, match=r"metrics\.jsonl has no entry in its \d lines"):
            read(folder)
    with pytest.raises(errors.UserError, match="is the same folder as"):
        run_folder.read_all([str(folder), str(folder / "logs")])


def test_a_folder_that_cannot_be_read_is_an_error_of_the_user(folder, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.is_file", refuse)
        with pytest.raises(errors.UserError, match=r"RUN .* cannot be read \(Permission denied\)"):
            read(folder)
    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    with pytest.raises(errors.UserError, match=r"metrics\.jsonl cannot be read \(Permission"):
        read(folder)


def test_a_cut_end_is_not_an_error_and_damage_in_the_middle_is_told(folder):
    file = folder / "logs" / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    n = len(read(folder).metrics.steps)
    file.write_bytes(b"".join(lines)[:-9])
    run = read(folder)
    assert len(run.metrics.steps) + len(run.metrics.evaluations) == len(lines) - 1
    assert run.metrics.has_cut_end and not run.notes
    file.write_bytes(b"".join([b'{"step": 1, \n', *lines]))
    run = read(folder)
    assert len(run.metrics.steps) == n and not run.metrics.has_cut_end
    assert "1 lines of metrics.jsonl are not whole entries" in run.notes


def test_values_that_json_lacks_and_values_of_no_sense(tmp_path):
    entry = {"step": 3, "loss": "NaN", "grad_norm": "Infinity", "mfu": None, "batch_size": [1]}
    file = tmp_path / "metrics.jsonl"
    file.write_text(json.dumps(entry | {"loss_scale": True, "step_time": "fast"}) + "\n")
    table = metric_tables.read(file).steps
    names = ("loss", "mfu", "batch_size", "step_time", "learning_rate")
    assert all(math.isnan(table[name][0]) for name in names)
    assert table["grad_norm"][0] == math.inf and table["loss_scale"][0] == 1
    assert len(table.known("grad_norm")) == 0 and math.isnan(table.last("grad_norm"))


def test_other_files_that_are_missing_or_damaged_leave_the_rest(folder):
    logs = folder / "logs"
    (logs / "metrics.dropped.jsonl").write_text('{"step": 3, "lo\n')  # a killed run's last line
    assert not read(folder).notes
    for name in ("config.json", "goodput.json", "faults/step-30.json"):
        content = (logs / name).read_bytes()
        (logs / name).write_bytes(b'{"cut": ')
        run = read(folder)
        assert run.notes and len(run.metrics.steps) > 0, name
        (logs / name).write_bytes(content)
    for name in ("config.json", "goodput.json", "metrics.dropped.jsonl"):
        (logs / name).unlink()
    shutil.rmtree(logs / "faults")
    run = read(folder)
    assert not run.notes and run.config is None and not run.starts and not run.faults
    assert progress.of(run, NOW).status == "no account of its starts"


def test_checkpoints_are_found_beside_logs_wherever_the_run_was_moved(folder, tmp_path):
    assert [entry.step for entry in read(folder).checkpoints] == [40]
    moved = tmp_path / "elsewhere" / "run"
    shutil.copytree(folder, moved)
    assert [entry.step for entry in read(moved).checkpoints] == [40]
    shutil.rmtree(moved / "checkpoints")
    assert read(moved).checkpoints is None


@pytest.mark.parametrize(
    ("end", "seconds_ago", "status"),
    [
        ("complete", 9e9, "complete"), ("stopped", 9e9, "stopped on request"),
        ("refused", 9e9, "ended by an error"), ("", 60, "running"), ("", 7200, "no sign for 2h00m"),
    ],
)  # fmt: skip
def test_progress_says_how_the_last_start_is_doing(folder, end, seconds_ago, status):
    made_up_run.end_with(folder, end)
    run = read(folder)
    last = run.starts[-1]
    at = progress.of(run, last.began + last.total + seconds_ago)
    assert at.status.startswith(status)
    if end == "complete":
        assert at.end_step == at.step == 80 and math.isnan(at.seconds_left)
    else:  # 20 more steps of 0.5 s
        assert at.end_step == 100 and at.seconds_left == pytest.approx(10)


def test_a_run_at_its_end_is_complete_though_its_account_is_lost(folder):
    file = folder / "logs" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"train.n_steps": 80}))
    (folder / "logs" / "goodput.json").unlink()
    assert progress.of(read(folder), NOW).status == "complete"


def test_figures_are_those_of_the_files(folder):
    shown = {name: (value, remark) for name, value, remark in figures.of(read(folder), NOW)}
    assert shown["steps"][0] == "80 of 100" and shown["steps"][1].startswith("80%, ")
    assert shown["tokens"] == ("40.96K", "1,280 samples, batch 16")
    assert shown["loss"][0] == f"{made_up_run.loss(80):.4f}"
    assert shown["loss"][1] == f"best {made_up_run.loss(80):.4f} at step 80"
    assert (
        shown["validation loss"][0] == "5.0000"
        and "perplexity 148.4" in shown["validation loss"][1]
    )
    assert shown["tokens/s"] == ("1.02K", "256 a device") and shown["MFU"][0] == "40.0%"
    # 85 steps of 0.5 s, of which 5 are lost; 20 s of other phases
    assert shown["goodput"] == (f"{40 / 62.5:.1%}", "steps that count, of 1m02s")
    assert shown["starts"] == ("2", "1m40s between them")
    assert shown["skipped steps"] == ("3", "1 losses not finite, 1 spikes")


def test_time_is_real_time_with_pauses(folder):
    run = read(folder)
    places = positions.Positions(run)
    unit = positions.Unit("seconds", 1.0)
    places.use(unit)
    at = places.at(np.array([40.0, 42.0, 41.0]))
    first, second = run.starts
    assert at["time"][0] == pytest.approx(made_up_run.moment(40) - first.began)
    assert at["time"][1] == pytest.approx(made_up_run.moment(42) - first.began)
    assert at["time"][0] < places.of_moment(second.began) < at["time"][1]
    assert at["tokens"][2] == pytest.approx(41 * 512)


def test_entries_without_a_time_are_placed_by_their_steps(folder):
    file = folder / "logs" / "metrics.jsonl"
    entries = [json.loads(line) for line in file.read_text().splitlines()]
    for entry in entries:
        if entry["step"] <= 40 or entry["step"] == 60:
            del entry["time"]
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    run = read(folder)
    places = positions.Positions(run)
    at = places.at(np.array([20.0, 40.0, 60.0, 62.0]))["time"] + run.starts[0].began
    wanted = made_up_run.moment(42) - 11, made_up_run.moment(42) - 1
    assert at[:2] == pytest.approx(wanted)  # 0.5 s a step
    assert at[2:] == pytest.approx([made_up_run.moment(60), made_up_run.moment(62)])
    for entry in entries:
        entry.pop("time", None)
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    places = positions.Positions(read(folder))
    assert places.at(np.array([80.0]))["time"] == pytest.approx([40])


def test_units_of_time_fit_the_run():
    names = [positions.unit_of(hours * 3600).name for hours in (0.1, 2.9, 3.1, 95, 97)]
    assert names == ["minutes", "minutes", "hours", "hours", "days"]


def test_marks_count_each_fault_once(folder):
    run = read(folder)
    found = marks.of(run, positions.Positions(run), "")
    by_kind = {mark.kind: mark for mark in found}
    assert len(found) == len(by_kind) == 5
    assert by_kind["not finite"].text == "step 30: not finite, loss NaN, its update left out"
    assert by_kind["spike"].text == "1 a spike in steps 49 to 50"  # no file explains it
    assert by_kind["skipped steps"].text == "3 skipped in steps 29 to 30"
    assert by_kind["restart"].xs["step"] == by_kind["layout change"].xs["step"] == 40
    assert by_kind["restart"].xs["time"] == pytest.approx(run.starts[1].began - run.starts[0].began)
    assert by_kind["layout change"].text == "from data 4 to tensor 4 after step 40"
    assert by_kind["restart"].across and not by_kind["spike"].across
    assert not any(mark.across for mark in marks.of(run, positions.Positions(run), "run: "))


def test_many_marks_become_fewer_that_count_them(folder):
    file = folder / "logs" / "metrics.jsonl"
    entry = json.loads(file.read_text().splitlines()[0]) | {"skipped_in_interval": 1}
    lines = (json.dumps(entry | {"step": step}) for step in range(1, 5001))
    file.write_text("\n".join(lines) + "\n")
    run = read(folder)
    found = [m for m in marks.of(run, positions.Positions(run), "") if m.kind == "skipped steps"]
    assert len(found) <= 401
    assert sum(int(m.text.split()[2]) for m in found if m.text.startswith("skipped")) >= 4990
