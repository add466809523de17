"""What launch/slurm.sbatch makes of exit statuses, with a stand-in for srun; see test_slurm.py."""

import os
import subprocess

import pytest

import corpus

SBATCH = corpus.REPOSITORY / "launch" / "slurm.sbatch"

# Runs a command once for each of two tasks and ends as srun does: with the highest status.
SRUN = """#!/bin/bash
options=()
while [[ $1 == --* ]]; do options+=("$1"); shift; done
echo "${options[@]}" >> "$TOLD/srun"
highest=0
for SLURM_PROCID in 0 1; do
  export SLURM_PROCID
  "$@" || { status=$?; [ "$status" -le "$highest" ] || highest=$status; }
done
exit "$highest"
"""
# Stands for the training script; it saves a checkpoint where SAVES names one.
TRAIN = """#!/bin/bash
echo "$COMMAND $*" >> "$TOLD/processes"
[ "$COMMAND" = main ] || exit "$PREFLIGHT_STATUS"
[ -z "$SAVES" ] || mkdir -p "$1/$SAVES"
statuses=($STATUS_OF_EACH)
exit "${statuses[$SLURM_PROCID]}"
"""
FIVE = ["logs", "vocab.json", "merges.txt", "corpus"]


@pytest.fixture
def job(tmp_path):
    """Return a function that runs the script as one start of a job."""
    tools, repository = tmp_path / "bin", tmp_path / "repository"
    (repository / "launch").mkdir(parents=True)
    tools.mkdir()
    scripts = {
        tools / "srun": SRUN,
        repository / "launch" / "train_gpt3_175b_distributed.sh": TRAIN,
    }
    scripts |= {tools / "sleep": "#!/bin/sh\n", tools / "scancel": "#!/bin/sh\n"}
    scripts[tools / "scontrol"] = '#!/bin/sh\necho "$*" >> "$TOLD/scontrol"\n'
    for file, text in scripts.items():
        file.write_text(text)
        file.chmod(0o755)

    def start(statuses, saves="", preflight=0, **variables):
        environment = {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "TOLD": str(tmp_path),
            "STATUS_OF_EACH": " ".join(map(str, statuses)),
            "SAVES": saves,
            "PREFLIGHT_STATUS": str(preflight),
            "SLURM_JOB_ID": "7",
            "SLURM_NTASKS": "2",
            "SLURM_JOB_NODELIST": "node[0-1]",
            "SLURM_SUBMIT_DIR": str(repository),
        }
        return subprocess.run(
            [SBATCH, tmp_path / "checkpoints", *FIVE], env=environment | variables,
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    return start


def told(tmp_path, name):
    file = tmp_path / name
    return file.read_text().splitlines() if file.exists() else []


@pytest.mark.parametrize(
    "statuses, saves, status, back",
    [
        ([0, 0], "40", 0, False),
        ([2, 137], "", 2, False),  # one refused, the other was killed for it
        ([134, 2], "40", 2, False),
        ([75, 75], "40", 75, True),
        ([75, 75], "", 75, True),  # the first start without a checkpoint is forgiven
        ([75, 134], "40", 134, True),
        ([1, 137], "40", 137, True),
    ],
)
def test_a_job_ends_or_goes_back_into_the_queue_by_the_statuses_of_all(
    tmp_path, job, statuses, saves, status, back
):
    done = job(statuses, saves)
    assert done.returncode == status, done.stdout + done.stderr
    assert told(tmp_path, "scontrol") == (["requeue 7"] if back else [])
    assert ("back into the queue" in done.stdout) == back


def test_three_starts_in_a_row_without_a_newer_checkpoint_are_the_last(tmp_path, job):
    for saves in ("", "", "20", "20", "20", "100"):  # 100 is newer than 20: numbers, not words
        job([1, 1], saves)
    assert len(told(tmp_path, "scontrol")) == 6
    job([75, 75])
    job([1, 1])
    done = job([1, 1])
    assert done.returncode == 1 and "3 in a row without a new one: giving up" in done.stderr
    assert len(told(tmp_path, "scontrol")) == 8


def test_nothing_is_trained_on_machines_that_preflight_refuses(tmp_path, job):
    done = job([0, 0], preflight=2)
    assert done.returncode == 2 and told(tmp_path, "scontrol") == []
    assert {line.split()[0] for line in told(tmp_path, "processes")} == {"preflight"}


def test_every_process_gets_the_same_arguments_for_both_commands(tmp_path, job):
    assert job([0, 0]).returncode == 0
    arguments = " ".join([str(tmp_path / "checkpoints"), *FIVE])
    expected = [f"{command} {arguments}" for command in ("preflight", "main") for _ in range(2)]
    assert told(tmp_path, "processes") == expected
    job([0, 0], PREFLIGHT="0")
    assert told(tmp_path, "processes")[4:] == expected[2:]


def test_a_container_is_asked_for_where_one_is_named(tmp_path, job):
    job([0, 0])
    assert not any("--container" in line for line in told(tmp_path, "srun"))
    container = {"CONTAINER_IMAGE": "gpt3jax.sqsh", "CONTAINER_MOUNTS": "/data:/data"}
    job([0, 0], **container, REPOSITORY=str(tmp_path / "repository"))
    for line in told(tmp_path, "srun")[2:]:
        assert "--container-image=gpt3jax.sqsh --container-mounts=/data:/data" in line
    job([0, 0], CONTAINER_IMAGE="gpt3jax.sqsh", REPOSITORY=str(tmp_path / "repository"))
    for line in told(tmp_path, "srun")[4:]:  # pyxis refuses an empty list of mounts
        assert "--container-image=gpt3jax.sqsh" in line and "--container-mounts" not in line


def test_with_and_without_a_container_the_command_lines_are_the_same(tmp_path, job):
    """But for the container itself; and each process may use all CPUs and sees all GPUs."""
    where = {"REPOSITORY": str(tmp_path / "repository")}
    job([0, 0], **where)
    job([0, 0], CONTAINER_IMAGE="gpt3jax.sqsh", CONTAINER_MOUNTS="/data:/data", **where)
    lines = [line.split() for line in told(tmp_path, "srun")]
    assert lines[:2] == [
        [option for option in line if not option.startswith("--container-")] for line in lines[2:]
    ]
    assert [len(line) for line in lines] == [4, 4, 6, 6]
    processes = told(tmp_path, "processes")
    assert processes[:4] == processes[4:]
    assert {"--gpu-bind=none", "--cpu-bind=none"} < set(lines[0])
    job([0, 0], CPU_BIND="cores")
    assert "--cpu-bind=cores" in told(tmp_path, "srun")[-1].split()


def test_a_job_that_cannot_start_is_refused_in_one_line(tmp_path, job):
    done = job([0, 0], REPOSITORY="/nowhere")
    assert (
        done.returncode == 2 and "call sbatch in the repository, or set REPOSITORY" in done.stderr
    )
    usage = subprocess.run([SBATCH, "checkpoints"], capture_output=True, text=True)
    assert usage.returncode == 2 and "usage: sbatch" in usage.stderr
