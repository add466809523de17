"""Joins the processes of a run, so that none trains alone by mistake."""

import contextlib
import os
import sys
from collections.abc import Iterator

import jax

from gpt3jax import errors
from gpt3jax.config import schema
from gpt3jax.distributed import launchers, messages, node_speaker
from gpt3jax.hardware import devices


def start(distributed: schema.Distributed, mesh: schema.Mesh) -> None:
    """Choose the devices and join the processes; call it before any use of a device.

    Raises:
        UserError: this process cannot find the others that are expected.
        TransientError: they did not join in time, or the first one is silent.
    """
    devices.choose(mesh.cpu_devices)
    arguments = launchers.arguments(distributed, os.environ)
    if arguments is None:
        return
    try:
        with _without_proxies():
            jax.distributed.initialize(
                **arguments,
                initialization_timeout=distributed.start_timeout,
                heartbeat_timeout_seconds=distributed.heartbeat_timeout,
                shutdown_timeout_seconds=distributed.heartbeat_timeout,
            )
    except (ValueError, RuntimeError) as error:
        raise errors.TransientError(
            f"{arguments['num_processes']} processes were expected and could not be joined: "
            f"{error}",
            page="operations.md#by-symptom",
        ) from error
    node_speaker.join(distributed.start_timeout)


def check_all_work(n_devices: int) -> None:
    """Check that each process has one of the first `n_devices` devices; all must call it.

    Raises:
        TooManyProcesses: one has none.
    """
    needed = 1 + max(device.process_index for device in jax.devices()[:n_devices])
    if needed < jax.process_count():
        messages.leave()
        raise errors.TooManyProcesses(needed)


def with_fewer(n_processes: int) -> int:
    """Start this command again as one of fewer processes; in one that is left over return 0.

    JAX cannot leave a process out of a job that it has joined.
    """
    if jax.process_index() >= n_processes:
        sys.stdout.write("this process has nothing to do: its devices idle\n")
        return errors.DONE
    os.environ[launchers.FEWER] = str(n_processes)
    sys.stdout.flush()
    os.execv(sys.executable, sys.orig_argv)


@contextlib.contextmanager
def _without_proxies() -> Iterator[None]:
    """Hide the proxies' variables while JAX creates its client: process 0 is in the cluster.

    gRPC, which JAX's service uses, would connect through `grpc_proxy`, `https_proxy` or
    `http_proxy`, and JAX aborts if that does not answer; it warns of the other variables.
    """
    names = [name for name in os.environ if "_proxy" in name.lower()]
    hidden = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(hidden)
