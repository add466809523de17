"""The processes of a node (a machine): in a large run, one of them speaks for the others.

What every process would tell the coordination service or ask of a shared folder, one then does for
its node, so that the first process and the storage meet fewer. It is the one that first takes a
socket of the machine, whose name the processes of a run have from process 0. Linux has such sockets
without a file; elsewhere every process speaks for itself.
"""

import errno
import secrets
import socket
import threading

from gpt3jax.distributed import messages

LARGE = 1024  # processes from which on one speaks for its node
_MOST_BYTES = 1 << 16  # of a text


class Node:
    """The way from the processes of a node to the one that speaks for them."""

    def __init__(self, run: str):
        """Meet the other processes of the node that have the same name of the run."""
        self._address = f"\0gpt3jax-{run}"
        self._texts: list[str] = []
        self._lock = threading.Lock()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            self._socket.bind(self._address)
        except OSError as error:
            self.speaks = error.errno != errno.EADDRINUSE
            """Whether this process speaks for the node."""
        else:
            self.speaks = True
            threading.Thread(target=self._listen, name="node", daemon=True).start()

    def tell(self, text: str) -> bool:
        """Give a text to the process that speaks; return whether it can take it."""
        try:
            self._socket.sendto(text.encode(), socket.MSG_DONTWAIT, self._address)
        except OSError:  # it is gone, or takes nothing out of its socket
            return False
        return True

    def told(self) -> list[str]:
        """Return what the others told this process, which speaks, since the last call."""
        with self._lock:
            texts, self._texts = self._texts, []
        return texts

    def _listen(self) -> None:
        while True:
            text = self._socket.recv(_MOST_BYTES).decode()
            with self._lock:
                self._texts.append(text)


_of_this_process: Node | None = None


def join(timeout: float) -> None:
    """Find the other processes of this node, in a large run; all must call it.

    Raises:
        TransientError: process 0 was silent for `timeout` seconds.
    """
    global _of_this_process  # a process has one node, as it has one service
    if messages.process()[1] >= LARGE:
        run = messages.text_of_first("run", lambda: secrets.token_hex(8), timeout)
        _of_this_process = Node(run)


def node() -> Node | None:
    """Return the node of this process; None in a run that is not large."""
    return _of_this_process


def speaks() -> bool:
    """Return whether this process speaks for its node; in a run that is not large each does."""
    return _of_this_process is None or _of_this_process.speaks
