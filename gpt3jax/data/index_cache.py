"""Indices on disk: built once, then memory-mapped by all processes of a host (`data.index_cache`).

A Megatron shuffle cannot be evaluated in part, and for 300B tokens its indices take gigabytes: too
much for each of eight processes of a host. An entry gets its name only when it is complete, so a
killed build leaves nothing that looks like an entry. Processes that want the same entry wait while
one of them builds it.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from gpt3jax import errors
from gpt3jax.data import file_lock

Arrays: TypeAlias = dict[str, np.ndarray]
Key: TypeAlias = dict[str, object]  # of JSON values


def arrays(folder: str, key: Callable[[], Key], build: Callable[[], Arrays]) -> Arrays:
    """Return the arrays that `build` returns, from the folder if it has them.

    Args:
        folder: on a local or a shared disk; "": build the arrays, and keep nothing.
        key: returns all values that decide the arrays.
        build: returns the arrays by name.

    Raises:
        UserError: the folder cannot be written.
    """
    if not folder:
        return build()
    text = json.dumps(key(), sort_keys=True)
    entry = pathlib.Path(folder) / hashlib.sha256(text.encode()).hexdigest()[:32]
    if kept := _read(entry):
        return kept
    try:
        with file_lock.held(entry.with_suffix(".lock"), is_required=False):
            if kept := _read(entry):  # another process built it meanwhile
                return kept
            _write(entry, build(), text)
    except OSError as error:
        raise errors.UserError(
            f"data.index_cache={folder}: {error}", page="data.md#which-corpora-a-run-reads"
        ) from error
    kept = _read(entry)
    assert kept, entry
    return kept


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
        with contextlib.suppress(
            OSError
        ):  # another host, on a shared disk without locks, was first
            partial.rename(entry)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
