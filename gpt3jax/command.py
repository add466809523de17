"""How every command begins and ends: its options, its exit status, one line on what to mend."""

import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tyro

from gpt3jax import config, paths, validation

Options = TypeVar("Options")

# For job scripts, which decide by them: docs/operations.md. Whatever else a process ends with (a
# signal, the abort of JAX's coordination service) is worth a retry as well.
DONE = 0
RETRY = 1
REFUSED = 2  # it would end like this again; also argparse's status for a wrong option
REQUEUE = 75  # stopped by request, and saved: the same command goes on (EX_TEMPFAIL of sysexits.h)


def run(action: Callable[[], int | None]) -> int:
    """Return the exit status of a command that does this: its own, `DONE`, or an error's."""
    try:
        return action() or DONE
    except (config.UserError, RuntimeError) as raised:
        error = raised if isinstance(raised, config.UserError) else _no_devices(raised)
        if error is None:
            raise
        sys.stderr.write(f"gpt3jax: error: {error}\n")
        return RETRY if isinstance(error, config.TransientError) else REFUSED


def parse(kind: Any, module: str, description: str | None) -> Any:
    """Return the options of `python -m gpt3jax.MODULE`: a dataclass of this kind.

    Exits with a message on an unknown or ill-typed option, and on `--help`.

    Raises:
        UserError: a number is out of its range, or a path cannot be one of this machine.
    """
    return _checked(tyro.cli(kind, prog=f"python -m gpt3jax.{module}", description=description))


def parse_beside_config(
    kind: type[Options], module: str, description: str | None, args: Sequence[str]
) -> tuple[Options, list[str]]:
    """Return the options, as `parse`, and what is left of the arguments for `recipe.parse`.

    Raises:
        UserError: a number is out of its range, or a path cannot be one of this machine.
    """
    options, rest = tyro.cli(
        kind, prog=f"python -m gpt3jax.{module}", description=description, args=args,
        return_unknown_args=True,
    )  # fmt: skip
    return _checked(options), rest


def _checked(options: Options) -> Options:
    """Return options whose numbers are in their ranges, with their paths in full."""
    validation.check_ranges(options, "--")
    return paths.expanded(options, "--")


def _no_devices(error: RuntimeError) -> config.UserError | None:
    """Return what to tell where JAX could not start the GPUs; None for any other error."""
    told = str(error).partition(" (set JAX")[0].rstrip(".")
    if not told.startswith("Unable to initialize backend"):
        return None
    if "list of known backends" in told:  # its plugin did not load, and said so above
        return config.UserError(
            f"{told}: CUDA's libraries are missing or do not fit JAX, as it says above; pip "
            "install 'gpt3jax[cuda13]' (cuda12 for drivers before 580; the extra plan has the "
            "compiler alone), or set JAX_PLATFORMS=cpu to use the CPU"
        )
    return config.TransientError(f"{told}: see nvidia-smi, or set JAX_PLATFORMS=cpu for the CPU")
