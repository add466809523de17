"""Standard output and error that go on working when nobody reads them any more. Imports no JAX.

A terminal that is lost (an ssh session, a closed pipe) makes every print fail, and that error would
end a run that has something to save.
"""

import errno
import io
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class _Outlet(io.FileIO):
    """A file that drops what is written to it once its reader is gone."""

    def write(self, data: "ReadableBuffer", /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            return memoryview(data).nbytes


def outlive() -> None:
    """Let this process go on when the reader of its output is gone."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        outlet = io.BufferedWriter(_Outlet(stream.fileno(), "w", closefd=False))
        lasting = io.TextIOWrapper(outlet, stream.encoding, stream.errors, line_buffering=True)
        setattr(sys, name, lasting)
