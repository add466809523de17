"""Files of JSON in log.dir: valid, whole after a crash, and without entries of steps to come.

Numbers have full precision. What JSON lacks are the strings "NaN", "Infinity" and "-Infinity" (as
in protobuf's JSON), which Python's `float` reads.
"""

import contextlib
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from gpt3jax.config import user_paths


def to_json(entry: Mapping[str, object], indent: int | None = None) -> str:
    """Return an entry as JSON."""
    return json.dumps(_valid(dict(entry)), allow_nan=False, indent=indent)


def _valid(value: object) -> object:
    if isinstance(value, dict):
        return {name: _valid(item) for name, item in value.items()}
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def set_aside(path: pathlib.Path, step: int) -> str:
    """Move a file's entries past a step, and unfinished ones, to a file beside it.

    A run that was killed after its last checkpoint wrote them, or another run in this folder.
    Returns a line that says so, "" if there were none.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    later = [line.rstrip(b"\n") + b"\n" for line in lines if _step_of(line) > step]
    if not later:
        return ""
    with open(beside(path), "ab") as file:  # first: cut short, entries are there twice, not nowhere
        file.writelines(later)
    replace_file(path, b"".join(line for line in lines if _step_of(line) <= step).decode())
    return (
        f"{path}: moved {len(later)} entries past step {step} or unfinished to {beside(path).name}"
    )


def has_later(path: pathlib.Path, step: int) -> bool:
    """Return whether a file has whole entries past a step, which `set_aside` would move."""
    return any(step < float(entry.get("step", 0)) for entry in entries(path))


def entries(path: pathlib.Path) -> Iterator[Mapping[str, Any]]:
    """Yield the whole entries of a file; a run may be writing it, or was killed then."""
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):
            if isinstance(entry := json.loads(line), dict):
                yield entry


def beside(path: pathlib.Path) -> pathlib.Path:
    """Return the file to which `set_aside` moves entries."""
    return path.with_suffix(".dropped.jsonl")


def _step_of(entry: bytes) -> float:
    """Return the step of a line of metrics.jsonl; infinity if the line is not whole."""
    try:
        return float(json.loads(entry)["step"]) if entry.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


def replace_file(path: pathlib.Path, text: str) -> None:
    """Write a file so that after a crash it has either the old text or the new one."""
    draft = path.with_name(f"{path.name}.draft")
    with open(draft, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


@contextlib.contextmanager
def user_errors(log_dir: str) -> Iterator[None]:
    """Turn an OSError inside of this context into a UserError that names log.dir."""
    try:
        yield
    except OSError as error:
        raise user_paths.not_writable("log.dir", log_dir, error) from error
