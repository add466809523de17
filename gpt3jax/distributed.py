"""Joining the processes of a run, so that none trains alone by mistake."""

import json
import os
import time
from collections.abc import Collection
from typing import Any

import jax
import numpy as np
from jax._src import distributed as _service  # its client is the way to talk without collectives
from jax.experimental import multihost_utils

from gpt3jax import config

# (variable of the launcher that tells the number of processes, variable that tells which one)
_LAUNCHERS = {
    "Slurm": ("SLURM_NTASKS", "SLURM_PROCID"),
    "Open MPI": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
}


def start(distributed: config.Distributed, mesh: config.Mesh) -> None:
    """Choose the devices and join the processes; call it before anything touches a device.

    Raises:
        UserError: more processes are expected than this one can find.
        TransientError: they did not come in time.
    """
    if mesh.cpu_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", mesh.cpu_devices)
    launcher, expected = _expected(distributed)
    if expected == 1:
        return
    timeouts: dict[str, Any] = {
        "initialization_timeout": distributed.start_timeout,
        "heartbeat_timeout_seconds": distributed.heartbeat_timeout,
        "shutdown_timeout_seconds": distributed.heartbeat_timeout,
    }
    try:
        if _is_explicit(distributed):
            where = (distributed.coordinator_address, expected, distributed.process_id)
            jax.distributed.initialize(*where, **timeouts)
        else:
            jax.distributed.initialize(**timeouts)
    except (ValueError, RuntimeError) as error:
        raise config.TransientError(
            f"{expected} processes were expected ({launcher}) and could not be joined: {error}. "
            "Start with srun or mpirun, or give --distributed.n-processes, "
            "--distributed.coordinator-address and --distributed.process-id"
        ) from error
    found = process()[1]  # of the service: asking JAX would start the devices
    if found != expected:
        raise config.UserError(
            f"{expected} processes were expected and {found} found: check the launcher's settings"
        )


def of_first_process(answer: bool) -> bool:
    """Return the first process's answer, on all; for what it alone knows and all must act on."""
    if jax.process_count() == 1:
        return answer
    return bool(multihost_utils.broadcast_one_to_all(np.bool_(answer)))


def on_any_process(answer: bool) -> bool:
    """Tell whether any process answers yes; all must ask."""
    if jax.process_count() == 1:
        return answer
    return bool(np.any(multihost_utils.process_allgather(np.bool_(answer))))


def refuse_together(problem: str) -> None:
    """End all processes if one of them has a problem; all must ask.

    Raises:
        UserError: it says which problem, or that another process does.
    """
    if on_any_process(bool(problem)):
        leave()
        raise config.UserError(problem or "another process ended the run: its output says why")


def process() -> tuple[int, int]:
    """Return (number of this process, how many there are) without touching a device."""
    return _service.global_state.process_id, _service.global_state.num_processes


def publish(name: str, text: str) -> None:
    """Let every process read a text under a name, once; through the service, not the devices."""
    _client().key_value_set(f"gpt3jax/{name}", text)


def receive(name: str, timeout: float) -> str | None:
    """Return the text published under a name; None if there is none after so many seconds."""
    try:
        return _client().blocking_key_value_get(f"gpt3jax/{name}", max(int(1000 * timeout), 1))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" in str(error) or "NOT_FOUND" in str(error):
            return None
        raise config.TransientError(f"the first process cannot be reached: {error}") from error


def gather(
    name: str, text: str, timeout: float, of: Collection[int] | None = None
) -> list[str | None]:
    """Return every process's text in the first one, and nothing in the others.

    None stands for a process that gave none within `timeout` seconds, of all together, or that is
    not in `of`. Unlike a collective it cannot hang, whatever the processes do.
    """
    me, n = process()
    if n == 1:
        return [text]
    if me:
        publish(f"{name}/{me}", text)
        return []
    end = time.monotonic() + timeout
    asked = range(n) if of is None else of
    return [text] + [
        receive(f"{name}/{i}", end - time.monotonic()) if i in asked else None for i in range(1, n)
    ]


def raise_of_first(name: str, error: config.UserError | None, timeout: float) -> None:
    """Raise in all processes the error of the first one, if it has one; once under each name.

    Raises:
        UserError, TransientError: that error, or nothing was heard for `timeout` seconds.
    """
    me, n = process()
    if n > 1 and me == 0:
        told = error and [isinstance(error, config.TransientError), str(error)]
        publish(name, json.dumps(told))
    elif n > 1:
        text = receive(name, timeout)
        if text is None:
            raise config.TransientError(
                f"process {me} heard nothing from process 0 ({name}) for {timeout:.0f} s: look at "
                "its output"
            )
        if told := json.loads(text):
            error = (config.TransientError if told[0] else config.UserError)(told[1])
    if error is not None:
        leave()
        raise error


def post(name: str, text: str) -> None:
    """Publish a text in place of an earlier one."""
    _client().key_value_set(f"gpt3jax/{name}", text, allow_overwrite=True)


def posted(folder: str) -> dict[str, str]:
    """Return the texts published under names that begin with `folder` and a slash, by the rest."""
    prefix = f"gpt3jax/{folder}/"
    found = dict(_client().key_value_dir_get(prefix))
    return {name.removeprefix(prefix): text for name, text in found.items()}


def meet(name: str, timeout: float) -> None:
    """Wait until all processes are here, once under each name.

    Raises:
        TransientError: one did not come within `timeout` seconds.
    """
    if process()[1] == 1:
        return
    try:
        _client().wait_at_barrier(f"gpt3jax/{name}", int(1000 * timeout))
    except jax.errors.JaxRuntimeError as error:
        raise config.TransientError(f"waiting for all processes ({name}): {error}") from error


def leave() -> None:
    """Leave together: a first process that simply ends would abort the others in mid-sentence."""
    if process()[1] == 1:
        return
    try:
        jax.distributed.shutdown()
    except RuntimeError:  # one of them is gone already
        return


def _client() -> Any:
    return _service.global_state.client


def _expected(distributed: config.Distributed) -> tuple[str, int]:
    """Return which launcher started this process, and how many processes there must be."""
    launcher, found = _launcher()
    alone = found == 1 and not distributed.n_processes
    if alone and (distributed.coordinator_address or distributed.process_id >= 0):
        raise config.UserError(
            "distributed.coordinator_address or distributed.process_id is given without "
            "distributed.n_processes, and this process would train alone: give all three"
        )
    expected = distributed.n_processes or found
    if found == 1 and not distributed.n_processes and _count("WORLD_SIZE") > 1:
        raise config.UserError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}, as torchrun sets it, but this process would "
            "train alone: start it with srun or mpirun, or give --distributed.n-processes, "
            "--distributed.coordinator-address and --distributed.process-id"
        )
    if found not in (1, expected):
        raise config.UserError(
            f"distributed.n_processes={expected}, but {launcher} started {found}: make them equal"
        )
    if found == 1 and expected > 1 and not _is_explicit(distributed):
        raise config.UserError(
            f"distributed.n_processes={expected}, but this process sees no other and would train "
            "alone: start it with srun or mpirun, or give --distributed.coordinator-address "
            "HOST:PORT and --distributed.process-id to each process"
        )
    if distributed.process_id >= expected > 1:
        raise config.UserError(
            f"distributed.process_id={distributed.process_id}, but the {expected} processes of "
            f"distributed.n_processes are numbered 0 to {expected - 1}: correct one of them"
        )
    return launcher, expected


def _is_explicit(distributed: config.Distributed) -> bool:
    return bool(distributed.coordinator_address) and distributed.process_id >= 0


def _launcher() -> tuple[str, int]:
    """Return which launcher started this process, and how many it started."""
    n_nodes, n_gpus = _count("SLURM_NNODES"), _count("SLURM_GPUS_ON_NODE")
    if "SLURM_PROCID" in os.environ and n_gpus > 1 and _count("SLURM_NTASKS") == n_nodes > 1:
        raise config.UserError(
            f"srun started one task on each of {n_nodes} nodes, to use one GPU of {n_gpus}: "
            f"start one per GPU, with --ntasks-per-node={n_gpus}"
        )
    for name, (count, rank) in _LAUNCHERS.items():
        if rank in os.environ and _count(count) > 1:
            return name, _count(count)
    if _count("SLURM_NTASKS") > 1:
        raise config.UserError(
            f"SLURM_NTASKS={os.environ['SLURM_NTASKS']}, but this process was not started by srun "
            "and would train alone: start it with srun, or unset SLURM_NTASKS"
        )
    return "no launcher", 1


def _count(variable: str) -> int:
    text = os.environ.get(variable, "1")
    if not text.isdecimal():
        raise config.UserError(f"{variable}={text} is not a number of processes: correct it")
    return int(text)
