"""Standard output and error that outlive their reader. Imports no JAX.

A terminal that is lost (an ssh session, a closed pipe) makes every print fail, and the error would
end a run that has something to save.
"""

import errno
import io
import sys
from typing import Any


class _Outlet(io.FileIO):
    """A file that takes, and drops, what its lost reader would not."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            return memoryview(data).nbytes


def outlive() -> None:
    """Let this process's output go on where nobody reads it any more."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        outlet = io.BufferedWriter(_Outlet(stream.fileno(), "w", closefd=False))
        lasting = io.TextIOWrapper(outlet, stream.encoding, stream.errors, line_buffering=True)
        setattr(sys, name, lasting)
