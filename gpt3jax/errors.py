"""Errors that the user can fix, and the exit statuses of every command."""

# Job scripts decide by these statuses whether to start a run again: docs/operations.md. Any other
# status (a signal, the abort of JAX's coordination service) is worth a retry as well.
DONE = 0
RETRY = 1
REFUSED = 2  # a retry would end the same way; argparse uses 2 for a wrong option too
REQUEUE = 75  # stopped on request, after saving: start again to continue (sysexits' EX_TEMPFAIL)


class UserError(ValueError):
    """An error that the user can fix; `main` prints its message without a traceback.

    Its text ends with the `page` that says more: a file in docs/, mostly with a heading, as
    "data.md#from-text". `message` is the text without it, to be used inside of another text.
    """

    def __init__(self, message: str, *, page: str) -> None:
        super().__init__(message)
        self.message = message
        self.page = page

    def __str__(self) -> str:
        return f"{self.message} (see docs/{self.page})"


class TransientError(UserError):
    """An error that a retry may cure: a store that fails, a process that did not join."""


def status_of(kind: type[BaseException]) -> int:
    """Return the exit status of a process that an error of this kind ends."""
    is_final = issubclass(kind, UserError) and not issubclass(kind, TransientError)
    return REFUSED if is_final else RETRY


class TooManyProcesses(Exception):
    """The layouts of a run use the devices of its first processes alone."""

    def __init__(self, n_processes: int) -> None:
        super().__init__(n_processes)
        self.n_processes = n_processes
