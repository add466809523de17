"""Paths that a user gives: put in full, or refused before anything is made there; read, written.

A field that is a path has the type `config.Path`, in the config as in the options of a command.
"""

import dataclasses
import errno
import json
import os
import pathlib
import re
import tempfile
import typing
from typing import Annotated, Any, TypeVar

from gpt3jax import errors

Options = TypeVar("Options")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_MAY_PASS = (*_NO_ROOM, errno.EIO, errno.ESTALE, errno.ETIMEDOUT)


def expanded(options: Options, prefix: str = "") -> Options:
    """Return options with `~` at the start of each path replaced, as a shell does.

    `prefix` is "--" for the options of a command, "" for a config.

    Raises:
        UserError: a path is an address such as gs://..., or names no user's home.
    """
    assert dataclasses.is_dataclass(options) and not isinstance(options, type)
    hints = typing.get_type_hints(type(options), include_extras=True)
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        name = prefix + (field.name.replace("_", "-") if prefix == "--" else field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = expanded(value, prefix if prefix == "--" else f"{name}.")
        elif _is_path(hints[field.name]):
            several = isinstance(value, tuple)
            changes[field.name] = (
                tuple(full(name, path) for path in value) if several else full(name, value)
            )
    return dataclasses.replace(options, **changes)


def _is_path(hint: Any) -> bool:
    metadata = getattr(hint, "__metadata__", ())
    return PATH in metadata or any(map(_is_path, typing.get_args(hint)))


def full(name: str, path: str) -> str:
    """Return the path of an option, by the option's name, as `expanded` does.

    Raises:
        UserError: as `expanded`.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path):
        raise errors.UserError(
            f"{name}={path} is the address of a store, and gpt3jax reads and writes files: mount "
            "the store (gcsfuse, s3fs) or use a shared file system, and give the path there"
        )
    found = os.path.expanduser(path)
    if found.startswith("~"):
        raise errors.UserError(
            f"{name}={path} names no user of this machine: give the whole path, or ./{path}"
        )
    return found


def check_not_a_step(folder: pathlib.Path) -> None:
    """Check that a folder for checkpoints is not one of them.

    Raises:
        UserError: it is; the folder that it is in is named.
    """
    if any((folder / file).is_file() for file in ("meta/metadata", "state/_METADATA")):
        raise errors.UserError(
            f"{folder} is itself a checkpoint, of one step: give the folder that it is in, "
            f"{folder.absolute().parent}, whose newest one is taken"
        )


def try_writing(name: str, folder: pathlib.Path) -> None:
    """Make a folder if need be, and write and remove a small file in it.

    Raises:
        UserError, TransientError: as `not_writable`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".write-test-") as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise not_writable(name, folder, error) from error


def not_writable(name: str, folder: str | pathlib.Path, error: OSError) -> errors.UserError:
    """Return the error to raise where a folder cannot be written; it says what to do.

    A full disk or a store that fails may be well at the next start: a `TransientError`.
    """
    mend = "make room" if error.errno in _NO_ROOM else "mend the path, its permissions or its mount"
    kind = errors.TransientError if error.errno in _MAY_PASS else errors.UserError
    return kind(f"{name}={folder} cannot be written ({error}): {mend}, or choose another folder")


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        UserError: it cannot be read, or is not an object.
    """
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise errors.UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise errors.UserError(f"{path} is not a JSON object")
    return content


def write(path: str, text: str) -> None:
    """Write the file that an option names.

    Raises:
        UserError: it cannot be written.
    """
    try:
        pathlib.Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise errors.UserError(
            f"{path} cannot be written ({error.strerror}): choose another"
        ) from error


PATH = "a file or a folder"
Path = Annotated[str, PATH]
"""What `paths.expanded` knows paths by."""
