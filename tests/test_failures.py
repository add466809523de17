"""Whatever ends a run, nothing is lost: the next start goes on, or says why it cannot."""

import contextlib
import gzip
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from gpt3jax import errors, step, train
from gpt3jax.checkpoint import storage
from gpt3jax.data import indexed

import corpus
import documents
import tiny

pytestmark = pytest.mark.slow  # minutes on 2 cores: real processes, killed and started again


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the folder of a run of 40 steps that nothing disturbed; it is to be copied."""
    folder = corpus.write_run(tmp_path_factory.mktemp("finished"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert corpus.call_main(monkeypatch, folder) == 0
    assert [r["step"] for r in corpus.records(folder)] == list(range(1, 41))
    return folder


def steps_saved(folder):
    return sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())


def when(process, condition, signal_number):
    """Send a signal to a process as soon as `condition()` holds.

    It is stopped meanwhile, so that the condition still holds when the signal comes.
    """
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if condition():
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.01)  # until its threads have stopped
            hit = condition()
            if hit:
                process.send_signal(signal_number)
            process.send_signal(signal.SIGCONT)
            if hit:
                return
        time.sleep(0.001)
    process.kill()
    raise AssertionError(f"the moment never came: {process.communicate()}")


def logged(folder, n):
    """Return a condition: n steps are in metrics.jsonl."""
    file = folder / "logs" / "metrics.jsonl"
    return lambda: file.exists() and file.read_bytes().count(b"\n") >= n


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_after_a_signal_a_run_goes_on_as_if_uninterrupted(
    tmp_path, monkeypatch, capfd, finished, number
):
    folder = corpus.write_run(tmp_path)
    process = corpus.start_main(folder, "--checkpoint.save-interval=1000")
    when(process, logged(folder, 7), number)
    told, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (errors.REQUEUE, "")
    found = re.search(r"stopped at step (\d+), saved in (\S+); resume with: (.*)", told)
    (last,) = steps_saved(folder)
    assert last == int(found[1]) and 7 <= last < 40 and found[2] == f"{folder}/checkpoints"
    assert [r["step"] for r in corpus.records(folder)] == list(range(1, last + 1))
    python, *words = shlex.split(found[3])
    assert pathlib.Path(shutil.which(python, path=None)).samefile(sys.executable)
    assert words[:2] == ["-m", "gpt3jax.main"]
    options = [o for o in words[2:] if "cpu-devices" not in o]  # this process has them
    assert options[0] == "--config=recipe.py"
    assert corpus.call_main(monkeypatch, folder, *options[1:]) == 0
    assert f"resumed from {folder}/checkpoints at step {last}" in capfd.readouterr().out
    assert corpus.records(folder) == corpus.records(finished)


def test_after_kill_a_run_goes_on_from_its_last_checkpoint(tmp_path, monkeypatch, capfd, finished):
    folder = corpus.write_run(tmp_path)
    process = corpus.start_main(folder)
    when(process, logged(folder, 23), signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    saved = steps_saved(folder)[-1]
    assert 10 <= saved <= 30
    assert corpus.call_main(monkeypatch, folder) == 0
    assert f"at step {saved}, {8 * saved} samples" in capfd.readouterr().out
    assert corpus.records(folder) == corpus.records(finished)
    assert (folder / "logs" / "metrics.dropped.jsonl").exists()  # what came twice is kept apart


def test_a_save_cut_off_by_kill_leaves_the_one_before(tmp_path, monkeypatch, capfd, finished):
    folder = corpus.write_run(tmp_path)
    process = corpus.start_main(folder, "--checkpoint.save-interval=5")

    def saving():
        """Tell whether a save is under way, not the first, of a step not saved again later."""
        names = [path.name for path in (folder / "checkpoints").glob("[0-9]*")]
        return len(names) > 1 and any(name.endswith("5.orbax-checkpoint-tmp") for name in names)

    when(process, saving, signal.SIGKILL)
    process.communicate(timeout=60)
    saved = steps_saved(folder)[-1]
    unfinished = list((folder / "checkpoints").glob("*tmp"))
    assert unfinished and process.returncode == -signal.SIGKILL
    assert corpus.call_main(monkeypatch, folder) == 0
    told = capfd.readouterr().out
    assert f"at step {saved}, {8 * saved} samples" in told and "WARNING" not in told
    assert corpus.records(folder) == corpus.records(finished)
    assert not list((folder / "checkpoints").glob("*tmp"))


def array_file(folder):
    """Return the largest file of a checkpoint's array data."""
    return max((folder / "state").rglob("d/*"), key=lambda p: p.stat().st_size)


def flip(folder):
    content = bytearray(array_file(folder).read_bytes())
    content[len(content) // 2] ^= 0x10
    array_file(folder).write_bytes(content)


def truncate(folder):
    os.truncate(array_file(folder), array_file(folder).stat().st_size // 2)


def delete(folder):
    array_file(folder).unlink()


def cut_meta(folder):
    (file,) = (folder / "meta").glob("metadata")
    os.truncate(file, 20)


def change_meta(folder):
    """Let the checkpoint seem to be of another position."""
    (file,) = (folder / "meta").glob("metadata")
    content = file.read_bytes()
    assert content.count(b'"consumed_samples": 320') == 1
    file.write_bytes(content.replace(b'_samples": 320', b'_samples": 312'))


def delete_meta(folder):
    shutil.rmtree(folder / "meta")


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGES = [flip, truncate, delete, cut_meta, change_meta, delete_meta, empty]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    tmp_path, monkeypatch, capfd, finished, damage
):
    folder = shutil.copytree(finished, tmp_path / "run")
    damage(folder / "checkpoints" / "40")
    n_steps = 40 if damage is flip else 30  # 30: nothing to do, to save time
    assert corpus.call_main(monkeypatch, folder, f"--train.n-steps={n_steps}") == 0
    told = capfd.readouterr()
    (warning,) = [line for line in told.out.splitlines() if "WARNING" in line]
    assert f"checkpoint {folder}/checkpoints/40 " in warning
    assert warning.endswith("going back to an older one") and told.err == ""
    assert "at step 30, 240 samples" in told.out
    assert (folder / "checkpoints" / "damaged-40").is_dir()
    assert steps_saved(folder) == [20, 30, 40][: n_steps // 10 - 1]
    # A start with nothing to do leaves the log as it is; the other one wrote the same again.
    assert corpus.records(folder) == corpus.records(finished)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_whose_only_checkpoint_is_damaged_never_starts_from_scratch(
    tmp_path, monkeypatch, capfd, finished, damage
):
    folder = shutil.copytree(finished, tmp_path / "run")
    for number in steps_saved(folder)[:-1]:
        shutil.rmtree(folder / "checkpoints" / str(number))
    damage(folder / "checkpoints" / "40")
    for _ in range(2):  # again, as a scheduler would
        assert corpus.call_main(monkeypatch, folder) == 2
        told = capfd.readouterr()
        assert f"no whole checkpoint is left in {folder}/checkpoints" in told.err
        assert f"{folder}/checkpoints/40" in told.err and "Traceback" not in told.err
        assert documents.points_on(told.err)
        assert "starting from random weights" not in told.out
    assert corpus.records(folder) == corpus.records(finished)


def test_a_step_damaged_twice_is_set_aside_twice(tmp_path, monkeypatch, capfd, finished):
    folder = shutil.copytree(finished, tmp_path / "run")
    for name in ("damaged-40", "damaged-400"):
        shutil.copytree(folder / "checkpoints" / "40", folder / "checkpoints" / name)
    flip(folder / "checkpoints" / "40")
    assert corpus.call_main(monkeypatch, folder) == 0
    names = {path.name for path in (folder / "checkpoints").glob("damaged-40*")}
    assert names == {"damaged-40", "damaged-400", "damaged-40-1"}


@pytest.mark.parametrize(
    "option, words",
    [
        ("--model.n-heads=2", ["of another model", "model.n_heads: checkpoint 4, here 2"]),
        ("--model.n-layers=3", ["of another model", "model.n_layers: checkpoint 2, here 3"]),
        ("--train.seed=5", ["another order", "train.seed: checkpoint 1234, here 5"]),
        ("--data.split=80,10,10", ["another order", "data.split: checkpoint 90,5,5, here 80"]),
        ("--train.n-steps=200", ["another order", "epochs (from the length of the run)"]),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_with_the_differences(
    tmp_path, monkeypatch, capfd, finished, option, words
):
    folder = shutil.copytree(finished, tmp_path / "run")
    assert corpus.call_main(monkeypatch, folder, option) == 2
    told = capfd.readouterr().err
    assert told.startswith("gpt3jax: error: ") and "Traceback" not in told
    assert all(word in told for word in words) and documents.points_on(told), told
    assert steps_saved(folder) == [20, 30, 40]


@pytest.mark.parametrize("lengths", [False, True])
def test_a_corpus_that_changed_is_refused(tmp_path, monkeypatch, capfd, finished, lengths):
    folder = shutil.copytree(finished, tmp_path / "run")
    if lengths:
        os.truncate(folder / "corpus.bin", 2)
        corpus.write(folder / "corpus", n_documents=599)
    else:
        tokens = np.fromfile(folder / "corpus.bin", np.uint16)
        np.where(tokens > 0, corpus.VOCAB - tokens, 0).astype(np.uint16).tofile(
            folder / "corpus.bin"
        )
    assert corpus.call_main(monkeypatch, folder) == errors.REFUSED
    told = capfd.readouterr().err
    assert "another order" in told and ("corpus: checkpoint" in told) == lengths
    assert "tokens: checkpoint" in told and "--checkpoint.allow-new-data-order" in told


def test_loading_from_a_run_under_way_leaves_its_save_alone(tmp_path, monkeypatch, finished):
    other = shutil.copytree(finished, tmp_path / "other")
    under_way = other / "checkpoints" / "50.orbax-checkpoint-tmp"
    under_way.mkdir()
    folder = corpus.write_run(tmp_path / "run")
    load = f"--checkpoint.load={other}/checkpoints"
    assert corpus.call_main(monkeypatch, folder, load) == 0
    assert under_way.exists()


def test_a_finished_run_has_nothing_left_to_do(tmp_path, monkeypatch, capfd, finished):
    folder = shutil.copytree(finished, tmp_path / "run")
    assert corpus.call_main(monkeypatch, folder) == 0
    told = capfd.readouterr()
    assert told.out.endswith("nothing left to do: the run ended at step 40\n") and told.err == ""
    assert corpus.records(folder) == corpus.records(finished)
    assert steps_saved(folder) == [20, 30, 40]


def test_starts_that_led_nowhere_are_refused_once(tmp_path, monkeypatch, capfd, finished):
    """Three starts from step 20 failed or were killed; the fourth is refused, the fifth may try."""
    folder = shutil.copytree(finished, tmp_path / "run")
    for number in (30, 40):
        shutil.rmtree(folder / "checkpoints" / str(number))
    account = folder / "logs" / "goodput.json"
    (start,) = json.loads(account.read_text())["starts"]
    assert start["end"] == "complete" and start["step"] == 40
    layout = {"mesh": "data 8", "devices": "8 x cpu", "jax": jax.__version__}
    assert start["layout"] == layout
    nowhere = start | {"first_step": 20, "step": 27, "end": ""}
    account.write_text(json.dumps({"starts": [start, *[nowhere] * 3]}))
    for status, end in ((errors.REFUSED, "refused"), (errors.DONE, "complete")):
        assert corpus.call_main(monkeypatch, folder, "--train.max-fruitless-starts=3") == status
        assert json.loads(account.read_text())["starts"][-1]["end"] == end
        told = capfd.readouterr()
        assert ("3 starts in a row failed after step 20" in told.err) == (status != 0)
        assert documents.points_on(told.err) == (status != 0)
    assert re.search(r"time: .* in 6 starts: .*lost steps", told.out)
    assert corpus.records(folder) == corpus.records(finished)


def test_a_run_killed_in_its_last_evaluation_makes_up_for_it(tmp_path, monkeypatch):
    options = ["--train.n-steps=2", "--train.eval-interval=5", "--train.eval-batches=1"]
    folder = corpus.write_run(tmp_path)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(train, "evaluate", killed)
        corpus.call_main(patched, folder, *options)
    assert corpus.call_main(monkeypatch, folder, *options) == 0
    assert "test_loss" in corpus.records(folder)[-1]


@contextlib.contextmanager
def small_disk(folder, options):
    """Mount a small file system in a folder, where we may."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "failures", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root mounts a small disk")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("room_again", [False, True])
def test_a_full_disk_is_told_at_once_and_costs_no_older_checkpoint(
    tmp_path, monkeypatch, capfd, room_again
):
    """A checkpoint takes about 1 MB. After the first, another file leaves a tenth of that."""
    folder = corpus.write_run(tmp_path / "run")
    with small_disk(folder / "checkpoints", "size=8m"):
        other = folder / "checkpoints" / "other.bin"
        due, poll = train.is_due, storage.Checkpoints.poll

        def due_on_a_full_disk(number, interval):
            if number == 15 and not other.exists():
                other.write_bytes(bytes(shutil.disk_usage(other.parent).free - 100_000))
            if room_again and number == 35:
                other.unlink(missing_ok=True)
            return due(number, interval)

        def patient_poll(store, *, wait=False):
            while store.is_saving():
                time.sleep(0.01)
            return poll(store, wait=wait)

        monkeypatch.setattr(train, "is_due", due_on_a_full_disk)
        monkeypatch.setattr(storage.Checkpoints, "poll", patient_poll)
        tries = ["--checkpoint.max-failed-saves=3", "--checkpoint.retry-pause=0.1"]
        status = corpus.call_main(monkeypatch, folder, *tries)
        told = capfd.readouterr()
        retries = [line for line in told.out.splitlines() if "of 3, again in 0.1 s" in line]
        assert len(retries) == (0 if room_again else 2)
        told_lines = [line for line in told.out.splitlines() if line not in retries]
        lines = [line for line in told_lines if "iteration" in line or "WARN" in line]
        warnings = [i for i, line in enumerate(lines) if "WARNING" in line]
        starts = [lines[i].partition(" in ")[0] for i in warnings]
        assert starts == [f"WARNING: step {n} was not saved" for n in (20, 30)]
        for i, number in zip(warnings, (20, 30), strict=True):
            assert f"iteration{number:9}/" in lines[i - 1], "told before the next step"
            assert "training goes on" in lines[i]
        assert [r["step"] for r in corpus.records(folder)] == list(range(1, 41))
        assert steps_saved(folder) == ([10, 40] if room_again else [10])
        assert status == (0 if room_again else errors.RETRY)
        if not room_again:
            (error,) = told.err.splitlines()
            assert error.startswith(
                "gpt3jax: error: the last checkpoint failed 3 times: step 40 was"
            )


def test_a_disk_too_full_for_a_folder_does_not_hang_the_run(tmp_path):
    """Orbax's threads wait for folders that cannot be made, and its next save raises it again."""
    folder = corpus.write_run(tmp_path / "run")
    with small_disk(folder / "checkpoints", "size=3m,nr_inodes=2"):
        process = corpus.start_main(folder, "--checkpoint.max-failed-saves=2")
        try:
            told, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == errors.RETRY and told.count("WARNING: step") == 1
    (error,) = stderr.splitlines()
    assert error.startswith("gpt3jax: error: 2 saves in a row failed (checkpoint.max_failed_saves)")
    assert "step 20 was not saved" in error


@pytest.mark.parametrize("prefetch", [0, 4])
def test_bad_tokens_in_the_middle_of_a_run_end_it_with_their_place(
    tmp_path, monkeypatch, capfd, finished, prefetch
):
    """Grain reads in threads: the error must come through them, in one line.

    The check at the start, which is patched away, reads a sample of a corpus larger than this.
    """
    monkeypatch.setattr(indexed, "check_tokens", lambda *_: None)
    folder = corpus.write_run(tmp_path)
    corpus.write(folder / "corpus", spoil=358)  # first read in step 15
    assert corpus.call_main(monkeypatch, folder, f"--data.prefetch={prefetch}") == 2
    told = capfd.readouterr()
    (error,) = told.err.splitlines()
    assert error.startswith("gpt3jax: error: corpus")
    assert "bin has token 67 (in the batch from sample 112 on)" in error
    assert "outside of model.vocab_size=64" in error
    assert steps_saved(folder) == [10]
    assert corpus.records(folder) == corpus.records(finished)[:13]


def test_a_loss_that_is_not_finite_ends_the_run_with_its_step(tmp_path, monkeypatch, capfd):
    folder = corpus.write_run(tmp_path)
    rates = ["--optimizer.peak-lr=1e30", "--optimizer.init-lr=1e30"]
    assert corpus.call_main(monkeypatch, folder, *rates) == 2
    (error,) = capfd.readouterr().err.splitlines()
    assert error.startswith("gpt3jax: error: step 2: the gradient is not finite (loss ")
    assert "lower optimizer.peak_lr" in error
    assert [r["step"] for r in corpus.records(folder)] == [1]


def test_float16_counts_skipped_steps_over_a_whole_run(tmp_path, monkeypatch):
    folder = corpus.write_run(tmp_path)
    options = ["--precision.compute-dtype=float16", "--log.interval=2"]
    assert corpus.call_main(monkeypatch, folder, *options, "--train.n-steps=10") == 0
    assert corpus.records(folder)[-1]["skipped_samples"] == 80
    assert corpus.call_main(monkeypatch, folder, *options) == 0
    found = corpus.records(folder)
    assert found[0]["skipped"] == 1 and found[-1]["skipped"] == 0
    n_skipped = sum(r["skipped_in_interval"] for r in found)
    assert found[-1]["skipped_samples"] == 8 * n_skipped and 10 < n_skipped < 35
    assert found[-1]["loss_scale"] == 2.0 ** (32 - n_skipped + 1)  # hysteresis forgives one
    assert found[0]["learning_rate"] == found[1]["learning_rate"] == 0.0  # skipped: none used
    assert all(3 < r["loss"] < 5 for r in found if not r["skipped"])


def test_metrics_are_read_only_after_the_next_step_is_dispatched(tmp_path, monkeypatch):
    """Else the device would wait for Python in every step."""
    folder = corpus.write_run(tmp_path)
    events, dispatched = [], []
    build, device_get = step.build, jax.device_get

    def spying_build(*args):
        program = build(*args)

        def spy(state, batch):
            state, metrics = program.train(state, batch)
            dispatched.append(metrics)
            events.append(("dispatch", len(dispatched)))
            return state, metrics

        return tiny.with_train(program, spy)

    def spying_get(tree):
        numbers = [i + 1 for i, metrics in enumerate(dispatched) if metrics is tree]
        events.extend(("read", number) for number in numbers)
        return device_get(tree)

    monkeypatch.setattr(step, "build", spying_build)
    monkeypatch.setattr(jax, "device_get", spying_get)
    options = ["--train.n-steps=6", "--checkpoint.dir="]
    assert corpus.call_main(monkeypatch, folder, *options) == 0
    order = [("dispatch", 1)]
    for number in range(2, 7):
        order += [("dispatch", number), ("read", number - 1)]
    assert events == [*order, ("read", 6)]


def test_a_profile_of_the_chosen_steps_is_written(tmp_path, monkeypatch):
    folder = corpus.write_run(tmp_path)
    options = ["--train.n-steps=5", "--checkpoint.dir=", "--log.profile-steps", "2", "3"]
    assert corpus.call_main(monkeypatch, folder, *options) == 0
    (profile,) = (folder / "logs").rglob("*.xplane.pb")
    data = jax.profiler.ProfileData.from_file(str(profile))
    events = [event for plane in data.planes for line in plane.lines for event in line.events]
    steps = [dict(event.stats)["step_num"] for event in events if event.name == "train"]
    assert sorted(steps) == [2, 3]


def test_the_memory_after_a_step_is_written_for_pprof(tmp_path, monkeypatch):
    folder = corpus.write_run(tmp_path)
    options = ["--train.n-steps=5", "--checkpoint.dir=", "--log.profile-memory=3"]
    assert corpus.call_main(monkeypatch, folder, *options) == 0
    (file,) = (folder / "logs").glob("*.prof")
    assert file.name == "memory-step-3.prof"
    assert b"buffer" in gzip.decompress(file.read_bytes())


def test_a_run_resumed_within_its_profile_goes_on(tmp_path, monkeypatch, finished):
    folder = shutil.copytree(finished, tmp_path / "run")
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda _: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    options = ["--train.n-steps=43", "--log.profile-steps", "39", "42"]
    assert corpus.call_main(monkeypatch, folder, *options) == 0
    assert calls == ["start", "stop"]


def test_log_files_hold_json_alone_after_a_kill_in_mid_line(tmp_path, monkeypatch, finished):
    folder = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints" / "40")
    file = folder / "logs" / "metrics.jsonl"
    os.truncate(file, file.stat().st_size - 50)
    assert corpus.call_main(monkeypatch, folder) == 0
    assert all(json.loads(line) for line in file.read_text().splitlines())
    assert corpus.records(folder) == corpus.records(finished)


@pytest.mark.parametrize(
    ("n", "kills"),
    [("1", "2"), ("2", "1"), pytest.param("2", "4", marks=pytest.mark.slower)],
)
def test_kills_at_random_moments_change_nothing(repository, n, kills):
    """A few of what benchmarks/faults.py does 200 times."""
    command = [sys.executable, "benchmarks/faults.py", "--kills", kills, "--processes", n]
    told = subprocess.run(
        command, cwd=repository, capture_output=True, text=True, timeout=900,
        env=os.environ | {"PYTHONPATH": str(repository)},
    )  # fmt: skip
    assert told.returncode == 0, told
    assert re.search(r"\d kills: .*; all equal", told.stdout)
