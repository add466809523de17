"""A run holds its folders, so that no second one writes to them: `checkpoint.dir` and `log.dir`.

The first process keeps a file in each, which a thread of filelock's touches now and then. A folder
is free when the file is gone; when its process is dead, where that is known (on the same host); or
when nobody has touched it for `LEASE_SECONDS`, by the clock of the process that waits. So it needs
no locks of the file system, no equal clocks, and nobody to clean up after a kill.
"""

import contextlib
import datetime
import json
import os
import pathlib
import socket
import sys
from typing import Any

import filelock

from gpt3jax import config, distributed, paths

LEASE_SECONDS = 60.0
WAIT_SECONDS = 180.0  # for a process that is about to end, and longer than a dead one's lease
_LOCK, _HOLDER = ".in-use.lock", ".in-use.json"


class Hold(contextlib.AbstractContextManager["Hold"]):
    """The folders of a run, held inside of this context; all processes enter it."""

    def __init__(self, cfg: config.Config) -> None:
        """Nothing is held yet."""
        given = {"checkpoint.dir": cfg.checkpoint.dir, "log.dir": cfg.log.dir}
        self._folders = {name: pathlib.Path(path) for name, path in given.items() if path}
        self._leases: dict[str, filelock.SoftFileLease] = {}
        self._problem = ""

    def __enter__(self) -> "Hold":
        """Take the folders, in the first process; wait for those that another run holds.

        Raises:
            UserError, TransientError: a folder cannot be written, or is still held after
                `WAIT_SECONDS`.
        """
        problem = None
        if distributed.process()[0] == 0:
            try:
                self._take_all()
            except config.UserError as error:
                problem = error
                self._release()
        patience = len(self._folders) * WAIT_SECONDS + LEASE_SECONDS
        distributed.raise_of_first("folders", problem, patience)
        return self

    def __exit__(self, *_: object) -> None:
        self._release()

    def lost(self) -> str:
        """Return which folder another run has taken, "" if none; only the first process knows.

        A process that did not run for `LEASE_SECONDS`, or could not reach the folder, loses it to
        one that waits; what nobody has taken it takes again.
        """
        for name, lease in self._leases.items():
            if not self._problem and (lease.compromise or not lease.is_lock_held_by_us):
                self._take_again(name, lease)
        return self._problem

    def known_lost(self) -> str:
        """Return the same as it was known some seconds ago, without reading a file."""
        if any(lease.compromise for lease in self._leases.values()):
            self.lost()
        return self._problem

    def _take_all(self) -> None:
        for name, folder in self._folders.items():
            paths.check_not_a_step(folder)
            paths.try_writing(name, folder)
            if not any(folder.samefile(self._folders[other]) for other in self._leases):
                self._leases[name] = self._take(name, folder)

    def _take(self, name: str, folder: pathlib.Path) -> filelock.SoftFileLease:
        lease = filelock.SoftFileLease(
            (folder / _LOCK).absolute(),
            lease_duration=LEASE_SECONDS,
            heartbeat_interval=LEASE_SECONDS / 6,
        )
        try:
            with contextlib.suppress(filelock.Timeout):
                lease.acquire(timeout=0)
            if not lease.is_locked:
                held = f"{name}={folder} is held by {_holder(folder, lease)}"
                sys.stdout.write(f"WARNING: {held}: waiting for it up to {WAIT_SECONDS:.0f} s\n")
                sys.stdout.flush()
                lease.acquire(timeout=WAIT_SECONDS, poll_interval=min(1.0, LEASE_SECONDS / 4))
        except filelock.Timeout as error:
            raise config.UserError(
                f"{name}={folder} is held by {_holder(folder, lease)}, and two runs in one folder "
                "would lose one's checkpoints: end one of them, or give this one another folder"
            ) from error
        except OSError as error:
            raise paths.not_writable(name, folder, error) from error
        _tell(folder)
        return lease

    def _take_again(self, name: str, lease: filelock.SoftFileLease) -> None:
        folder = self._folders[name]
        try:
            lease.release()
            lease.acquire(timeout=0)
            _tell(folder)
        except filelock.Timeout:
            self._problem = (
                f"{name}={folder} was taken by {_holder(folder, lease)}, while this process did "
                f"not run or could not reach it for {LEASE_SECONDS:.0f} s; this one ends, and "
                "nothing was saved since"
            )
        except OSError:  # the store fails, which ends no run: look again later
            return

    def _release(self) -> None:
        for name, lease in self._leases.items():
            with contextlib.suppress(OSError):
                if lease.is_lock_held_by_us:
                    (self._folders[name] / _HOLDER).unlink(missing_ok=True)
                lease.release()


def _tell(folder: pathlib.Path) -> None:
    """Write down who holds a folder, as far as filelock's own file does not tell."""
    mine = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "since": datetime.datetime.now().astimezone().isoformat(" ", "seconds"),
    }
    with contextlib.suppress(OSError):
        (folder / _HOLDER).write_text(json.dumps(mine) + "\n")


def _holder(folder: pathlib.Path, lease: filelock.SoftFileLease) -> str:
    """Return who holds a folder, in words."""
    owner, told = lease.owner, dict[str, Any]()
    if owner is None:
        return "a process that has told no name yet"
    with contextlib.suppress(OSError, ValueError):
        told = json.loads((folder / _HOLDER).read_text())
    if told.get("pid") != owner.pid:  # of one before
        return f"process {owner.pid} on {owner.hostname}"
    job = f", Slurm job {told['job']}" if told["job"] else ""
    return f"process {owner.pid} on {told['host']}{job}, since {told['since']}"
