"""A lock among processes, held on a file; the operating system frees it when its holder dies.

Several processes of a host want the same corpus or index, and one of them is to make it. The
library `filelock` does not serve: where a file system has no `flock` (Lustre mounted without it),
it warns and uses lock files that a killed process on another host leaves behind for ever.
"""

import contextlib
import fcntl
import pathlib
from collections.abc import Iterator


@contextlib.contextmanager
def held(path: pathlib.Path, *, is_required: bool) -> Iterator[None]:
    """Wait for the lock of a file, which is made if it is absent, and hold it inside the `with`.

    Raises:
        OSError: the file cannot be opened, or (`is_required`) its file system has no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            if is_required:
                raise
        yield
