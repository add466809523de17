"""What each launcher's variables make of a process, without the launchers; see test_mpi.py."""

import inspect

import jax
import pytest
from jax._src import clusters

from gpt3jax import errors
from gpt3jax.config import schema
from gpt3jax.distributed import launchers

ADDRESS = {"MASTER_ADDR": "node0", "MASTER_PORT": "7000"}
# What each sets in the second of four processes, two on each of two nodes.
TOLD = {
    "torchrun or launch/": {
        "RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
    },
    "Open MPI": {
        "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4",
        "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
        "PMIX_RANK": "1", "OMPI_VERSION": "5.0.11",
    },
    "MVAPICH": {
        "MV2_COMM_WORLD_RANK": "1", "MV2_COMM_WORLD_SIZE": "4",
        "MV2_COMM_WORLD_LOCAL_RANK": "1", "MV2_COMM_WORLD_LOCAL_SIZE": "2",
    },
    "LSF's jsrun": {
        "JSM_NAMESPACE_RANK": "1", "JSM_NAMESPACE_SIZE": "4",
        "JSM_NAMESPACE_LOCAL_RANK": "1", "JSM_NAMESPACE_LOCAL_SIZE": "2", "PMIX_RANK": "1",
    },
    "HPE's PALS": {
        "PALS_RANKID": "1", "PMI_SIZE": "4", "PALS_LOCAL_RANKID": "1", "PALS_LOCAL_SIZE": "2",
        "PMI_RANK": "1", "PBS_NODENUM": "0",
    },
    "MPICH or Intel MPI": {
        "PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2",
    },
    "Flux": {"FLUX_TASK_RANK": "1", "FLUX_JOB_SIZE": "4", "FLUX_TASK_LOCAL_ID": "1"},
    "Kubeflow Trainer": {
        "JAX_PROCESS_ID": "1", "JAX_NUM_PROCESSES": "4", "JOB_COMPLETION_INDEX": "1",
    },
    "LeaderWorkerSet": {
        "LWS_WORKER_INDEX": "1", "LWS_GROUP_SIZE": "4", "LWS_LEADER_ADDRESS": "leader.svc",
    },
    "Slurm": {
        "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4",
        "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_NODELIST": "node[0-1]", "SLURM_JOB_ID": "7",
    },
    "PMIx": {"PMIX_RANK": "1"},
    "Kubernetes": {"JOB_COMPLETION_INDEX": "1"},
    "PBS": {"PBS_NODENUM": "1"},
}  # fmt: skip
WITH_ADDRESS = ("Slurm", "LeaderWorkerSet")
WITHOUT_SIZE = ("PMIx", "Kubernetes", "PBS")
BY_JAX = {
    "num_processes": 4,
    "process_id": 1,
    "local_device_ids": [1],
    "cluster_detection_method": "slurm",
}
SBATCH = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7"}
ORTE = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911"}


def arguments(environ, **options):
    return launchers.arguments(schema.Distributed(**options), environ)


def refusal(environ, **options):
    with pytest.raises(errors.UserError) as error:
        arguments(environ, **options)
    return str(error.value)


def test_every_launcher_of_the_table_is_tested():
    assert list(TOLD) == [one.name for one in launchers.LAUNCHERS]


@pytest.mark.parametrize("name", TOLD)
def test_a_process_joins_where_all_is_told(name):
    """Rank and size by the launcher, the number of devices by its own local rank."""
    environ = TOLD[name]
    launcher = next(one for one in launchers.LAUNCHERS if one.name == name)
    options = {} if launcher.size else {"n_processes": 4}
    found = arguments(environ, coordinator_address="node0:7000", **options)
    assert found == {
        "num_processes": 4,
        "process_id": 1,
        "coordinator_address": "node0:7000",
        "local_device_ids": [1] if launcher.local_rank else None,
        "cluster_detection_method": "deactivate",
    }
    if name not in WITH_ADDRESS:
        assert arguments(environ | ADDRESS, **options) == found


@pytest.mark.parametrize(
    "name", [name for name in TOLD if name not in ("Slurm", "LeaderWorkerSet")]
)
def test_no_process_of_several_trains_alone(name):
    told = refusal(TOLD[name])
    launcher = next(one for one in launchers.LAUNCHERS if one.name == name)
    assert f"{launcher.size or launcher.rank}=" in told and f"as {name} sets it" in told
    assert "would train alone" in told and "--distributed.coordinator-address HOST:PORT" in told
    assert ("--distributed.n-processes" in told) == (not launcher.size)


@pytest.mark.parametrize("name", [one.name for one in launchers.LAUNCHERS if one.size])
def test_a_lone_process_is_not_hindered_by_what_a_launcher_left(name):
    launcher = next(one for one in launchers.LAUNCHERS if one.name == name)
    lone = {launcher.rank: "0", launcher.size: "1", launcher.local_rank or "X": "0"}
    assert arguments(lone | ADDRESS) is None
    assert arguments(lone | {"SLURM_NTASKS": "1", "WORLD_SIZE": "1"}) is None
    # Nor are several, that are told by another one.
    assert arguments(TOLD["Slurm"] | lone if name != "Slurm" else TOLD["Slurm"]) == BY_JAX


@pytest.mark.parametrize("name", [one.name for one in launchers.LAUNCHERS if not one.size])
def test_a_first_process_is_alone_where_nothing_tells_of_others(name):
    (variable,) = TOLD[name]
    assert arguments({variable: "0"}) is None
    assert f"unset {variable} if each is a run of its own" in refusal({variable: "3"})
    assert arguments({variable: "3"}, n_processes=1) is None
    of_four = {"n_processes": 4, "coordinator_address": "node0:7000"}
    assert arguments({variable: "0"}, **of_four)["process_id"] == 0
    assert f"{variable}=4, as {name} sets it" in refusal({variable: "4"}, **of_four)


def test_jax_itself_finds_the_first_process_of_slurm_and_of_old_open_mpi():
    assert arguments(TOLD["Slurm"] | ADDRESS) == BY_JAX
    found = arguments(TOLD["Open MPI"] | ORTE)
    assert found == BY_JAX | {"cluster_detection_method": "ompi"}
    hidden = TOLD["Slurm"] | {"CUDA_VISIBLE_DEVICES": "1"}  # --gpus-per-task
    assert arguments(hidden) == BY_JAX | {"local_device_ids": [0]}


@pytest.mark.parametrize("name", [n for n in TOLD if n not in ("Slurm", *WITHOUT_SIZE)])
def test_the_innermost_launcher_decides(name):
    """In a job of Slurm: from its script, and where srun has started a launcher on each node."""
    per_node = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    for outer in (SBATCH, TOLD["Slurm"] | per_node):
        assert arguments(outer | TOLD[name] | ADDRESS)["num_processes"] == 4


@pytest.mark.parametrize("name", ["MPICH or Intel MPI", "torchrun or launch/", "PMIx"])
def test_srun_is_known_beside_variables_that_say_the_same(name):
    """Slurm's plugins set them, and so do many job scripts."""
    assert arguments(TOLD[name] | TOLD["Slurm"] | ADDRESS) == BY_JAX


def test_a_job_script_and_a_shell_of_slurm_are_no_task():
    """As sbatch, salloc, and salloc with an interactive step set it for four tasks (24.05)."""
    interactive = {"SLURM_STEP_NODELIST": "node0", "SLURM_STEP_NUM_TASKS": "1"}
    for environ in (SBATCH, {"SLURM_NTASKS": "4"}, SBATCH | interactive):
        told = refusal(environ)
        assert "SLURM_NTASKS=4, but this process was not started by srun" in told
        given = {"n_processes": 2, "process_id": 1, "coordinator_address": "node0:7000"}
        assert arguments(environ, **given)["process_id"] == 1
    assert "not started by torchrun" in refusal({"WORLD_SIZE": "4"})


def test_one_task_of_slurm_on_each_node_is_refused():
    several = TOLD["Slurm"] | {"SLURM_STEP_NUM_NODES": "4", "SLURM_GPUS_ON_NODE": "8"}
    told = refusal(several)
    assert "one task on each of 4 nodes" in told and "--ntasks-per-node=8" in told


@pytest.mark.parametrize(
    "change, device",
    [
        ({}, [1]),
        ({"MPI_LOCALNRANKS": "1"}, []),
        ({"CUDA_VISIBLE_DEVICES": "3"}, [0]),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, [1]),
        ({"JAX_LOCAL_DEVICE_IDS": "0,1"}, None),
    ],
    ids=["shared", "alone", "hidden", "seen", "given"],
)
def test_a_process_takes_its_own_device_of_a_node_that_it_shares(change, device):
    environ = TOLD["MPICH or Intel MPI"] | ADDRESS | change
    assert arguments(environ)["local_device_ids"] == device


def test_addresses_are_taken_in_order():
    environ = TOLD["LeaderWorkerSet"]
    assert arguments(environ)["coordinator_address"] == "leader.svc:6000"
    environ = TOLD["torchrun or launch/"] | ADDRESS
    assert arguments(environ)["coordinator_address"] == "node0:7000"
    # torchrun listens on its port itself.
    busy = environ | {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert arguments(busy)["coordinator_address"] == "node0:7001"
    environ |= {"JAX_COORDINATOR_ADDRESS": "node1:1"}
    assert arguments(environ)["coordinator_address"] == "node1:1"
    found = arguments(environ, coordinator_address="[fd00::2]:2")
    assert found["coordinator_address"] == "[fd00::2]:2"


@pytest.mark.parametrize(
    "environ, options, words",
    [
        (TOLD["Open MPI"], {"n_processes": 2}, "n_processes=2, but OMPI_COMM_WORLD_SIZE=4"),
        (TOLD["Slurm"], {"n_processes": 3}, "n_processes=3, but SLURM_STEP_NUM_TASKS=4"),
        ({"PMI_RANK": "0", "PMI_SIZE": "1"}, {"n_processes": 2}, "sees no other"),
        ({}, {"n_processes": 2, "process_id": 5}, "distributed.process_id=5, but the 2 processes"),
        ({}, {"n_processes": 2, "process_id": 0}, "and that address is not given"),
        (
            {},
            {"n_processes": 2, "process_id": 0, "coordinator_address": "node0"},
            "node0 is not HOST:PORT",
        ),
        ({}, {"process_id": 0}, "without distributed.n_processes"),
        ({"PMI_RANK": "0", "PMI_SIZE": "two"}, {}, "PMI_SIZE=two is not a number"),
        ({"SLURM_NTASKS": "x"}, {}, "SLURM_NTASKS=x is not a number"),
    ],
)
def test_contradictions_are_named(environ, options, words):
    assert words in refusal(environ, **options)


def test_jax_takes_these_arguments():
    taken = set(inspect.signature(jax.distributed.initialize).parameters)
    assert set(arguments(TOLD["torchrun or launch/"] | ADDRESS)) <= taken


def test_jax_leaves_all_devices_to_a_process_that_is_alone_on_its_node(monkeypatch):
    """Its detection would take one: here Open MPI 4, one process a node."""
    alone = TOLD["Open MPI"] | ORTE | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_VERSION": "4.1"}
    given = arguments(alone)
    for name, value in alone.items():
        monkeypatch.setenv(name, value)
    detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
    place = given["num_processes"], given["process_id"], given["local_device_ids"]
    found = detect(None, *place, given["cluster_detection_method"], 1)
    assert found[0].startswith("10.96.0.1:") and found[1:] == (4, 1, [])
