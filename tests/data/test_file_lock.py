"""The lock among processes: it excludes, a killed holder frees it, and it may be dispensable."""

import fcntl
import signal
import subprocess
import sys
import time

import pytest

from gpt3jax.data import file_lock

HOLD = """
import pathlib, sys, time
from gpt3jax.data import file_lock
with file_lock.held(pathlib.Path(sys.argv[1]), is_required=True):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_lock_is_free_once_its_holder_is_killed(tmp_path):
    path = tmp_path / "new" / "lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    with path.open("w") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    waiter = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE)
    time.sleep(0.2)
    assert waiter.poll() is None
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert waiter.stdout.readline() == b"held\n"
    waiter.kill()
    waiter.communicate()


def test_a_file_system_without_locks_matters_only_where_a_lock_is_required(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError("no locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    entered = []
    with file_lock.held(tmp_path / "lock", is_required=False):
        entered.append("not required")
    with pytest.raises(OSError, match="no locks"), file_lock.held(tmp_path / "x", is_required=True):
        entered.append("required")
    assert entered == ["not required"]
