"""What all commands share: parsing of options, one-line error messages, exit statuses."""

import contextlib
import os
import pathlib
import select
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import tyro

from gpt3jax import errors
from gpt3jax.config import user_paths, validation

Options = TypeVar("Options")
_NO_READER = 128 + signal.SIGPIPE  # as a shell has it for programs that this signal ends


class Outcome(contextlib.AbstractContextManager["Outcome"]):
    """The exit status of a command that runs inside the `with`.

    The command sets `status`. An error that the user can fix is printed in one line, and sets it
    too; any other error is raised.
    """

    def __init__(self) -> None:
        self.status: int = errors.DONE

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> bool:
        if isinstance(error, RuntimeError):
            error = _device_error(error)
        if not isinstance(error, errors.UserError):
            return False
        sys.stderr.write(f"gpt3jax: error: {error}\n")
        self.status = errors.status_of(type(error))
        return True


def run(action: Callable[[], int | None]) -> int:
    """Run a command and return its exit status; print an error that the user can fix.

    The command ends without a word where the reader of its output is gone, as in `... | head`.
    """
    outcome = Outcome()
    try:
        with outcome:
            try:
                outcome.status = action() or errors.DONE
            except SystemExit:  # after --help
                sys.stdout.flush()
                raise
        sys.stdout.flush()
    except BrokenPipeError:
        if _has_reader():
            raise
        # Python writes out the rest at its end: let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return outcome.status or _NO_READER
    return outcome.status


def _has_reader() -> bool:
    """Return whether somebody can still read what this process prints."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # errors and ends are reported in any case
    return not poll.poll(0)


def parse(kind: Any, module: str, description: str | None) -> Any:
    """Return the options of `python -m gpt3jax.MODULE`: a dataclass `kind`, or a union of them.

    Exits with a message on an unknown or ill-typed option, and on `--help`.

    Raises:
        UserError: a number is out of its range, or a path is not one of this machine.
    """
    with pointing_on("reference/commands.md"):
        options = tyro.cli(kind, prog=f"python -m gpt3jax.{module}", description=description)
    return _checked(options)


def parse_beside_config(
    kind: type[Options], module: str, description: str | None, args: Sequence[str]
) -> tuple[Options, list[str]]:
    """Return the options, as `parse`, and the remaining arguments for `recipe.parse`.

    Raises:
        UserError: a number is out of its range, or a path is not one of this machine.
    """
    with pointing_on("reference/commands.md"):
        options, rest = tyro.cli(
            kind, prog=f"python -m gpt3jax.{module}", description=description, args=args,
            return_unknown_args=True,
        )  # fmt: skip
    return _checked(options), rest


@contextlib.contextmanager
def pointing_on(page: str) -> Iterator[None]:
    """Say where to read on after tyro's message on a wrong option, as a `UserError` does."""
    try:
        yield
    except SystemExit as stop:
        if stop.code:
            sys.stderr.write(f"(see docs/{page})\n")
        raise


def shell_line(module: str, *args: str) -> str:
    """Return a command of the package as the user's shell takes it, to be copied."""
    return shlex.join([python(), "-m", module, *args])


def python() -> str:
    """Return what starts this Python in the user's shell, where no environment may be active."""
    on_path, here = shutil.which("python"), pathlib.Path(sys.executable)
    if on_path and pathlib.Path(on_path).parent == here.parent:
        return "python"
    return os.path.relpath(here) if here.is_relative_to(pathlib.Path.cwd()) else str(here)


def _checked(options: Options) -> Options:
    """Check the ranges of numbers; return the options with their paths expanded."""
    validation.check_ranges(options, "--")
    return user_paths.expanded(options, "--")


def _device_error(error: RuntimeError) -> errors.UserError | None:
    """Return what to report if JAX could not start the GPUs; None for any other error."""
    message = str(error).partition(" (set JAX")[0].rstrip(".")
    if not message.startswith("Unable to initialize backend"):
        return None
    if "list of known backends" in message:  # JAX's CUDA plugin did not load, and printed why
        return errors.UserError(
            f"{message}: CUDA's libraries are missing or do not match JAX (see the lines above); "
            "pip install 'gpt3jax[cuda13]' (cuda12 for drivers before 580; the extra plan has only "
            "the compiler), or set JAX_PLATFORMS=cpu to use the CPU",
            page="launching.md#gpus-or-the-cpu",
        )
    return errors.TransientError(
        f"{message}: see nvidia-smi, or set JAX_PLATFORMS=cpu for the CPU",
        page="launching.md#gpus-or-the-cpu",
    )
