"""The five-argument script under real MPIs, and without a launcher: on several nodes, on one."""

import os
import shutil
import signal
import socket
import subprocess
import sys

import pytest

from gpt3jax import errors

import corpus

SCRIPT = corpus.REPOSITORY / "launch" / "train_gpt3_175b_distributed.sh"
MPIRUN = shutil.which("orterun")  # Open MPI's mpirun, whatever else is called so
MPIEXEC = shutil.which("mpiexec.hydra")  # MPICH's


def start(folder, launcher, n_steps, **variables):
    """Start the script as processes of a run of two, each with one emulated device."""
    paths = [folder / "checkpoints", folder / "logs", "", "", folder / "corpus"]
    options = ["--mesh.data=2", "--mesh.cpu-devices=1", f"--train.n-steps={n_steps}"]
    environment = {
        "CONFIG": str(folder / "recipe.py"),
        "PYTHON": sys.executable,
        "PYTHONPATH": str(corpus.REPOSITORY),
        "JAX_COMPILATION_CACHE_DIR": str(corpus.REPOSITORY / ".cache" / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    return subprocess.Popen(
        [*launcher, SCRIPT, *paths, *options], env=os.environ | environment | variables,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def mpirun(n):
    # Open MPI wants to be told that root may, and that there may be fewer cores than processes.
    return [MPIRUN, "--allow-run-as-root", "--oversubscribe", "-n", str(n)]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.slower
@pytest.mark.skipif(not MPIRUN, reason="not installed: orterun (apt: openmpi-bin)")
def test_two_processes_under_mpirun_find_each_other_stop_when_asked_and_go_on(tmp_path):
    folder = corpus.write_run(tmp_path)
    lines_only = {"TERM": "dumb"}  # mpirun gives a terminal, which would have the live view
    first = start(folder, mpirun(2), 2000, **lines_only)
    lines = []
    for line in first.stdout:
        lines.append(line)
        if "iteration" in line:
            first.send_signal(signal.SIGUSR1)  # mpirun passes it on
            break
    out, err = first.communicate(timeout=300)
    told = "".join(lines) + out
    assert "2 process(es), 2 device(s)" in told and "saved" in told, told + err
    assert first.returncode == errors.REQUEUE, err
    (saved,) = [int(name) for name in os.listdir(folder / "checkpoints") if name.isdigit()][-1:]
    # Another length would be another order of samples, so it is stopped again.
    again = start(folder, mpirun(2), 2000, **lines_only)
    for line in again.stdout:
        if "resumed from" in line:
            assert f"at step {saved}," in line
            again.send_signal(signal.SIGTERM)
            break
    again.communicate(timeout=300)
    assert again.returncode != 0


@pytest.mark.skipif(not MPIEXEC, reason="not installed: mpiexec.hydra (apt: mpich)")
def test_mpich_does_not_tell_where_its_first_process_is(tmp_path):
    folder = corpus.write_run(tmp_path)
    arguments = ["-m", "gpt3jax.main", "--config=recipe.py", "--mesh.cpu-devices=8"]
    done = subprocess.run(
        [MPIEXEC, "-n", "2", sys.executable, *arguments], cwd=folder, capture_output=True,
        text=True, env=os.environ | {"PYTHONPATH": str(corpus.REPOSITORY)}, timeout=300,
    )  # fmt: skip
    assert done.returncode == errors.REFUSED
    assert done.stderr.count("PMI_SIZE=2, as MPICH or Intel MPI sets it") == 2, done.stderr
    assert not (folder / "checkpoints").exists()


@pytest.mark.slower
@pytest.mark.skipif(not MPIEXEC, reason="not installed: mpiexec.hydra (apt: mpich)")
def test_two_processes_under_mpich_are_told_the_address_alone(tmp_path):
    folder = corpus.write_run(tmp_path)
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    process = start(folder, [MPIEXEC, "-n", "2"], 4, **where)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "2 process(es), 2 device(s)" in out
    assert "the run is complete: step 4, 32 samples" in out


@pytest.mark.slower
def test_two_processes_without_a_launcher_as_over_ssh(tmp_path):
    folder = corpus.write_run(tmp_path)
    where = {"NUM_NODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    processes = [start(folder, [], 4, NODE_RANK=str(i), **where) for i in range(2)]
    told = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    assert "2 process(es), 2 device(s)" in told[0][0]
    assert "the run is complete: step 4, 32 samples" in told[0][0]


@pytest.mark.slow
def test_a_script_alone_starts_a_process_for_each_gpu_which_all_stop_when_it_is_asked(tmp_path):
    """With emulated devices in place of GPUs."""
    folder = corpus.write_run(tmp_path)
    script = start(folder, [], 2000, GPUS_PER_NODE="2")
    lines = []
    for line in script.stdout:
        lines.append(line)
        if "iteration" in line:
            script.send_signal(signal.SIGTERM)
            break
    out, err = script.communicate(timeout=300)
    told = "".join(lines) + out
    assert "2 process(es), 2 device(s)" in told and "saved" in told, told + err
    assert script.returncode == errors.REQUEUE, err
