"""A run holds its folders, `checkpoint.dir` and `log.dir`, so that no second run writes to them.

The first process keeps a file in each that says who it is, and a thread counts up in that file. A
folder is free when the file is gone, or when its process is dead, as far as that can be known on
the same host; elsewhere when the count stands still for `LEASE_SECONDS` by the clock of the process
that waits. That needs no locks of the file system, which NFS may lack, no equal clocks, and nobody
who cleans up after a kill. (filelock's SoftFileLease 4.3.1 does the same, but leaves a dead
holder's file where renames cannot exchange two files, as on NFS.)
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
from typing import Any, TypeAlias

from gpt3jax import errors
from gpt3jax.config import schema, user_paths
from gpt3jax.distributed import messages

LEASE_SECONDS = 60.0
WAIT_SECONDS = 180.0  # for a process that is about to end, and longer than a dead one's lease
FILE = ".in-use"
Holder: TypeAlias = dict[str, Any]  # JSON, which another version may have written


class Hold(contextlib.AbstractContextManager["Hold"]):
    """The folders of a run, held inside of this context; all processes enter it."""

    def __init__(self, cfg: schema.Config) -> None:
        """Hold nothing yet."""
        options = {"checkpoint.dir": cfg.checkpoint.dir, "log.dir": cfg.log.dir}
        self._folders = {name: pathlib.Path(path) for name, path in options.items() if path}
        self.locks: list[Lock] = []
        """Of each folder; empty in all processes but the first."""

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
        """Say which folder another run has taken, "" if none; only the first process knows."""
        return next(filter(None, (lock.lost() for lock in self.locks)), "")

    def known_lost(self) -> str:
        """Do the same, but look only if a thread missed a file some seconds ago."""
        return self.lost() if any(lock.missing for lock in self.locks) else ""

    def _take_all(self) -> None:
        for name, folder in self._folders.items():
            user_paths.check_not_a_step(folder)
            user_paths.try_writing(name, folder)
            if not any(folder.samefile(lock.folder) for lock in self.locks):
                lock = Lock(name, folder)
                lock.take()
                self.locks.append(lock)

    def _release(self) -> None:
        for lock in self.locks:
            lock.release()


class Lock:
    """The file by which this process holds a folder."""

    def __init__(self, name: str, folder: pathlib.Path) -> None:
        """Hold nothing yet; `name` is the option's."""
        self.folder = folder
        self.missing = False
        """Whether the file was not ours when the thread looked."""
        self.holder = _this_process() | {"token": secrets.token_hex(8)}
        self._name, self._path = name, (folder / FILE).absolute()
        self._count = 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="folders", daemon=True)

    def take(self) -> None:
        """Make the file, once nobody holds the folder.

        Raises:
            UserError, TransientError: somebody still holds it after `WAIT_SECONDS`, or the file
                cannot be written.
        """
        try:
            begin = since = time.monotonic()
            last_content, warned, pause = b"", False, min(1.0, LEASE_SECONDS / 10)
            others = False  # whether others may be after the same file
            while not self.make_file() or (others and not self._stays(pause)):
                others = True
                content, now = self._read(), time.monotonic()
                if content != last_content:
                    last_content, since = content, now
                if is_free(content, now - since):
                    self.remove_file(content)
                    continue
                held = f"{self._name}={self.folder} is held by {describe(content)}"
                if now - begin > WAIT_SECONDS:
                    raise errors.UserError(
                        f"{held}, and of two runs in a folder one loses its checkpoints: end one "
                        "of them, or give this one another folder",
                        page="operations.md#one-run-in-a-folder",
                    )
                if not warned:
                    sys.stdout.write(f"WARNING: {held}: waiting up to {WAIT_SECONDS:.0f} s\n")
                    sys.stdout.flush()
                    warned = True
                time.sleep(pause)
        except OSError as error:
            raise user_paths.not_writable(self._name, self.folder, error) from error
        self._thread.start()

    def lost(self) -> str:
        """Say who has taken the folder from this process, "" if nobody has.

        A process that did not run for `LEASE_SECONDS`, or could not reach the folder, loses it to
        a process that waits for it. If the file is only gone, it is made again.
        """
        with contextlib.suppress(OSError):  # a store that fails ends no run
            if not self._count_up() and not self.make_file():
                return (
                    f"{self._name}={self.folder} was taken by {describe(self._read())} while this "
                    f"process did not run or could not reach it for {LEASE_SECONDS:.0f} s: this "
                    "one ends, and has saved nothing since"
                )
            self.missing = False
        return ""

    def release(self) -> None:
        """Free the folder for others."""
        self.stop_counting()
        self._thread.join(1.0)  # it may be stuck in a store that does not answer
        with contextlib.suppress(OSError):
            if self._count_up():
                self._path.unlink()

    def stop_counting(self) -> None:
        """End the thread, but leave the file."""
        self._closed.set()

    def _keep(self) -> None:
        while not self._closed.wait(LEASE_SECONDS / 6):
            with contextlib.suppress(OSError):
                self.missing = not self._count_up()

    def make_file(self) -> bool:
        """Make the file if there is none; return whether the one that is there now is ours.

        While it is empty, others may remove it for one that a dead process left empty, and
        one of ours that another had moved aside may have come back.
        """
        with contextlib.suppress(FileExistsError), open(self._path, "xb") as file:
            file.write(self.content())
        return self.holder["token"].encode() in self._read()

    def _stays(self, seconds: float) -> bool:
        """Return whether the file is still ours after a time: others waited for the same one."""
        time.sleep(seconds)
        return self._count_up()

    def _count_up(self) -> bool:
        """Count up in the file; return False if it is not ours."""
        try:
            # The file that was read is written to, even if another takes its place meanwhile.
            with open(self._path, "r+b") as file:
                if self.holder["token"].encode() not in file.read():
                    return False
                self._count += 1
                file.seek(0)
                file.write(self.content())
                file.flush()
                os.fsync(file.fileno())
        except FileNotFoundError:
            return False
        return True

    def content(self) -> bytes:
        """Return what the file says now."""
        return json.dumps(self.holder | {"count": f"{self._count:012d}"}).encode()

    def _read(self) -> bytes:
        with contextlib.suppress(FileNotFoundError):
            return self._path.read_bytes()
        return b""

    def remove_file(self, content: bytes) -> None:
        """Remove a dead holder's file, which has this content; put another one back."""
        aside = self._path.with_name(f"{FILE}.{self.holder['token']}")
        with contextlib.suppress(FileNotFoundError):
            self._path.rename(aside)  # of several processes that try, one succeeds
            if aside.read_bytes() != content:
                aside.rename(self._path)
            aside.unlink(missing_ok=True)


def is_free(content: bytes, seconds: float) -> bool:
    """Return whether a folder is free whose file has had this content for so many seconds."""
    holder, this = _parsed(content), _this_process()
    if not holder.get("system") or holder["system"] != this["system"]:
        return seconds > LEASE_SECONDS
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # alive, and another user's
        return False
    return _started(holder["pid"]) not in (holder["started"], "")


def describe(content: bytes) -> str:
    """Return in words who holds a folder, by the content of its file."""
    holder = _parsed(content)
    if not holder:
        return "a process that has not given its name yet"
    job = f", Slurm job {holder['job']}" if holder["job"] else ""
    return f"process {holder['pid']} on {holder['host']}{job}, since {holder['since']}"


def _parsed(content: bytes) -> Holder:
    try:
        return dict(json.loads(content))
    except ValueError:
        return {}


def _this_process() -> Holder:
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
    """Return when a process began, in ticks since the boot; "" if that is not known.

    A process that was killed, but whose parent has not waited for it yet, is "dead".
    """
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "dead" if fields[0] in "ZX" else fields[19]
