"""Joining the processes of a run, so that none trains alone by mistake."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import jax

from gpt3jax import errors
from gpt3jax.config import schema
from gpt3jax.distributed import launchers
from gpt3jax.hardware import devices


def start(distributed: schema.Distributed, mesh: schema.Mesh) -> None:
    """Choose the devices and join the processes; call it before anything touches a device.

    Raises:
        UserError: more processes are expected than this one can find.
        TransientError: they did not come in time.
    """
    devices.choose(mesh.cpu_devices)
    where = launchers.arguments(distributed, os.environ)
    if where is None:
        return
    timeouts: dict[str, Any] = {
        "initialization_timeout": distributed.start_timeout,
        "heartbeat_timeout_seconds": distributed.heartbeat_timeout,
        "shutdown_timeout_seconds": distributed.heartbeat_timeout,
    }
    try:
        with _without_proxies():
            jax.distributed.initialize(**where, **timeouts)
    except (ValueError, RuntimeError) as error:
        raise errors.TransientError(
            f"{where['num_processes']} processes were expected and could not be joined: {error}"
        ) from error


@contextlib.contextmanager
def _without_proxies() -> Iterator[None]:
    """Hide proxies from a client that is made meanwhile: the first process is in the cluster.

    gRPC, which JAX's service speaks, would ask `grpc_proxy`, `https_proxy` or `http_proxy` for it,
    and JAX abort when that does not answer; JAX warns of all others.
    """
    names = [name for name in os.environ if "_proxy" in name.lower()]
    hidden = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(hidden)
