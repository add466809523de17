"""How every command ends: its exit status, and one line on what a user can mend."""

import sys
from collections.abc import Callable

from gpt3jax import config

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
    except config.UserError as error:
        sys.stderr.write(f"gpt3jax: error: {error}\n")
        return RETRY if isinstance(error, config.TransientError) else REFUSED
