"""Several processes on a machine: one's losses, checkpoints of any number, deaths noticed."""

import os
import re
import shutil
import signal
import socket
import subprocess
import time

import growing_batch
import jax
import pytest

from gpt3jax import errors
from gpt3jax.run import folder_lock

import corpus

pytestmark = pytest.mark.slow
MIXED = ("--mesh.fsdp=2", "--mesh.tensor=2")
HEARTBEAT = 10  # seconds


def start(folder, n, *args, patch="", patch_all=""):
    """Start n processes of a run that emulate 4 devices together; the last runs `patch` first."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    return [
        corpus.start_main(
            folder,
            "--mesh.data=-1",
            f"--mesh.cpu-devices={4 // n}",
            f"--distributed.n-processes={n}",
            f"--distributed.process-id={i}",
            f"--distributed.coordinator-address={address}",
            f"--distributed.heartbeat-timeout={HEARTBEAT}",
            "--train.eval-interval=4",
            "--train.eval-batches=2",
            "--checkpoint.save-interval=4",
            *args,
            patch=patch_all + (patch if i == n - 1 else ""),
        )
        for i in range(n)
    ]


def finish(processes):
    """Wait for all and return (statuses, what each printed, its errors)."""
    told = [process.communicate(timeout=300) for process in processes]
    return [p.returncode for p in processes], [out for out, _ in told], [err for _, err in told]


def run(folder, n, *args):
    statuses, out, err = finish(start(folder, n, *args))
    assert statuses == [0] * n, err
    # XLA's CPU collectives write in several pieces, from several threads.
    told = [re.sub(r".*(\[Gloo\]|connected peer ranks).*\n", "", text) for text in out]
    assert not any(told[1:]), "only the first process tells"
    return told[0]


def test_the_first_process_alone_records_its_devices(tmp_path):
    folder = corpus.write_run(tmp_path)
    options = ("--log.profile-steps", "3", "4", "--log.profile-memory=3", "--checkpoint.dir=")
    run(folder, 2, "--train.n-steps=5", *options)
    (profile,) = (folder / "logs").rglob("*.xplane.pb")
    data = jax.profiler.ProfileData.from_file(str(profile))
    steps = [
        dict(event.stats)["step_num"]
        for plane in data.planes for line in plane.lines for event in line.events
        if event.name == "train"
    ]  # fmt: skip
    assert sorted(steps) == [3, 4]
    assert [file.name for file in (folder / "logs").glob("*.prof")] == ["memory-step-3.prof"]


ONE_SPEAKS = """
import atexit, sys
from gpt3jax.distributed import node_speaker
node_speaker.LARGE = 2
atexit.register(lambda: sys.stderr.write(f"speaks: {node_speaker.speaks()}\\n"))
"""


def test_one_process_speaks_for_its_node(tmp_path, alone):
    """As from 1,024 processes on."""
    folder = corpus.write_run(tmp_path)
    statuses, _, err = finish(start(folder, 2, "--train.n-steps=12", patch_all=ONE_SPEAKS))
    assert statuses == [0, 0], err
    told = "".join(err)
    assert told.count("speaks: True") == told.count("speaks: False") == 1
    assert_same(corpus.records(folder), corpus.records(alone))


def assert_same(found, expected):
    assert [sorted(r) for r in found] == [sorted(r) for r in expected]
    for one, other in zip(found, expected, strict=True):
        near = {k: pytest.approx(v, rel=1e-5) for k, v in other.items() if not isinstance(v, str)}
        assert one == other | near


def wait_for_steps(folder, processes):
    file = folder / "logs" / "metrics.jsonl"
    while not (file.exists() and file.read_bytes().count(b"\n") > 3):
        if any(p.poll() is not None for p in processes):
            pytest.fail(f"a process ended early: {finish(processes)}")
        time.sleep(0.01)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Return the folder of a run of 12 steps by one process."""
    folder = corpus.write_run(tmp_path_factory.mktemp("alone"))
    run(folder, 1, "--train.n-steps=12")
    return folder


def test_processes_skip_the_same_spikes_and_compare_replicas(tmp_path):
    """With no deviation allowed, every step whose loss grew is a spike."""
    options = ["--train.n-steps=12", "--faults.spike=skip", "--faults.spike-window=2"]
    options += ["--faults.spike-deviations=0", "--train.checksum-interval=2"]
    found = []
    for n in (1, 2):
        folder = corpus.write_run(tmp_path / str(n))
        told = run(folder, n, *options)
        assert "(100.0% of the parameters) are compared every 2 steps" in told
        found.append(corpus.records(folder))
        spikes = sum(r.get("spikes_in_interval", 0) for r in found[-1])
        assert 0 < spikes == len(list((folder / "logs" / "faults").iterdir())) < 10
    assert_same(found[1], found[0])


@pytest.mark.parametrize(
    ("n", "mesh"),
    [
        pytest.param(2, (), id="2-data"),
        pytest.param(4, MIXED, id="4-mixed"),
        pytest.param(2, MIXED, id="2-mixed", marks=pytest.mark.slower),
        pytest.param(4, (), id="4-data", marks=pytest.mark.slower),
    ],
)
def test_processes_together_have_the_losses_of_one(tmp_path, alone, n, mesh):
    folder = corpus.write_run(tmp_path)
    told = run(folder, n, "--train.n-steps=12", *mesh)
    assert f"{n} process(es), 4 device(s)" in told
    assert_same(corpus.records(folder), corpus.records(alone))
    assert len(list((folder / "logs").glob("events.*"))) == 1


@pytest.mark.parametrize("n", [2, pytest.param(4, marks=pytest.mark.slower)])
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, alone, n):
    """Several processes, then 1, then several on another mesh."""
    folder = corpus.write_run(tmp_path)
    run(folder, n, "--train.n-steps=4")
    assert "at step 4, 32 samples" in run(folder, 1, "--train.n-steps=8")
    mesh = ("--mesh.data=2", "--mesh.fsdp=2")
    assert "at step 8, 64 samples" in run(folder, n, "--train.n-steps=12", *mesh)
    ends = ("validation_loss", "test_loss")  # each part had an end of its own
    steps = [r for r in corpus.records(folder) if not any(name in r for name in ends)]
    assert_same(steps, [r for r in corpus.records(alone) if "loss" in r])


GROWING = ("--batch.schedule=0:4 256:8", "--train.n-samples=80", "--mesh.data=auto")


def test_processes_change_the_layout_together(tmp_path):
    """The state moves between processes: from stages to shards, when the batch grows."""
    found = []
    unlike = {4: {"mesh.stage": 2, "mesh.data": 2}, 8: {"mesh.fsdp": 2, "mesh.tensor": 2}}
    for n, layouts in ((1, {4: {}, 8: {}}), (2, unlike)):
        folder = corpus.write_run(tmp_path / str(n))
        options = growing_batch.write_layouts(folder, layouts, n_devices=4)
        told = run(folder, n, *GROWING, options)
        found.append(corpus.records(folder))
    assert "batches of 8 run in another layout: fsdp 2 x tensor 2" in told
    assert_same(found[1], found[0])


def test_a_process_whose_devices_idle_leaves_and_the_others_train(tmp_path, alone):
    """The layout uses 2 of the 4 devices, those of the first 2 of 4 processes."""
    folder = corpus.write_run(tmp_path)
    layouts = growing_batch.write_layouts(folder, {8: {"mesh.fsdp": 2}}, n_devices=4)
    options = ("--train.n-steps=12", layouts, "--mesh.data=auto")
    statuses, out, err = finish(start(folder, 4, *options))
    assert statuses == [0] * 4, err
    assert all("nothing to do: its devices idle" in text for text in out[2:])
    assert "2 process(es), 2 device(s)" in out[0] and "the run is complete" in out[0]
    assert_same(corpus.records(folder), corpus.records(alone))


def test_a_finished_run_is_known_by_all(tmp_path, alone):
    folder = shutil.copytree(alone, tmp_path / "run")
    told = run(folder, 4, "--train.n-steps=12")
    assert told.endswith("nothing left to do: the run ended at step 12\n")


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGUSR1, marks=pytest.mark.slower),
        pytest.param(signal.SIGHUP, marks=pytest.mark.slower),
        pytest.param(signal.SIGINT, marks=pytest.mark.slower),
    ],
)
def test_a_signal_to_one_stops_all_after_the_same_step(tmp_path, number):
    folder = corpus.write_run(tmp_path)
    processes = start(folder, 2, "--train.n-steps=2000")
    wait_for_steps(folder, processes)
    processes[1].send_signal(number)
    statuses, out, err = finish(processes)
    assert statuses == [errors.REQUEUE] * 2, err
    step = int(re.search(r"stopped at step (\d+), saved", out[0])[1])
    assert str(step) in os.listdir(folder / "checkpoints")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others_in_time(tmp_path, victim):
    folder = corpus.write_run(tmp_path)
    processes = start(folder, 2, "--train.n-steps=2000")
    wait_for_steps(folder, processes)
    processes[victim].send_signal(signal.SIGKILL)
    begin = time.monotonic()
    statuses, _, err = finish(processes)
    assert time.monotonic() - begin < 3 * HEARTBEAT
    assert statuses[1 - victim] != 0
    named = "coordination service" if victim == 0 else r"stopped sending heartbeats\W+(/\S+:)?1$"
    assert re.search(named, err[1 - victim], re.MULTILINE), err[1 - victim]


@pytest.mark.parametrize("preflight", [True, False])
def test_all_are_refused_where_another_run_holds_the_folder(tmp_path, preflight):
    """The first process alone finds it; it waits, and so do the others."""
    folder = corpus.write_run(tmp_path)
    (folder / "checkpoints").mkdir()
    lock = folder_lock.Lock("checkpoint.dir", folder / "checkpoints")
    lock.take()
    options = [] if preflight else ["--distributed.no-preflight"]
    shorter = "from gpt3jax.run import folder_lock; folder_lock.WAIT_SECONDS = 2.0\n"
    statuses, _, err = finish(start(folder, 2, *options, patch_all=shorter))
    lock.release()
    assert statuses == [errors.REFUSED] * 2, err
    assert all(f"is held by process {os.getpid()} on" in text for text in err), err


@pytest.mark.parametrize(
    "what", ["step", "log folder", pytest.param("folder", marks=pytest.mark.slower)]
)
def test_all_stop_where_another_run_comes_into_the_folder(tmp_path, what):
    folder = corpus.write_run(tmp_path)
    options = ["--train.n-steps=2000", "--train.checksum-interval=0"]
    options += ["--checkpoint.dir="] if what == "log folder" else []
    looking = "from gpt3jax.run import folder_lock; folder_lock.LEASE_SECONDS = 3.0\n"
    processes = start(folder, 2, *options, patch_all=looking)
    wait_for_steps(folder, processes)
    if what == "step":
        (folder / "checkpoints" / "7777").mkdir()
    else:
        taken = folder / ("checkpoints" if what == "folder" else "logs")
        other = folder_lock.Lock("", taken)
        other.holder |= {"system": "another"}
        (taken / folder_lock.FILE).write_bytes(other.content())
    begin = time.monotonic()
    statuses, _, err = finish(processes)
    assert statuses == [errors.REFUSED] * 2, err
    assert time.monotonic() - begin < 60
    told = "step 7777, which this run did not write" if what == "step" else "was taken by process"
    assert told in err[0] and "another process ended the run" in err[1], err


def test_an_error_on_one_process_ends_the_others(tmp_path):
    """The second process has another recipe than the first, whose corpus is not there."""
    folder, other = corpus.write_run(tmp_path / "a"), tmp_path / "b"
    other.mkdir()
    shutil.copy(folder / "recipe.py", other)
    processes = start(folder, 2, "--train.n-steps=2000")
    processes[1].kill()
    processes[1].communicate()
    command = processes[1].args
    processes[1] = subprocess.Popen(
        command, cwd=other, stdout=-1, stderr=-1, text=True,
        env=os.environ | {"PYTHONPATH": str(corpus.REPOSITORY)},
    )  # fmt: skip
    begin = time.monotonic()
    statuses, _, err = finish(processes)
    assert statuses[1] == 2 and "corpus.idx: no such file" in err[1]
    assert statuses[0] != 0 and time.monotonic() - begin < 60 + 3 * HEARTBEAT


def test_a_process_that_does_not_come_is_an_error(tmp_path):
    processes = start(corpus.write_run(tmp_path), 2, "--distributed.start-timeout=5")
    processes[1].kill()
    begin = time.monotonic()
    statuses, _, err = finish(processes)
    assert statuses[0] != 0 and time.monotonic() - begin < 60
    assert "DEADLINE_EXCEEDED" in err[0] or "could not be joined" in err[0]


DATA_TAKES = """
import itertools, time
from gpt3jax.data import loader
batches = loader.train_batches
def slow(*args):
    for i, batch in enumerate(batches(*args)):
        time.sleep({seconds} if i > 5 else 0)
        yield batch
loader.train_batches = slow
"""


def test_a_slow_process_is_named(tmp_path):
    folder = corpus.write_run(tmp_path)
    patch = DATA_TAKES.format(seconds=0.5)
    options = ("--train.n-steps=40", "--watchdog.min-seconds=4", "--train.eval-interval=0")
    statuses, out, err = finish(start(folder, 2, *options, patch=patch))
    assert statuses == [0, 0], err
    # On a busy machine the other may hold it up too, for a while.
    slow = dict(re.findall(r"WARNING: process (\d) \(\S+\) spends (\S+) s a step outside", out[0]))
    assert float(slow["1"]) > 0.2, out[0]  # of a mean that begins before it is slow


def test_a_hang_is_told_by_all_and_the_process_at_fault_named(tmp_path):
    folder = corpus.write_run(tmp_path)
    options = ("--train.n-steps=2000", "--watchdog.min-seconds=6")
    options += ("--distributed.heartbeat-timeout=60",)
    processes = start(folder, 2, *options, patch=DATA_TAKES.format(seconds=1000))
    wait_for_steps(folder, processes)
    begin = time.monotonic()
    statuses, _, err = finish(processes)
    assert statuses == [errors.RETRY] * 2 and time.monotonic() - begin < 60
    # Its own watchdog may have ended it before the first process looks: then it is silent.
    silent = r"not been heard of for \d+ s; before, it was"
    pattern = rf"process 1 \(\S+\) has (been|{silent}) in 'wait for data' after step 5"
    assert re.search(pattern, err[0]), err[0]
    assert "process 0 has been in 'wait for devices'" in err[0] and "in loop" in err[0]
    assert "process 1 has been in 'wait for data'" in err[1] and "in slow" in err[1]


def test_a_stopped_process_is_named_and_ends_when_it_goes_on(tmp_path):
    folder = corpus.write_run(tmp_path)
    options = ("--train.n-steps=2000", "--watchdog.min-seconds=6", "--train.eval-interval=0")
    options += ("--checkpoint.save-interval=2000", "--distributed.heartbeat-timeout=60")
    processes = start(folder, 2, *options)
    wait_for_steps(folder, processes)
    processes[1].send_signal(signal.SIGSTOP)
    begin = time.monotonic()
    _, err = processes[0].communicate(timeout=60)
    assert processes[0].returncode == errors.RETRY and time.monotonic() - begin < 40
    assert re.search(r"process 1 \(\S+\) has not been heard of for \d+ s", err), err
    processes[1].send_signal(signal.SIGCONT)
    processes[1].communicate(timeout=60)
    assert processes[1].returncode not in (errors.DONE, errors.REFUSED, errors.REQUEUE)
