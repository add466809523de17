"""One run holds a folder: a second one waits, and is refused; a dead one holds nothing."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from gpt3jax import errors, train
from gpt3jax.run import folder_lock

import corpus
import tiny

HOLDING = """
import pathlib, sys, time
from gpt3jax.run import folder_lock
folder_lock.LEASE_SECONDS = float(sys.argv[2])
folder_lock.Lock("checkpoint.dir", pathlib.Path(sys.argv[1])).take()
print("held", flush=True)
time.sleep(100)
"""


@pytest.fixture
def holder(tmp_path):
    """Return a process that holds the folder; it is ended, but may have been killed before."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(tmp_path), "60"],
        stdout=subprocess.PIPE, text=True, env=os.environ | {"SLURM_JOB_ID": "4711"},
    )  # fmt: skip
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def hold(**folders):
    groups = {name.partition("_")[0]: {"dir": str(path)} for name, path in folders.items()}
    return folder_lock.Hold(tiny.make_config(**groups))


def lock_of(folder, **as_if):
    """Return a lock of this process, or as if it were another's."""
    lock = folder_lock.Lock("checkpoint.dir", folder)
    lock.holder |= as_if
    return lock


def wait_no_longer_than(monkeypatch, seconds, lease=60.0):
    monkeypatch.setattr(folder_lock, "WAIT_SECONDS", seconds)
    monkeypatch.setattr(folder_lock, "LEASE_SECONDS", lease)


def test_a_second_run_is_told_who_holds_the_folder(tmp_path, monkeypatch, capfd, holder):
    wait_no_longer_than(monkeypatch, 0.5)
    folder = corpus.write_run(tmp_path / "run")
    for option in (f"--checkpoint.dir={tmp_path}", f"--log.dir={tmp_path}"):
        assert corpus.call_main(monkeypatch, folder, option) == errors.REFUSED
        told = capfd.readouterr()
        (error,) = told.err.splitlines()
        who = f"{option[2:]} is held by process {holder.pid} on {os.uname().nodename}, "
        assert who + "Slurm job 4711, since 20" in error and "another folder" in error
        assert f"WARNING: {who}" in told.out and "waiting up to 0 s" in told.out
    assert list(tmp_path.glob("*/checkpoints/*")) == [], "what it held already is free again"
    assert {path.name for path in tmp_path.iterdir()} == {folder_lock.FILE, "run"}


@pytest.mark.parametrize("reaped", [True, False])
def test_a_killed_process_on_this_host_holds_nothing(tmp_path, holder, reaped):
    holder.send_signal(signal.SIGKILL)
    if reaped:
        holder.wait()
    else:
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    begin = time.monotonic()
    with hold(checkpoint_dir=tmp_path):
        assert time.monotonic() - begin < 2


def test_a_stopped_process_on_this_host_goes_on_holding(tmp_path, monkeypatch, holder):
    wait_no_longer_than(monkeypatch, 1.0, lease=0.2)
    holder.send_signal(signal.SIGSTOP)
    with pytest.raises(errors.UserError, match="is held by"):
        lock_of(tmp_path).take()


def test_a_process_that_got_the_number_of_a_dead_one_holds_nothing(tmp_path):
    lock_of(tmp_path, started="1").make_file()
    lock_of(tmp_path).take()


def test_a_process_elsewhere_holds_as_long_as_it_counts(tmp_path, monkeypatch):
    """Of another host, or another namespace of processes: its number says nothing here."""
    wait_no_longer_than(monkeypatch, 2.0, lease=0.5)
    other, mine = lock_of(tmp_path, system="another", pid=os.getppid()), lock_of(tmp_path)
    other.take()
    with pytest.raises(errors.UserError, match=f"process {os.getppid()} on"):
        mine.take()
    other.stop_counting()  # it is killed, there
    begin = time.monotonic()
    mine.take()
    assert 0.4 < time.monotonic() - begin < 1.5
    assert "was taken by process" in other.lost() and mine.lost() == ""
    other.release()
    assert mine.lost() == "", "who has lost it leaves the file alone"
    mine.release()
    assert list(tmp_path.iterdir()) == []


def test_who_waits_gets_the_folder_when_it_is_free(tmp_path, monkeypatch):
    wait_no_longer_than(monkeypatch, 10.0, lease=0.5)
    first, second = lock_of(tmp_path), lock_of(tmp_path)
    first.take()
    threading.Timer(0.3, first.release).start()
    second.take()
    assert second.lost() == ""
    second.release()


def test_a_file_that_somebody_removed_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "LEASE_SECONDS", 0.3)
    with hold(checkpoint_dir=tmp_path) as held:
        assert held.known_lost() == ""
        (tmp_path / folder_lock.FILE).unlink()
        time.sleep(0.2)
        assert held.locks[0].missing and held.known_lost() == "" and held.lost() == ""
        assert (tmp_path / folder_lock.FILE).exists()


@pytest.mark.parametrize("content", [b"", b'{"pid": 1', None], ids=["empty", "cut", "elsewhere"])
def test_of_many_that_wait_for_a_dead_one_one_gets_the_folder(tmp_path, monkeypatch, content):
    wait_no_longer_than(monkeypatch, 3.0, lease=1.0)  # a loaded machine stalls a holder
    if content is None:
        lock_of(tmp_path, system="another").make_file()
    else:
        (tmp_path / folder_lock.FILE).write_bytes(content)
    locks, refused = [lock_of(tmp_path) for _ in range(8)], []

    def take(lock):
        try:
            lock.take()
        except errors.UserError:
            refused.append(lock)

    threads = [threading.Thread(target=take, args=(lock,)) for lock in locks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [lock for lock in locks if lock not in refused]
    assert winner.lost() == ""
    winner.release()
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_another_took_for_a_dead_ones_while_it_was_empty_is_not_held(tmp_path):
    slow, other = lock_of(tmp_path), lock_of(tmp_path)
    content = slow.content

    def interrupted():
        other.remove_file(b"")
        return content()

    slow.content = interrupted
    assert not slow.make_file() and list(tmp_path.iterdir()) == []
    assert other.make_file() and other.lost() == ""


def test_a_file_that_came_in_the_place_of_a_dead_ones_stays(tmp_path):
    """Another that waited was faster: what is removed is no more what was read."""
    faster, mine = lock_of(tmp_path), lock_of(tmp_path)
    assert faster.make_file()
    mine.remove_file(b"of a dead process")
    assert not mine.make_file() and faster.lost() == ""
    assert [path.name for path in tmp_path.iterdir()] == [folder_lock.FILE]


def test_one_folder_for_both_is_held_once(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    with hold(checkpoint_dir=tmp_path / "there", log_dir=tmp_path / "link") as held:
        assert len(held.locks) == 1
    assert list((tmp_path / "there").iterdir()) == []


def test_a_store_that_fails_loses_no_folder(tmp_path, monkeypatch):
    lock = lock_of(tmp_path)
    lock.take()

    def fails(*_):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fails)
        assert lock.lost() == ""
    assert lock.lost() == "" and json.loads((tmp_path / folder_lock.FILE).read_bytes())
    lock.release()


FOLDERS = {"checkpoint.dir": "checkpoint.dir", "log.dir": "", "a foreign step": "checkpoints"}


@pytest.mark.slow
@pytest.mark.parametrize("taken", FOLDERS)
def test_a_run_that_is_not_alone_in_its_folder_stops_and_saves_nothing(
    tmp_path, monkeypatch, capfd, taken
):
    """After step 2 another run's file is there, as after a long stop, or a step of another run.

    That run writes again and again, so a count that was on its way to the file does not hide it.
    """
    monkeypatch.setattr(folder_lock, "LEASE_SECONDS", 0.06)  # looks every 10 ms
    folder = corpus.write_run(tmp_path)
    other = lock_of(tmp_path, system="another", host="node7", pid=1234, job="99")
    due = train.is_due

    def due_and_taken(number, interval):
        if number >= 2 and taken == "a foreign step":
            (folder / "checkpoints" / "7").mkdir(exist_ok=True)
        elif number >= 2:
            (folder / taken / folder_lock.FILE).write_bytes(other.content())
        return due(number, interval)

    monkeypatch.setattr(train, "is_due", due_and_taken)
    options = ["--train.n-steps=100", "--checkpoint.save-interval=3", "--log.dir=log.dir"]
    options.append(f"--checkpoint.dir={FOLDERS[taken]}")
    status = corpus.call_main(monkeypatch, folder, *options)
    (error,) = capfd.readouterr().err.splitlines()
    assert status == errors.REFUSED
    if taken == "a foreign step":
        assert "checkpoints has a checkpoint of step 7, which this run did not write" in error
    else:
        assert f"{taken}={taken} was taken by process 1234 on node7, Slurm job 99, since" in error
        assert (folder / taken / folder_lock.FILE).read_bytes() == other.content()
    assert not list(folder.glob("*/3")), "nothing is saved"
