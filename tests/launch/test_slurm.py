"""launch/slurm.sbatch under a real Slurm: stop at the time limit, restart, give up, refuse."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time

import pytest

import corpus
import slurm_cluster

pytestmark = [
    pytest.mark.slower,
    pytest.mark.skipif(bool(slurm_cluster.missing()), reason=slurm_cluster.missing()),
]
SBATCH = corpus.REPOSITORY / "launch" / "slurm.sbatch"
N_STEPS = 60
# A tiny model's steps could be over before a signal comes: a tenth of a second for each.
PAUSE = """
import sys
import time

if "jax" in sys.modules:
    from gpt3jax.data import loader

    batches = loader.train_batches

    def slowly(*args):
        for batch in batches(*args):
            time.sleep(0.1)
            yield batch

    loader.train_batches = slowly
"""
OPTIONS = [
    "--mesh.data=2",
    "--mesh.cpu-devices=1",
    "--checkpoint.save-interval=20",
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm_cluster.start(tmp_path_factory.mktemp("slurm") / "cluster") as running:
        yield running


def write_run(folder):
    corpus.write_run(folder)
    (folder / "recipe.py").write_text(PAUSE + corpus.RECIPE)
    return folder


def arguments(folder, *options):
    """Return the five paths and the options of a run in a folder."""
    vocab = ["", ""]  # none: the corpus is random numbers
    paths = [folder / "checkpoints", folder / "logs", *vocab, folder / "corpus"]
    return [*map(str, paths), *OPTIONS, *options]


def variables(folder):
    preflight = importlib.util.find_spec("gpt3jax.preflight") is not None
    return {
        "CONFIG": str(folder / "recipe.py"),
        "PYTHON": sys.executable,
        "PYTHONPATH": str(corpus.REPOSITORY),
        "PREFLIGHT": str(int(preflight)),
        "JAX_COMPILATION_CACHE_DIR": str(corpus.REPOSITORY / ".cache" / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }


def submit(cluster, folder, *options, sbatch=(), **environment):
    """Submit the script as a user would, with two tasks and two GPUs in Slurm's books."""
    return cluster.submit(
        "--ntasks-per-node=2",
        "--gpus-per-node=2",
        f"--chdir={corpus.REPOSITORY}",
        f"--output={folder}/job.log",
        "--time=30",
        *sbatch,
        str(SBATCH),
        *arguments(folder, *options),
        **variables(folder) | {"REPOSITORY": str(corpus.REPOSITORY)} | environment,
    )


def log(folder):
    file = folder / "job.log"
    return file.read_text() if file.exists() else ""


def wait_for_step(cluster, folder, job, step):
    """Wait until a job has logged a step."""
    file, deadline = folder / "logs" / "metrics.jsonl", time.monotonic() + 240
    while not (file.exists() and file.read_bytes().count(b"\n") > step):
        assert cluster.job(job)["JobState"] in ("PENDING", "RUNNING", "CONFIGURING"), log(folder)
        assert time.monotonic() < deadline, log(folder)
        time.sleep(0.1)


def processes_of(folder):
    """Return the ids of the training processes of a run."""
    found = subprocess.run(
        ["pgrep", "-f", f"gpt3jax.main.*{folder}/corpus"], capture_output=True, text=True
    )
    return [int(word) for word in found.stdout.split()]


def assert_done(cluster, folder, job, restarts, expected):
    """Check that a job is done after restarts, with an undisturbed run's numbers."""
    ended = cluster.wait_for(job, "COMPLETED", "FAILED", "TIMEOUT", "CANCELLED")
    told = log(folder)
    assert ended["JobState"] == "COMPLETED" and ended["Restarts"] == str(restarts), told
    assert told.count("the run is complete") == 1 and told.count("2 process(es), 2 device(s)") > 0
    assert corpus.records(folder) == corpus.records(expected)
    assert not processes_of(folder) and not list((folder / "checkpoints").glob(".slurm*"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, cluster):
    """Return the folder of a run that nothing happened to, of two processes under srun."""
    folder = write_run(tmp_path_factory.mktemp("undisturbed"))
    script = corpus.REPOSITORY / "launch" / "train_gpt3_175b_distributed.sh"
    command = ["srun", "--ntasks=2", script, *arguments(folder, f"--train.n-steps={N_STEPS}")]
    told = subprocess.run(
        command, env=cluster.environment | variables(folder), capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
    assert "2 process(es), 2 device(s)" in told.stdout
    return folder


def test_a_job_that_is_asked_saves_goes_back_into_the_queue_and_ends_the_same(
    tmp_path, cluster, undisturbed
):
    folder = write_run(tmp_path)
    job = submit(cluster, folder, f"--train.n-steps={N_STEPS}")
    wait_for_step(cluster, folder, job, 10)
    cluster.tell("scancel", "--signal=USR1", "--batch", job)
    assert_done(cluster, folder, job, 1, undisturbed)
    told = log(folder)
    saved = int(re.search(r"stopped at step (\d+), saved", told)[1])
    assert f"stopped at checkpoint {saved}: back into the queue" in told
    assert f"resumed from {folder}/checkpoints at step {saved}," in told


def test_a_killed_process_costs_a_restart(tmp_path, cluster, undisturbed):
    folder = write_run(tmp_path)
    job = submit(cluster, folder, f"--train.n-steps={N_STEPS}")
    wait_for_step(cluster, folder, job, 30)
    os.kill(processes_of(folder)[-1], signal.SIGKILL)
    assert_done(cluster, folder, job, 1, undisturbed)
    assert re.search(r"failed with status \d+ at checkpoint \d+: back into the queue", log(folder))


def test_what_is_refused_is_not_started_again(tmp_path, cluster):
    """One process refuses at once; Slurm kills the other, with a higher status than 2."""
    folder = write_run(tmp_path)
    half = tmp_path / "half.py"
    half.write_text(
        "import os\n\nif os.environ['SLURM_PROCID'] == '1':\n"
        "    raise ValueError('this machine is not like the others')\n" + corpus.RECIPE
    )
    job = submit(cluster, folder, CONFIG=str(half))
    ended = cluster.wait_for(job, "FAILED", "COMPLETED", seconds=120)
    told = log(folder)
    assert ended["ExitCode"] == "2:0" and ended["Restarts"] == "0", told
    assert "this machine is not like the others" in told
    assert "refused (status 2): not started again" in told
    assert not processes_of(folder)


def test_starts_without_a_new_checkpoint_come_to_an_end(tmp_path, cluster):
    folder = write_run(tmp_path)
    recipe = folder / "recipe.py"
    recipe.write_text("import os\nos.abort()\n" + recipe.read_text())
    job = submit(cluster, folder, MAX_FRUITLESS="2")
    ended = cluster.wait_for(job, "FAILED", "COMPLETED", seconds=120)
    told = log(folder)
    assert ended["Restarts"] == "1" and ended["ExitCode"] != "2:0", told
    assert "start 2 in a row without a new one: giving up" in told


def test_a_cancelled_job_stays_cancelled(tmp_path, cluster):
    folder = write_run(tmp_path)
    job = submit(cluster, folder, "--train.n-steps=100000")
    wait_for_step(cluster, folder, job, 10)
    cluster.tell("scancel", job)
    ended = cluster.wait_for(job, "CANCELLED", "COMPLETED", "FAILED")
    time.sleep(5)
    assert cluster.job(job)["JobState"] == ended["JobState"] == "CANCELLED"
    assert not processes_of(folder)


def test_the_time_limit_stops_a_run_in_time(tmp_path, cluster):
    """Slurm looks at limits once in half a minute, and may signal a minute early."""
    folder = write_run(tmp_path)
    limit = ("--time=4", "--signal=B:USR1@60")
    job = submit(cluster, folder, "--train.n-steps=100000", sbatch=limit)
    deadline = time.monotonic() + 300
    while "back into the queue" not in log(folder) and time.monotonic() < deadline:
        time.sleep(0.5)
    told = log(folder)
    saved = int(re.search(r"stopped at step (\d+), saved", told)[1])
    assert f"stopped at checkpoint {saved}: back into the queue" in told
    assert "TIME LIMIT" not in told
    wait_for_restart(cluster, job)
    cluster.tell("scancel", job)


def wait_for_restart(cluster, job):
    assert cluster.wait_for(job, "RUNNING")["Restarts"] == "1"
