"""Requests to stop, by every signal that schedulers and terminals send; output that is lost."""

import os
import pty
import signal
import subprocess
import sys

import jax
import pytest

from gpt3jax import errors
from gpt3jax.run import stopping

import corpus

SHOW_CURSOR, HIDE_CURSOR = b"\x1b[?25h", b"\x1b[?25l"
SIGNALS = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGHUP", "SIGINT")


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_is_a_request_to_stop(name):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with stopping.Stop() as stop:
        assert not stop.requested(1)
        signal.raise_signal(number)
        assert stop.requested(1)
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("name", SIGNALS[1:])
def test_a_process_of_several_asks_all(monkeypatch, name):
    """By SIGTERM, which JAX watches for."""
    sent = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    before = signal.getsignal(signal.SIGTERM)
    with stopping.Stop():
        assert signal.getsignal(signal.SIGTERM) is before
        signal.raise_signal(getattr(signal, name))
    assert sent == [(os.getpid(), signal.SIGTERM)]


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping.Stop() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.requested(1)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_nobody_reads_is_dropped():
    """Both outputs, long and short, and what is left for the end of the process."""
    code = "import sys\nfrom gpt3jax.record import console\nconsole.outlive()\nprint('begun')\n"
    code += "sys.stdin.read()\nprint('x' * 100_000)\nprint('y', file=sys.stderr)\n"
    code += "sys.stdout.write('z')\nsys.exit(75)"
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, stderr=pipe)
    assert process.stdout.readline() == b"begun\n"
    process.stdout.close()
    process.stderr.close()
    process.stdin.close()
    assert process.wait(timeout=60) == 75


def test_a_full_disk_is_still_an_error():
    code = "from gpt3jax.record import console\nconsole.outlive()\nprint('x')"
    with open("/dev/full", "wb") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE)
    assert done.returncode and b"No space left on device" in done.stderr


def test_a_run_ends_as_it_should_where_nobody_reads_why():
    """With the status of its error, not of the print that failed."""
    ours, theirs = os.pipe()
    os.close(ours)
    done = subprocess.run([sys.executable, "-m", "gpt3jax.main"], stdout=theirs, stderr=theirs)
    os.close(theirs)
    assert done.returncode == errors.REFUSED


LOOP = """
import os, sys, time
import jax
from gpt3jax.record import console, live_view
from gpt3jax.run import stopping
jax.config.update("jax_platforms", "cpu")
console.outlive()
with stopping.Stop() as stop:
    view = live_view.LiveView(0, 1000)
    for step in range(1, 1000):
        view.write_line("a line")
        view.advance(step, 4.5, 1e-3)
        if stop.requested(1):
            break
        time.sleep(0.01)
    view.write_line("saved")
    view.close()
sys.stdout.flush()
os._exit(75)
"""


TAKE_TERMINAL = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"


def start_on_a_terminal():
    """Start LOOP; return it, our end of its terminal, and what it showed of its first steps."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", TAKE_TERMINAL + LOOP],
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(corpus.REPOSITORY), "TERM": "xterm"},
    )  # fmt: skip
    os.close(theirs)
    told = b""
    while told.count(b"loss 4.5000") < 3:
        told += os.read(ours, 1 << 16)
    return process, ours, told


def test_a_lost_terminal_stops_and_saves():
    """As when an ssh session breaks: the kernel sends SIGHUP, and every print fails from then."""
    process, ours, _ = start_on_a_terminal()
    os.close(ours)
    assert process.wait(timeout=60) == errors.REQUEUE


def test_ctrl_c_leaves_the_terminal_in_order():
    process, ours, told = start_on_a_terminal()
    os.write(ours, b"\x03")
    while b"saved" not in told or not told.endswith(SHOW_CURSOR):
        told += os.read(ours, 1 << 16)
    assert process.wait(timeout=60) == errors.REQUEUE
    os.close(ours)
    last_line, end = told.split(b"\r\n")[-2:]
    assert b"loss 4.5000" in last_line and end == SHOW_CURSOR
    assert told.count(HIDE_CURSOR) == 1 and told.split(HIDE_CURSOR)[1].startswith(SHOW_CURSOR)
