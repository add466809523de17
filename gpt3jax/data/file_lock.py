"""A lock among processes, held on a file; the operating system frees it when its holder dies.

Several processes of a host may want the same corpus or index; one of them makes it. The library
`filelock` does not serve. Where a file system has no `flock` (Lustre mounted without it), it uses
lock files, and one that a killed process on another host left is never freed. Where `flock` fails
in another way (NFS without its lock service), it raises, though the index cache can do without.
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
