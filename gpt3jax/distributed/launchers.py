"""Which launcher started this process, how many others with it, and how to join them.

One table has the launchers and the environment variables that they set, so that a process of
several does not train alone by mistake. It only reads; `joining` joins. Imports no JAX.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from gpt3jax import errors
from gpt3jax.config import schema

PAGE = "launching.md#how-processes-find-each-other"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launcher:
    """A launcher and the variables that it sets in each process; "" if it sets none."""

    name: str
    rank: str
    """Number of the process."""
    size: str = ""
    """Number of processes."""
    local_rank: str = ""
    """Number of the process on its node."""
    local_size: str = ""
    """Number of processes on its node."""
    host: str = ""
    """Host of process 0."""
    jax_name: str = ""
    """Name of JAX's own detection, which finds the address of process 0."""
    jax_needs: str = ""
    """The variable that JAX's detection reads."""


# The innermost first: mpirun and torchrun may run inside a process of Slurm.
LAUNCHERS = (
    # `launch` sets these, and so do Kubeflow's PyTorchJob and many scripts.
    Launcher(
        name="torchrun or launch/", rank="RANK", size="WORLD_SIZE",
        local_rank="LOCAL_RANK", local_size="LOCAL_WORLD_SIZE",
    ),
    # Version 5 does not set the last variable.
    Launcher(
        name="Open MPI", rank="OMPI_COMM_WORLD_RANK",
        size="OMPI_COMM_WORLD_SIZE", local_rank="OMPI_COMM_WORLD_LOCAL_RANK",
        local_size="OMPI_COMM_WORLD_LOCAL_SIZE", jax_name="ompi",
        jax_needs="OMPI_MCA_orte_hnp_uri",
    ),
    Launcher(
        name="MVAPICH", rank="MV2_COMM_WORLD_RANK",
        size="MV2_COMM_WORLD_SIZE", local_rank="MV2_COMM_WORLD_LOCAL_RANK",
        local_size="MV2_COMM_WORLD_LOCAL_SIZE",
    ),
    Launcher(
        name="LSF's jsrun", rank="JSM_NAMESPACE_RANK",
        size="JSM_NAMESPACE_SIZE", local_rank="JSM_NAMESPACE_LOCAL_RANK",
        local_size="JSM_NAMESPACE_LOCAL_SIZE",
    ),
    Launcher(
        name="HPE's PALS", rank="PALS_RANKID", size="PMI_SIZE",
        local_rank="PALS_LOCAL_RANKID", local_size="PALS_LOCAL_SIZE",
    ),
    Launcher(
        name="MPICH or Intel MPI", rank="PMI_RANK", size="PMI_SIZE",
        local_rank="MPI_LOCALRANKID", local_size="MPI_LOCALNRANKS",
    ),
    Launcher(
        name="Flux", rank="FLUX_TASK_RANK", size="FLUX_JOB_SIZE",
        local_rank="FLUX_TASK_LOCAL_ID",
    ),
    Launcher(name="Kubeflow Trainer", rank="JAX_PROCESS_ID", size="JAX_NUM_PROCESSES"),
    Launcher(
        name="LeaderWorkerSet", rank="LWS_WORKER_INDEX",
        size="LWS_GROUP_SIZE", host="LWS_LEADER_ADDRESS",
    ),
    # SLURM_NTASKS counts the job's tasks, srun sets the step's; sbatch's script has no step.
    Launcher(
        name="Slurm", rank="SLURM_PROCID", size="SLURM_STEP_NUM_TASKS",
        local_rank="SLURM_LOCALID", local_size="SLURM_STEP_TASKS_PER_NODE",
        jax_name="slurm", jax_needs="SLURM_STEP_NODELIST",
    ),
    # These do not say how many processes there are: more than the number of this one.
    Launcher(name="PMIx", rank="PMIX_RANK"),
    Launcher(name="Kubernetes", rank="JOB_COMPLETION_INDEX"),
    Launcher(name="PBS", rank="PBS_NODENUM"),
)  # fmt: skip
# Sizes that are set before the processes are started, and the command that starts them.
_AHEAD = {"SLURM_NTASKS": "srun", "WORLD_SIZE": "torchrun"}
# Set by a run that goes on with fewer processes than were started (`joining.with_fewer`).
FEWER = "GPT3JAX_N_PROCESSES"
PORT = 6000  # if the environment has a host but no port; Megatron's default


@dataclasses.dataclass(frozen=True)
class Place:
    """What a launcher says about this process."""

    launcher: Launcher
    rank: int
    size: int
    """If the launcher has no variable for it, the least possible number."""
    source: str
    """The variable that says so, and the launcher, for messages."""


def arguments(distributed: schema.Distributed, environ: Mapping[str, str]) -> dict[str, Any] | None:
    """Return the arguments of `jax.distributed.initialize`; None if this process is alone.

    Options take precedence over launchers.

    Raises:
        UserError: there are several processes, and options and environment contradict each other or
            lack the number of processes, the number of this one, or the address of process 0.
    """
    place = find(environ)
    n = _n_processes(distributed, place, environ)
    if n == 1:
        return None
    known: dict[str, Any] = {
        "num_processes": n,
        "process_id": _process_id(distributed, place, n),
        "local_device_ids": _local_devices(place, environ) if place else None,
    }
    address = distributed.coordinator_address
    if place and not address and (method := _jax_detection(place, environ)):
        _check_tasks_per_node(environ)
        return known | {"cluster_detection_method": method}
    address = address or _address(place, environ)
    if not re.search(r".:\d+$", address):
        problem = f"{address} is not HOST:PORT" if address else "that address is not given"
        raise errors.UserError(
            f"{n} processes are expected ({_reason(distributed, place)}), each would train alone "
            f"without the address of process 0, and {problem}: give "
            "--distributed.coordinator-address HOST:PORT (or JAX_COORDINATOR_ADDRESS), its host "
            "and a free port, the same to all",
            page=PAGE,
        )
    # Deactivated: otherwise JAX would take the devices from a launcher.
    return known | {"coordinator_address": address, "cluster_detection_method": "deactivate"}


def _n_processes(
    distributed: schema.Distributed, place: Place | None, environ: Mapping[str, str]
) -> int:
    """Return the number of processes, this one included."""
    n, size = distributed.n_processes, place.size if place else 1
    if FEWER in environ:
        return number_in(environ, FEWER, 1)
    if n and place and place.launcher.size and size != n:
        raise errors.UserError(
            f"distributed.n_processes={n}, but {place.source}: make them equal", page=PAGE
        )
    if n:
        return n
    if size == 1 and (distributed.coordinator_address or distributed.process_id >= 0):
        raise errors.UserError(
            "distributed.coordinator_address or distributed.process_id is given without "
            "distributed.n_processes, and this process would train alone: give all three",
            page=PAGE,
        )
    if size == 1:
        check_nothing_ahead(environ)
    elif place and not place.launcher.size:
        raise errors.UserError(
            f"{place.source}, one process of several, and each would train alone: give "
            "--distributed.n-processes and --distributed.coordinator-address HOST:PORT, the same "
            f"to all, or unset {place.launcher.rank} if each is a run of its own",
            page=PAGE,
        )
    return size


def _process_id(distributed: schema.Distributed, place: Place | None, n: int) -> int:
    """Return the number of this process, from 0 to n - 1."""
    given = distributed.process_id >= 0
    number = distributed.process_id if given else place.rank if place else -1
    if number < 0:
        raise errors.UserError(
            f"distributed.n_processes={n}, but this process sees no other and would train "
            "alone: start it with srun or mpirun, or give --distributed.coordinator-address "
            "HOST:PORT and --distributed.process-id to each process",
            page=PAGE,
        )
    if number >= n:
        source = f"distributed.process_id={number}" if given or not place else place.source
        raise errors.UserError(
            f"{source}, but the {n} processes of distributed.n_processes are numbered 0 to "
            f"{n - 1}: correct one of them",
            page=PAGE,
        )
    return number


def _reason(distributed: schema.Distributed, place: Place | None) -> str:
    """Return why several processes are expected, for a message."""
    n = distributed.n_processes
    return place.source if place and not n else f"distributed.n_processes={n}"


def find(environ: Mapping[str, str]) -> Place | None:
    """Return what the innermost launcher of several processes says.

    If several launchers agree, as Slurm and its PMI do, prefer one that JAX can detect. If none
    started several processes, use one that does not say how many.
    """
    places = [place for launcher in LAUNCHERS if (place := _place(launcher, environ))]
    several = [place for place in places if place.size > 1]
    if not several:
        return places[0] if places else None
    agreeing = [p for p in several if (p.rank, p.size) == (several[0].rank, several[0].size)]
    return next((place for place in agreeing if _jax_detection(place, environ)), several[0])


def _place(launcher: Launcher, environ: Mapping[str, str]) -> Place | None:
    """Return what a launcher says; None if it did not start this process, or started it alone."""
    if not environ.get(launcher.rank):
        return None
    rank, variable = number_in(environ, launcher.rank, 0), launcher.size or launcher.rank
    size = number_in(environ, launcher.size, 1) if launcher.size else rank + 1
    if launcher.size and size == 1:
        return None
    return Place(
        launcher, rank, size, f"{variable}={environ[variable]}, as {launcher.name} sets it"
    )


def check_nothing_ahead(environ: Mapping[str, str]) -> None:
    """Check that this process does not run in place of the command that starts the processes."""
    for size, command in _AHEAD.items():
        if number_in(environ, size, 1) > 1:
            raise errors.UserError(
                f"{size}={environ[size]}, but this process was not started by {command} and would "
                f"train alone: start it with {command}, or give --distributed.n-processes, "
                "--distributed.process-id and --distributed.coordinator-address, or unset "
                f"{size}",
                page=PAGE,
            )


def _jax_detection(place: Place, environ: Mapping[str, str]) -> str:
    """Return the name of the detection in JAX that finds the address; "" if there is none."""
    return place.launcher.jax_name if place.launcher.jax_needs in environ else ""


def _address(place: Place | None, environ: Mapping[str, str]) -> str:
    """Return host:port of process 0; "" if the environment does not have it.

    It is JAX_COORDINATOR_ADDRESS, the launcher's own variable, or MASTER_ADDR and MASTER_PORT,
    which torchrun and many scripts set.
    """
    if given := environ.get("JAX_COORDINATOR_ADDRESS"):
        return given
    host = environ.get(place.launcher.host if place and place.launcher.host else "MASTER_ADDR")
    if not host:
        return ""
    in_use = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun listens on its port
    return f"{host}:{number_in(environ, 'MASTER_PORT', PORT) + in_use}"


def _local_devices(place: Place, environ: Mapping[str, str]) -> list[int] | None:
    """Return the number of this process's device among those that it sees.

    A process that shares its node uses one device: the only visible one if its launcher hides the
    others. None leaves the choice to JAX; [] means all devices, even if JAX detects a launcher.
    """
    launcher = place.launcher
    if not environ.get(launcher.local_rank) or "JAX_LOCAL_DEVICE_IDS" in environ:  # JAX reads it
        return None
    per_node = environ.get(launcher.local_size, "")  # Slurm's is like 8(x2)
    if re.fullmatch(r"1(\(x\d+\))?", per_node):
        return []
    sees_one = re.fullmatch(r"[^,]+", environ.get("CUDA_VISIBLE_DEVICES", ""))
    return [0 if sees_one else number_in(environ, launcher.local_rank, 0)]


def _check_tasks_per_node(environ: Mapping[str, str]) -> None:
    """Check that Slurm did not start one task, which uses one GPU, on a node with several GPUs."""
    n_tasks, n_nodes, n_gpus = (
        number_in(environ, f"SLURM_{name}", 1)
        for name in ("STEP_NUM_TASKS", "STEP_NUM_NODES", "GPUS_ON_NODE")
    )
    if n_gpus > 1 and n_tasks == n_nodes > 1:
        raise errors.UserError(
            f"srun started one task on each of {n_nodes} nodes, to use one GPU of {n_gpus}: "
            f"start one per GPU, with --ntasks-per-node={n_gpus}",
            page=PAGE,
        )


def number_in(environ: Mapping[str, str], variable: str, default: int) -> int:
    """Return the number in a variable; the default where it is not set or empty."""
    text = environ.get(variable) or str(default)
    if not text.isdecimal():
        raise errors.UserError(f"{variable}={text} is not a number: correct it", page=PAGE)
    return int(text)
