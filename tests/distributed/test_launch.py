"""What starts a process for each GPU of a node: their places, signals and one status of all."""

import os
import signal
import subprocess
import sys
import time

import pytest

from gpt3jax import errors
from gpt3jax.config import schema
from gpt3jax.distributed import launch, launchers

import corpus

SECOND_OF_16 = {"NUM_NODES": "16", "NODE_RANK": "1", "MASTER_ADDR": "node0"}
SLURM = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_NODELIST": "node[0-15]"}


@pytest.fixture(autouse=True)
def gpus(tmp_path, monkeypatch):
    """Stand for a machine with 8 GPUs: what nvidia-smi prints."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nfor i in 0 1 2 3 4 5 6 7; do echo GPU-$i; done\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")


def test_each_gpu_of_a_machine_gets_a_process():
    places = launch.processes({"CUDA_VISIBLE_DEVICES": "2,3"})
    assert [place["LOCAL_RANK"] for place in places] == ["0", "1"]
    assert {place["MASTER_ADDR"] for place in places} == {"127.0.0.1"}
    assert len({place["MASTER_PORT"] for place in places}) == 1
    assert len(launch.processes({})) == 8
    assert len(launch.processes({"JAX_PLATFORMS": "cuda,cpu", "GPUS_PER_NODE": "4"})) == 4


def test_processes_of_a_node_join_those_of_the_others_and_take_a_gpu_each():
    places = launch.processes(SECOND_OF_16)
    found = [launchers.arguments(schema.Distributed(), SECOND_OF_16 | place) for place in places]
    assert [one["process_id"] for one in found] == list(range(8, 16))
    assert [one["local_device_ids"] for one in found] == [[i] for i in range(8)]
    assert {one["num_processes"] for one in found} == {128}
    assert {one["coordinator_address"] for one in found} == {"node0:6000"}
    (alone,) = launch.processes(SECOND_OF_16 | {"GPUS_PER_NODE": "1"})
    taken = launchers.arguments(schema.Distributed(), SECOND_OF_16 | alone)
    assert taken["num_processes"] == 16 and taken["local_device_ids"] == []  # all of them


@pytest.mark.parametrize(
    "environ",
    [
        {"CUDA_VISIBLE_DEVICES": ""},
        {"CUDA_VISIBLE_DEVICES": "5"},
        {"JAX_PLATFORMS": "cpu"},
        SLURM,
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "8"},
        {"JOB_COMPLETION_INDEX": "3"},  # which `main` then refuses
    ],
)
def test_a_process_that_is_alone_or_was_started_for_a_gpu_starts_no_others(environ):
    assert launch.processes(environ) == []


def test_a_launcher_may_start_one_on_each_node():
    """In a pod of Kubernetes, or as `srun --ntasks-per-node=1`."""
    per_node = SLURM | SECOND_OF_16 | {"NODE_RANK": "3"}
    for environ in (per_node, SECOND_OF_16 | {"JOB_COMPLETION_INDEX": "1"}):
        places = launch.processes(environ)
        found = [launchers.arguments(schema.Distributed(), environ | place) for place in places]
        first = 8 * int(environ["NODE_RANK"])
        assert [one["process_id"] for one in found] == list(range(first, first + 8))


@pytest.mark.parametrize(
    "environ, words",
    [
        ({"NUM_NODES": "2"}, "NUM_NODES=2, and NODE_RANK is not set: set it to the number of this"),
        ({"NUM_NODES": "2", "NODE_RANK": "0"}, "MASTER_ADDR is not set: set it to the name of"),
        (SECOND_OF_16 | {"NODE_RANK": "16"}, "NODE_RANK=16, but the 16 nodes of NUM_NODES"),
        (SECOND_OF_16 | {"MASTER_PORT": "x"}, "MASTER_PORT=x is not a number"),
        (SLURM | SECOND_OF_16 | {"NUM_NODES": "2"}, "NUM_NODES=2, but SLURM_STEP_NUM_TASKS=16"),
        ({"SLURM_NTASKS": "128"}, "this process was not started by srun and would train alone"),
    ],
)
def test_contradictions_are_refused_in_a_line(environ, words):
    done = start(environ, "print(1)").communicate(timeout=60)
    assert words in done[1] and done[1].count("\n") == 1 and not done[0], done
    with pytest.raises(errors.UserError):
        launch.processes(environ)


def start(environ, code, *starter):
    """Start a module of this code by `launch`, as a child of its own."""
    folder = os.path.dirname(os.environ["PATH"].split(":")[0])
    with open(f"{folder}/command.py", "w") as file:
        file.write(f"import os, signal, sys, time\nrank = int(os.environ.get('RANK', 0))\n{code}\n")
    variables = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{corpus.REPOSITORY}:{folder}"}
    starter = starter or ("-m", "gpt3jax.distributed.launch")
    return subprocess.Popen(
        [sys.executable, *starter, "command", "--an-option"],
        env=variables | environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    "code, status",
    [
        ("sys.exit(sys.argv[1:] != ['--an-option'])", 0),
        ("sys.exit([0, 75, 0][rank])", errors.REQUEUE),
        ("time.sleep(rank); sys.exit([75, 7, 9][rank])", 7),  # the first failure
        ("sys.exit([134, 134, 2][rank])", errors.REFUSED),
        ("os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else 0", 137),
    ],
)
def test_the_processes_end_with_one_status(code, status):
    process = start({"GPUS_PER_NODE": "3"}, code)
    told = process.communicate(timeout=60)
    assert process.returncode == status, told


def test_a_lone_process_takes_the_place_of_this_one():
    """It then has the signals, and its status is its own."""
    process = start({"CUDA_VISIBLE_DEVICES": "0"}, "print(os.getpid()); sys.exit(5)")
    out, _ = process.communicate(timeout=60)
    assert (int(out), process.returncode) == (process.pid, 5)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_every_process_gets_a_signal(number):
    code = f"""
def stop(*_): sys.exit(75)
signal.signal({int(number)}, stop)
print("ready", flush=True)
time.sleep(60)
"""
    process = start({"GPUS_PER_NODE": "3"}, code)
    for _ in range(3):
        assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    told = process.communicate(timeout=60)
    assert process.returncode == errors.REQUEUE, told


def test_processes_that_hang_after_a_failure_are_killed():
    starter = "import sys; from gpt3jax.distributed import launch; launch.GRACE_SECONDS = 0.5\n"
    starter += "sys.exit(launch.main())"
    process = start({"GPUS_PER_NODE": "2"}, "time.sleep(60 * rank); sys.exit(3)", "-c", starter)
    process.communicate(timeout=30)
    assert process.returncode == 3


@pytest.mark.parametrize(
    "variables", [{"GPUS_PER_NODE": "8"}, {"PMIX_RANK": "0", "GPUS_PER_NODE": "8"}]
)
def test_a_process_that_options_tell_its_place_is_started_as_it_is(variables, monkeypatch):
    started = []
    monkeypatch.setattr(launch.os, "execv", lambda _, command: started.append(command))
    monkeypatch.setattr(launch.os, "environ", variables)
    options = ["gpt3jax.main", "--distributed.n_processes=16", "--distributed.process-id", "0"]
    monkeypatch.setattr(launch.sys, "argv", ["launch", *options])
    launch.main()
    assert started == [[sys.executable, "-m", *options]]


def test_gpus_that_nvidia_smi_does_not_count_are_an_error(monkeypatch):
    """In a container without it, say: one process would get all of them."""
    monkeypatch.setattr(launch.nvidia_smi, "query", lambda *_, **__: [])
    monkeypatch.setattr(launch.nvidia_smi, "gpu_file", lambda: "/dev/nvidia0")
    with pytest.raises(errors.UserError, match=r"\(/dev/nvidia0\).*set GPUS_PER_NODE"):
        launch.processes({})
    assert launch.processes({"JAX_PLATFORMS": "cpu"}) == []
    assert len(launch.processes({"GPUS_PER_NODE": "2"})) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells the children")
def test_children_of_a_killed_starter_end():
    code = "print(os.getpid(), flush=True); time.sleep(100)"
    with start({"GPUS_PER_NODE": "2"}, code) as process:
        children = [int(process.stdout.readline()) for _ in range(2)]
        process.kill()
    deadline = time.monotonic() + 20
    while any(map(_runs, children)):
        assert time.monotonic() < deadline, "they run on"
        time.sleep(0.05)


def _runs(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
