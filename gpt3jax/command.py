"""How every command ends: what a user can mend is one line, and exit status 2."""

import sys
from collections.abc import Callable

from gpt3jax import config


def run(action: Callable[[], int | None]) -> int:
    """Return the exit status of a command that does this: its own or 0, or 2 after a UserError."""
    try:
        return action() or 0
    except config.UserError as error:
        sys.stderr.write(f"gpt3jax: error: {error}\n")
        return 2
