"""Errors that a user can fix, and the exit statuses of every command."""

# For job scripts, which decide by them: docs/operations.md. Whatever else a process ends with (a
# signal, the abort of JAX's coordination service) is worth a retry as well.
DONE = 0
RETRY = 1
REFUSED = 2  # it would end like this again; also argparse's status for a wrong option
REQUEUE = 75  # stopped by request, and saved: the same command goes on (EX_TEMPFAIL of sysexits.h)


class UserError(ValueError):
    """What a user can cause and mend: `main` prints it without a traceback."""


class TransientError(UserError):
    """One that may be gone at the next start: a store that fails, a process that did not come."""
