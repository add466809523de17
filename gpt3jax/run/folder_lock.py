"""A run holds its folders, so that no second one writes to them: `checkpoint.dir` and `log.dir`.

The first process keeps a file in each that says who it is, and a thread of its own counts up in it.
A folder is free when the file is gone; when its process is dead, where that can be known, on the
same host; elsewhere when the count stands still for `LEASE_SECONDS` by the clock of who waits. That
needs no locks of the file system, which NFS may lack, no equal clocks, and no one to clean up after
a kill. (filelock's SoftFileLease 4.3.1 does the same, but leaves a dead holder's file where renames
cannot exchange two files, as on NFS.)
"""

import contextlib
import datetime
import json
import os
import pathlib
import secrets
import socket
import sys
import threading
import time
from typing import Any

from gpt3jax import errors
from gpt3jax.config import schema, user_paths
from gpt3jax.distributed import messages

LEASE_SECONDS = 60.0
WAIT_SECONDS = 180.0  # for a process that is about to end, and longer than a dead one's lease
FILE = ".in-use"


class Hold(contextlib.AbstractContextManager["Hold"]):
    """The folders of a run, held inside of this context; all processes enter it."""

    def __init__(self, cfg: schema.Config) -> None:
        """Nothing is held yet."""
        given = {"checkpoint.dir": cfg.checkpoint.dir, "log.dir": cfg.log.dir}
        self._folders = {name: pathlib.Path(path) for name, path in given.items() if path}
        self._locks: list[Lock] = []

    def __enter__(self) -> "Hold":
        """Take the folders, in the first process; wait for those that another run holds.

        Raises:
            UserError, TransientError: a folder cannot be written, or is still held after
                `WAIT_SECONDS`.
        """
        problem = None
        try:
            if messages.process()[0] == 0:
                self._take_all()
        except errors.UserError as error:
            problem = error
            self._release()
        patience = len(self._folders) * WAIT_SECONDS + LEASE_SECONDS
        messages.raise_of_first("folders", problem, patience)
        return self

    def __exit__(self, *_: object) -> None:
        self._release()

    def lost(self) -> str:
        """Return which folder another run has taken, "" if none; only the first process knows."""
        return next(filter(None, (lock.lost() for lock in self._locks)), "")

    def known_lost(self) -> str:
        """Return the same as the threads found it some seconds ago, without looking."""
        return self.lost() if any(lock.missing for lock in self._locks) else ""

    def _take_all(self) -> None:
        for name, folder in self._folders.items():
            user_paths.check_not_a_step(folder)
            user_paths.try_writing(name, folder)
            if not any(folder.samefile(lock.folder) for lock in self._locks):
                lock = Lock(name, folder)
                lock.take()
                self._locks.append(lock)

    def _release(self) -> None:
        for lock in self._locks:
            lock.release()


class Lock:
    """The file by which this process holds a folder."""

    def __init__(self, name: str, folder: pathlib.Path) -> None:
        """Nothing is held yet; `name` is the option's."""
        self.folder = folder
        self.missing = False
        """Whether the file was not ours when the thread looked."""
        self._name, self._path = name, (folder / FILE).absolute()
        self._me, self._count = _this_process() | {"token": secrets.token_hex(8)}, 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="folders", daemon=True)

    def take(self) -> None:
        """Make the file, once nobody holds the folder.

        Raises:
            UserError, TransientError: somebody does for `WAIT_SECONDS`, or it cannot be written.
        """
        try:
            begin = since = time.monotonic()
            seen, warned = b"", False
            while not self._make():
                content, now = self._read(), time.monotonic()
                if content != seen:
                    seen, since = content, now
                if is_free(content, now - since):
                    self._remove(content)
                    continue
                held = f"{self._name}={self.folder} is held by {told(content)}"
                if now - begin > WAIT_SECONDS:
                    raise errors.UserError(
                        f"{held}, and of two runs in a folder one loses its checkpoints: end one "
                        "of them, or give this one another folder"
                    )
                if not warned:
                    sys.stdout.write(f"WARNING: {held}: waiting up to {WAIT_SECONDS:.0f} s\n")
                    sys.stdout.flush()
                    warned = True
                time.sleep(min(1.0, LEASE_SECONDS / 10))
        except OSError as error:
            raise user_paths.not_writable(self._name, self.folder, error) from error
        self._thread.start()

    def lost(self) -> str:
        """Return who has taken the folder from this process, "" if nobody has.

        A process that did not run for `LEASE_SECONDS`, or could not reach the folder, loses it to
        one that waits for it. What nobody has taken is taken again.
        """
        with contextlib.suppress(OSError):  # a store that fails ends no run
            if not self._count_up() and not self._make():
                return (
                    f"{self._name}={self.folder} was taken by {told(self._read())} while this "
                    f"process did not run or could not reach it for {LEASE_SECONDS:.0f} s: this "
                    "one ends, and has saved nothing since"
                )
            self.missing = False
        return ""

    def release(self) -> None:
        """Free the folder for others."""
        self._closed.set()
        self._thread.join(1.0)  # it may be stuck in a store that does not answer
        with contextlib.suppress(OSError):
            if self._count_up():
                self._path.unlink()

    def _keep(self) -> None:
        while not self._closed.wait(LEASE_SECONDS / 6):
            with contextlib.suppress(OSError):
                self.missing = not self._count_up()

    def _make(self) -> bool:
        """Make the file, unless there is one."""
        try:
            with open(self._path, "xb") as file:
                file.write(self._content())
        except FileExistsError:
            return False
        return True

    def _count_up(self) -> bool:
        """Count up in the file, unless it is not ours; then tell so."""
        try:
            # It is written to the file that was read, whatever is put in its place meanwhile.
            with open(self._path, "r+b") as file:
                if self._me["token"].encode() not in file.read():
                    return False
                self._count += 1
                file.seek(0)
                file.write(self._content())
                file.flush()
                os.fsync(file.fileno())
        except FileNotFoundError:
            return False
        return True

    def _content(self) -> bytes:
        return json.dumps(self._me | {"count": f"{self._count:012d}"}).encode()

    def _read(self) -> bytes:
        with contextlib.suppress(FileNotFoundError):
            return self._path.read_bytes()
        return b""

    def _remove(self, content: bytes) -> None:
        """Remove the file of a holder that is gone, and put back another that came in its place."""
        aside = self._path.with_name(f"{FILE}.{self._me['token']}")
        with contextlib.suppress(FileNotFoundError):
            self._path.rename(aside)  # one of several that try it succeeds
            if aside.read_bytes() != content:
                aside.rename(self._path)
            aside.unlink(missing_ok=True)


def is_free(content: bytes, seconds: float) -> bool:
    """Tell whether a folder is free whose file has this content, unchanged for so long."""
    holder, me = _parsed(content), _this_process()
    if not holder.get("system") or holder["system"] != me["system"]:
        return seconds > LEASE_SECONDS
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # alive, and another user's
        return False
    return _started(holder["pid"]) not in (holder["started"], "")


def told(content: bytes) -> str:
    """Return in words who holds a folder."""
    holder = _parsed(content)
    if not holder:
        return "a process that has not told its name yet"
    job = f", Slurm job {holder['job']}" if holder["job"] else ""
    return f"process {holder['pid']} on {holder['host']}{job}, since {holder['since']}"


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        return dict(json.loads(content))
    except ValueError:
        return {}


def _this_process() -> dict[str, Any]:
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        system = f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        system = ""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "system": system,  # where process numbers mean the same: one boot, one namespace of them
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "since": datetime.datetime.now().astimezone().isoformat(" ", "seconds"),
    }


def _started(pid: int) -> str:
    """Return when a process began, in ticks since the boot; "" if that is not told.

    A process that was killed and whose parent has not asked for it yet is "dead".
    """
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "dead" if fields[0] in "ZX" else fields[19]
