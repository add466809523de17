"""How failures that Orbax reports become one line of ours."""

import contextlib
import logging
import pathlib
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import jax

from gpt3jax.checkpoint import metadata

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

_LEFT_OVER = ("Event loop is closed", "error while reading array index")


@contextlib.contextmanager
def named(path: pathlib.Path) -> Iterator[None]:
    """Turn what Orbax raises on unreadable files into one line that names the checkpoint.

    Raises:
        DamagedError: the files cannot be read.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError, PermissionError):
        raise  # says nothing about the files
    except Exception as error:
        raise metadata.DamagedError(
            f"checkpoint {path} cannot be read: {first_line(error)}"
        ) from None


def first_line(error: Exception) -> str:
    """Return the type of an error and the first line of its message."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def is_time_limit(error: Exception) -> bool:
    """Return whether Orbax's time limit of a save ran out: here, or where it waits for others."""
    if isinstance(error, TimeoutError):
        return error.errno is None  # with a number it is the store's
    return isinstance(error, jax.errors.JaxRuntimeError) and "DEADLINE_EXCEEDED" in str(error)


def silence() -> None:
    """Keep Orbax's threads from printing hundreds of lines on a failure that we report in one."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    previous_hook = sys.unraisablehook

    def hook(unraisable: "UnraisableHookArgs") -> None:
        if not any(words in str(unraisable.exc_value) for words in _LEFT_OVER):
            previous_hook(unraisable)

    sys.unraisablehook = hook
