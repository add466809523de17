"""Starts a command once for each GPU of this node, and ends as one process would.

launch/train_gpt3_175b_distributed.sh runs `python -m gpt3jax.distributed.launch MODULE [ARG ...]`.
With one GPU, or as one of several processes that a launcher started, it becomes the command
itself. Otherwise it reads the variables of Megatron's example: NUM_NODES, NODE_RANK, MASTER_ADDR,
MASTER_PORT, and GPUS_PER_NODE for other than all visible GPUs. Imports no JAX.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import Mapping, Sequence

from gpt3jax import errors
from gpt3jax.distributed import launchers
from gpt3jax.hardware import nvidia_smi

GRACE_SECONDS = 90.0
"""How long the other processes have after one failed. They notice within 60 s, say so and end."""
_LOOK_SECONDS = 0.2
_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>
_SIGNALS = (
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
    signal.SIGHUP,
    signal.SIGINT,
)


def main() -> int:
    """Start the command of the command line; return the exit status of all its processes."""
    command = [sys.executable, "-m", *sys.argv[1:]]
    try:
        places = [] if _knows_its_place(command) else processes(os.environ)
    except errors.UserError as error:
        sys.stderr.write(f"gpt3jax: error: {error}\n")
        return errors.REFUSED
    if len(places) > 1:
        return _Children(command, places).wait()
    os.environ.update(*places)
    os.execv(sys.executable, command)


def _knows_its_place(command: Sequence[str]) -> bool:
    """Return whether a command is told by its options which process of a run it is."""
    names = tuple(f"--distributed.{name}" for name in ("n-processes", "process-id"))
    return any(word.replace("_", "-").startswith(names) for word in command)


def processes(environ: Mapping[str, str]) -> list[dict[str, str]]:
    """Return the variables by which each process of this node knows its place: torchrun's.

    None for a process that a launcher started beside others, or that is alone.

    Raises:
        UserError: variables are missing or contradict each other.
    """
    place, n_nodes = launchers.find(environ), launchers.number_in(environ, "NUM_NODES", 1)
    if n_nodes == 1 and place and place.size > 1:
        return []
    if place and place.launcher.size and place.size != n_nodes:
        raise errors.UserError(
            f"NUM_NODES={n_nodes}, but {place.source}: unset NUM_NODES where a launcher starts a "
            "process for each GPU",
            page=launchers.PAGE,
        )
    if n_nodes == 1:
        launchers.check_nothing_ahead(environ)
    n_here = launchers.number_in(environ, "GPUS_PER_NODE", 0) or max(visible_gpus(environ), 1)
    if n_nodes * n_here == 1:
        return []
    node, address = _node(environ, n_nodes)
    return [
        {
            "RANK": str(node * n_here + i),
            "WORLD_SIZE": str(n_nodes * n_here),
            "LOCAL_RANK": str(i),
            "LOCAL_WORLD_SIZE": str(n_here),
            **address,
        }
        for i in range(n_here)
    ]


def visible_gpus(environ: Mapping[str, str]) -> int:
    """Return how many GPUs a run here uses: none where another platform is asked for.

    Raises:
        UserError: there are some, and nvidia-smi does not say how many.
    """
    platforms = environ.get("JAX_PLATFORMS", "")
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
        return 0
    shown = environ.get("CUDA_VISIBLE_DEVICES")
    if shown is None:
        found = len(nvidia_smi.query("uuid", timeout=60))
        if file := "" if found else nvidia_smi.gpu_file():
            raise errors.UserError(
                f"an NVIDIA GPU is visible here ({file}), but nvidia-smi does not answer: set "
                "GPUS_PER_NODE to the number of GPUs",
                page=launchers.PAGE,
            )
        return found
    return len([name for name in shown.split(",") if name.strip() not in ("", "-1", "NoDevFiles")])


def _node(environ: Mapping[str, str], n_nodes: int) -> tuple[int, dict[str, str]]:
    """Return the number of this node, and the variables of the address of process 0."""
    if n_nodes == 1:
        port = launchers.number_in(environ, "MASTER_PORT", 0) or _free_port()
        return 0, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, meaning in (
        ("NODE_RANK", "the number of this node, from 0 on"),
        ("MASTER_ADDR", "the name of node 0"),
    ):
        if not environ.get(name):
            raise errors.UserError(
                f"NUM_NODES={n_nodes}, and {name} is not set: set it to {meaning}",
                page=launchers.PAGE,
            )
    node = launchers.number_in(environ, "NODE_RANK", 0)
    if node >= n_nodes:
        raise errors.UserError(
            f"NODE_RANK={node}, but the {n_nodes} nodes of NUM_NODES are numbered 0 to "
            f"{n_nodes - 1}: correct one of them",
            page=launchers.PAGE,
        )
    port = launchers.number_in(environ, "MASTER_PORT", launchers.PORT)
    return node, {"MASTER_ADDR": environ["MASTER_ADDR"], "MASTER_PORT": str(port)}


def _end_with_parent() -> None:
    """Have this process get SIGTERM when its parent is killed, on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _free_port() -> int:
    """Return a port that is free now, so that two runs on a machine do not take the same one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class _Children:
    """The processes of this node, which get all signals and whose statuses become one."""

    def __init__(self, command: Sequence[str], places: Sequence[Mapping[str, str]]) -> None:
        """Start the command once for each place."""
        self._running: list[subprocess.Popen[bytes]] = []
        self._received: list[int] = []
        for number in _SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, self._pass_on)
        for place in places:
            # In a session of its own, it gets Ctrl-C from here alone, not from the terminal too.
            child = subprocess.Popen(
                command, env={**os.environ, **place}, start_new_session=True,
                preexec_fn=_end_with_parent,
            )  # fmt: skip
            self._running.append(child)
            for received in self._received:
                child.send_signal(received)

    def _pass_on(self, number: int, frame: types.FrameType | None) -> None:
        self._received.append(number)
        for child in self._running:
            child.send_signal(number)

    def wait(self) -> int:
        """Return the status of the node when all have ended; after a failure they must."""
        statuses: list[int] = []  # in the order in which they came
        deadline = float("inf")
        while self._running:
            ended = [child for child in self._running if child.poll() is not None]
            self._running = [child for child in self._running if child not in ended]
            statuses += [_status(child.returncode) for child in ended]
            if deadline == float("inf") and _failed(statuses):
                deadline = time.monotonic() + GRACE_SECONDS
            if time.monotonic() > deadline:
                for child in self._running:
                    child.kill()
            time.sleep(_LOOK_SECONDS)
        return _one_of(statuses)


def _status(returncode: int) -> int:
    return returncode if returncode >= 0 else 128 - returncode  # as a shell says it of a signal


def _failed(statuses: Sequence[int]) -> list[int]:
    return [status for status in statuses if status not in (errors.DONE, errors.REQUEUE)]


def _one_of(statuses: Sequence[int]) -> int:
    """Return one status for all: refused if any was, the first failure, stopped if any was."""
    if errors.REFUSED in statuses:
        return errors.REFUSED
    failed = _failed(statuses)
    return failed[0] if failed else max(statuses)


if __name__ == "__main__":
    sys.exit(main())
