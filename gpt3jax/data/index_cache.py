"""Indices on disk: built once, then memory-mapped by all processes of a host (`data.index_cache`).

A Megatron shuffle cannot be evaluated in part, and for 300B tokens its indices take gigabytes: too
much for each of eight processes a host. An entry appears under its name only when whole, so a
killed build leaves nothing that looks like one; processes that want the same wait for one to build.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from gpt3jax import errors

Arrays = dict[str, np.ndarray]


def arrays(folder: str, key: Callable[[], dict[str, Any]], build: Callable[[], Arrays]) -> Arrays:
    """Return the arrays that `build` returns, from the folder if it has them.

    Args:
        folder: on a local or a shared disk; "": build, and keep nothing.
        key: returns all that decides the arrays, as JSON.
        build: returns them by name.

    Raises:
        UserError: the folder cannot be written.
    """
    if not folder:
        return build()
    text = json.dumps(key(), sort_keys=True)
    entry = pathlib.Path(folder) / hashlib.sha256(text.encode()).hexdigest()[:32]
    if found := _read(entry):
        return found
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with _locked(entry.with_suffix(".lock")):
            if found := _read(entry):  # another process built it meanwhile
                return found
            _write(entry, build(), text)
    except OSError as error:
        raise errors.UserError(f"data.index_cache={folder}: {error}") from error
    found = _read(entry)
    assert found, entry
    return found


def _read(entry: pathlib.Path) -> Arrays | None:
    """Map an entry; None if it is absent or damaged."""
    try:
        names = json.loads((entry / "names.json").read_text())
        mapped = {name: np.load(entry / f"{name}.npy", mmap_mode="r") for name in names}
    except (OSError, ValueError, EOFError):
        return None
    return {name: array.view(np.ndarray) for name, array in mapped.items()}


def _write(entry: pathlib.Path, built: Arrays, key: str) -> None:
    partial = entry.with_suffix(f".partial-{os.uname().nodename}-{os.getpid()}")
    try:
        partial.mkdir()
        for name, array in built.items():
            np.save(partial / f"{name}.npy", array)
        (partial / "key.json").write_text(key)
        (partial / "names.json").write_text(json.dumps(list(built)))
        shutil.rmtree(entry, ignore_errors=True)  # a damaged one
        with contextlib.suppress(OSError):  # a host that shares the disk but not the lock was first
            partial.rename(entry)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    """Keep other processes out, where the file system knows locks."""
    with path.open("w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
