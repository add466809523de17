"""Paths that the user gives: expanded or refused before anything is created, read and written.

A field with a path has the type `user_paths.Path`, in the config and in the options of a command.
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
_TRANSIENT = (*_NO_ROOM, errno.EIO, errno.ESTALE, errno.ETIMEDOUT)


def expanded(options: Options, prefix: str = "") -> Options:
    """Return options in which `~` at the start of each path is replaced, as a shell does.

    `prefix` is "--" for the options of a command and "" for a config.

    Raises:
        UserError: a path is an address such as gs://..., or the home of an unknown user.
    """
    assert dataclasses.is_dataclass(options) and not isinstance(options, type)
    hints = typing.get_type_hints(type(options), include_extras=True)
    changes: dict[str, object] = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        name = prefix + (field.name.replace("_", "-") if prefix == "--" else field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = expanded(value, prefix if prefix == "--" else f"{name}.")
        elif is_path(hints[field.name]):
            several = isinstance(value, tuple)
            changes[field.name] = (
                tuple(full(name, path) for path in value) if several else full(name, value)
            )
    return dataclasses.replace(options, **changes)


def is_path(hint: object) -> bool:
    """Return whether a field's type is `Path`, or has `Path` inside."""
    metadata = getattr(hint, "__metadata__", ())
    return _PATH in metadata or any(map(is_path, typing.get_args(hint)))


def full(name: str, path: str) -> str:
    """Return one path with `~` replaced; `name` is its option, for messages.

    Raises:
        UserError: as `expanded`.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path):
        raise errors.UserError(
            f"{name}={path} is the address of a store, but gpt3jax reads and writes files: mount "
            "the store (gcsfuse, s3fs) or use a shared file system, and give the path there",
            page="operations.md#by-symptom",
        )
    expanded_path = os.path.expanduser(path)
    if expanded_path.startswith("~"):
        raise errors.UserError(
            f"{name}={path} names no user of this machine: give the whole path, or ./{path}",
            page="operations.md#by-symptom",
        )
    return expanded_path


def check_not_a_step(folder: pathlib.Path) -> None:
    """Check that a folder for checkpoints is not itself a checkpoint.

    Raises:
        UserError: it is; the message names the parent folder.
    """
    if any((folder / file).is_file() for file in ("meta/metadata", "state/_METADATA")):
        raise errors.UserError(
            f"{folder} is itself a checkpoint, of one step: give the folder that it is in, "
            f"{folder.absolute().parent}, whose newest checkpoint is used",
            page="operations.md#by-symptom",
        )


def try_writing(name: str, folder: pathlib.Path) -> None:
    """Create a folder if it does not exist, and write and remove a small file in it.

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
    """Return the error to raise if a folder cannot be written; it says what to do.

    It is a `TransientError` if a retry may succeed, as on a full disk or a failing store.
    """
    fix = "make room" if error.errno in _NO_ROOM else "check the path, its permissions or its mount"
    kind = errors.TransientError if error.errno in _TRANSIENT else errors.UserError
    return kind(
        f"{name}={folder} cannot be written ({error}): {fix}, or choose another folder",
        page="operations.md#by-symptom",
    )


def read_json(path: pathlib.Path, page: str) -> dict[str, Any]:
    """Return the object in a JSON file; `page` is that of the errors.

    Raises:
        UserError: the file cannot be read, or is not a JSON object.
    """
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise errors.UserError(f"{path} cannot be read: {error}", page=page) from error
    if not isinstance(content, dict):
        raise errors.UserError(f"{path} is not a JSON object", page=page)
    return content


def write(path: str, text: str) -> None:
    """Write a text to the file that an option names.

    Raises:
        UserError: it cannot be written.
    """
    try:
        pathlib.Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise errors.UserError(
            f"{path} cannot be written ({error.strerror}): choose another file",
            page="operations.md#by-symptom",
        ) from error


_PATH = "a file or a folder"
Path = Annotated[str, _PATH]
"""The type of a field that `expanded` treats as a path."""
