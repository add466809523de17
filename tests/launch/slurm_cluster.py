"""A real Slurm on this machine alone: munged, slurmctld and slurmd out of a temporary folder.

`with slurm_cluster.start(folder) as cluster` needs root, and Debian's slurm-wlm and munge.
"""

import contextlib
import dataclasses
import os
import pathlib
import secrets
import shutil
import socket
import subprocess
import time

BINARIES = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")

# linuxproc, task/none and no accounting: a container may not let anyone make cgroups.
# config_overrides: there may be fewer CPUs than tasks. The node is this host, on loopback.
# sched_interval, bf_interval: a job that was requeued starts within seconds.
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control_port}
SlurmdPort={node_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=5
SlurmdParameters=config_overrides
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
KillWait=10
MessageTimeout=60
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 Gres=gpu:2 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=60 State=UP
"""


def find(name):
    """Return the path of a binary; daemons are not in every PATH."""
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def missing():
    """Say what stops a Slurm from running here; nothing where it can."""
    absent = [name for name in BINARIES if not find(name)]
    if absent:
        return f"not installed: {' '.join(absent)} (apt: slurm-wlm munge)"
    return "" if os.geteuid() == 0 else "slurmd starts jobs as root only"


@dataclasses.dataclass(frozen=True)
class Cluster:
    """A Slurm that runs: commands for it, and what they said."""

    folder: pathlib.Path

    @property
    def environment(self):
        """Return the variables by which Slurm's commands find this Slurm."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
        return clean | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def tell(self, *command, **variables):
        """Run a command of Slurm's and return what it prints."""
        done = subprocess.run(
            command, env=self.environment | variables, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *arguments, **variables):
        """Submit a job; return its number."""
        return self.tell("sbatch", "--parsable", *arguments, **variables).strip()

    def job(self, number):
        """Return a job's fields, as scontrol shows them."""
        words = self.tell("scontrol", "show", "job", number).split()
        return dict(word.partition("=")[::2] for word in words)

    def wait_for(self, number, *states, seconds=300):
        """Wait for a job to reach a state, without letting it wait in the queue; its fields."""
        deadline = time.monotonic() + seconds
        while (job := self.job(number))["JobState"] not in states:
            assert time.monotonic() < deadline, job
            if job["JobState"] == "PENDING" and job["Reason"] == "BeginTime":
                self.tell("scontrol", "update", f"JobId={number}", "StartTime=now")
            time.sleep(0.5)
        return job


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _start_daemons(folder):
    """Yield munged, slurmctld and slurmd, each once the one before serves."""
    socket_file = folder / "munge.socket"
    files = {"key": "munge.key", "pid": "munge.pid", "log": "munge.log", "seed": "munge.seed"}
    options = [f"--{kind}-file={folder / name}" for kind, name in files.items()]
    munged = [find("munged"), "--foreground", "--force", f"--socket={socket_file}", *options]
    yield subprocess.Popen(munged, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _wait(socket_file.exists, folder)
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    for daemon in ("slurmctld", "slurmd"):
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        yield subprocess.Popen([find(daemon), "-D"], env=environment, **quiet)


def _wait(ready, folder, seconds=60):
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            logs = {path.name: path.read_text()[-2000:] for path in folder.glob("*.log")}
            raise AssertionError(f"no Slurm after {seconds} s: {logs}")
        time.sleep(0.2)


@contextlib.contextmanager
def start(folder):
    """Run a Slurm of one node and four CPUs as long as the context lasts."""
    folder.mkdir(mode=0o755)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(secrets.token_bytes(128))
    (folder / "munge.key").chmod(0o400)
    host = socket.gethostname().partition(".")[0]
    ports = {"control_port": _free_port(), "node_port": _free_port()}
    (folder / "slurm.conf").write_text(CONF.format(folder=folder, host=host, **ports))
    # Slurm wants a device file for each GPU; any will do for its books.
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
    cluster = Cluster(folder)
    daemons = []

    def idle():
        asked = subprocess.run(
            ["sinfo", "-h", "-o", "%T"], env=cluster.environment, capture_output=True, text=True
        )
        return asked.stdout.strip() == "idle"

    try:
        for daemon in _start_daemons(folder):
            daemons.append(daemon)
        _wait(idle, folder)
        yield cluster
    finally:
        _stop(cluster, daemons)


def _stop(cluster, daemons):
    """End all jobs, then the daemons, the last one started first; none is left running."""
    subprocess.run(["scancel", "--user=root"], env=cluster.environment, capture_output=True)
    with contextlib.suppress(AssertionError):
        _wait(lambda: not cluster.tell("squeue", "--noheader"), cluster.folder, seconds=30)
    for daemon in reversed(daemons):
        daemon.terminate()
        try:
            daemon.wait(timeout=10)
        except subprocess.TimeoutExpired:  # slurmd waits for messages that nobody takes any more
            daemon.kill()
            daemon.wait()
