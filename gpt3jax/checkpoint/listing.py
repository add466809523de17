"""The content of a folder of checkpoints, read as plain files: no Orbax, no device, no change.

A run may write to the folder meanwhile: files that vanish while they are read are left out.
"""

import contextlib
import dataclasses
import json
import pathlib
import re
from typing import Literal, TypeAlias

from gpt3jax import errors
from gpt3jax.checkpoint import metadata
from gpt3jax.config import user_paths

State: TypeAlias = Literal["whole", "damaged", "unfinished"]

_PATTERNS: dict[State, re.Pattern[str]] = {
    "whole": re.compile(r"(\d+)"),  # Orbax gives this name when all is written
    "damaged": re.compile(r"damaged-(\d+)(-\d+)?"),
    "unfinished": re.compile(r"(\d+)\.orbax-checkpoint-tmp.*"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A checkpoint of a folder, or what is left of one.

    Attributes:
        state: "whole" means that it was written to its end, not that its arrays were read;
            "damaged" that a run has set it aside or that its meta file cannot be read.
        written: seconds since the epoch.
        n_bytes: size of all files.
        meta: None where it cannot be read.
    """

    name: str
    step: int
    state: State
    written: float
    n_bytes: int
    meta: metadata.Meta | None


def entries(folder: str) -> list[Entry]:
    """Return the checkpoints of a folder by step, newest last.

    Raises:
        UserError: the folder is not there, cannot be read, or is one checkpoint.
    """
    user_paths.check_not_a_step(pathlib.Path(folder))
    listed: list[Entry] = []
    try:
        for path in pathlib.Path(folder).iterdir():
            with contextlib.suppress(FileNotFoundError):
                listed += _entry(path)
    except OSError as error:
        raise errors.UserError(
            f"{folder} cannot be read ({error.strerror}): give a checkpoint.dir",
            page="checkpoints.md#looking-into-a-folder",
        ) from error
    return sorted(listed, key=lambda entry: (entry.step, entry.name))


def _entry(path: pathlib.Path) -> list[Entry]:
    for state, pattern in _PATTERNS.items():
        match = pattern.fullmatch(path.name)
        if match and path.is_dir():
            meta = read_meta(path)
            unreadable = state == "whole" and meta is None
            return [
                Entry(
                    name=path.name, step=int(match[1]), meta=meta,
                    state="damaged" if unreadable else state,
                    written=_written(path), n_bytes=n_bytes(path),
                )
            ]  # fmt: skip
    return []


def read_meta(path: pathlib.Path) -> metadata.Meta | None:
    """Return what a checkpoint's meta file says, or None if it is missing, cut or changed."""
    try:
        return metadata.read(path)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def n_bytes(path: pathlib.Path) -> int:
    """Return the size of all files of a folder; files that vanish meanwhile are not counted."""
    total = 0
    for file in path.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += file.stat().st_size if file.is_file() else 0
    return total


def _written(path: pathlib.Path) -> float:
    """Return when Orbax committed it, as its file says, else when its folder last changed."""
    try:
        record = json.loads((path / "_CHECKPOINT_METADATA").read_text())
        return float(record["commit_timestamp_nsecs"] / 1e9)
    except (OSError, ValueError, KeyError, TypeError):
        return path.stat().st_mtime
