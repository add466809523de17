"""Kill runs at random moments, restart them, and compare them with an undisturbed run.

    python benchmarks/faults.py --kills 200 [--processes 1 2 4] [--steps 120]

A tiny model trains in 1, 2 and 4 processes. Each time `kill -9` strikes one process, at any moment
of its life or inside a save, and the others a moment later, as a scheduler would. The same command
starts them again until the run completes. Losses, evaluations, the final state and the sample
numbers of every step must then equal the undisturbed run's bit for bit. The command exits with 1 if
one differs. On 2 shared cores 200 kills took 68 minutes. To save time, processes are forked from
one that has imported the package.
"""

import argparse
import collections
import json
import multiprocessing
import os
import pathlib
import random
import runpy
import signal
import socket
import sys
import tempfile
import time

import jax
import numpy as np

from gpt3jax.checkpoint import parameters, storage
from gpt3jax.config import recipe
from gpt3jax.data import loader

REPOSITORY = pathlib.Path(__file__).parents[1]
N_DEVICES = 4
SHARES = {1: 0.8, 2: 0.15, 4: 0.05}  # share of the kills, by number of processes in a run
MOST_OF_A_RUN = 25  # kills
RECIPE = """
from gpt3jax import config


def get_config():
    return config.Config(
        model=config.Model(n_layers=2, d_model=32, n_heads=4, seq_len=16, vocab_size=64),
        optimizer=config.Optimizer(peak_lr=1e-2, warmup_samples=16, decay_samples=3200),
        batch=config.Batch(global_batch_size=8),
        data=config.Data(mock=True, eod_id=0),
        train=config.Train(
            n_steps={n}, eval_interval={n} // 3, eval_batches=2, max_fruitless_starts=0
        ),
        checkpoint=config.Checkpoint(dir="checkpoints", save_interval={n} // 12),
        log=config.Log(dir="logs", interval=1),
    )
"""
START = "--- start ---\n"  # in the file of a process's output
FORKS = multiprocessing.get_context("forkserver")
CLOCKED = (
    "time", "step_time", "tokens_per_second", "tokens_per_second_per_device", "tflops_per_device",
)  # fmt: skip


def parse(args):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument(
        "--processes", type=int, nargs="+", choices=list(SHARES), default=list(SHARES)
    )
    parser.add_argument("--steps", type=int, default=120, help="steps of each run, at least 12")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    return parser.parse_args(args)


def main(args):
    options = parse(args)
    set_up()
    print(f"seed {options.seed}, {os.cpu_count()} cores, jax {jax.__version__}")
    return 0 if torment(options) else 1


def set_up():
    """Prepare this process, and those that it will fork."""
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": str(REPOSITORY / ".cache" / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    FORKS.set_forkserver_preload(["gpt3jax.main"])
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", N_DEVICES)


def torment(options):
    """Kill runs of each number of processes; return whether all came out equal."""
    rng, begin = random.Random(options.seed), time.monotonic()
    told = collections.Counter()
    equal = True
    with tempfile.TemporaryDirectory() as folder:
        for n in options.processes:
            share = SHARES[n] / sum(SHARES[p] for p in options.processes)
            reference = new_run(pathlib.Path(folder) / f"{n}-undisturbed", options.steps)
            life = time.monotonic()
            assert wait(start(reference, n)) == [0] * n, "the undisturbed run failed"
            life = time.monotonic() - life
            left, number = max(1, round(share * options.kills)), 0
            while left > 0:
                run = new_run(pathlib.Path(folder) / f"{n}-{number}", options.steps)
                struck = finish_with_kills(run, n, min(left, MOST_OF_A_RUN), life, rng)
                differing = differences(run, reference, n)
                left, number = left - sum(struck.values()), number + 1
                told += struck
                equal = equal and not differing
                n_struck = sum(struck.values())
                print(
                    f"{n} process(es), run {number}: {n_struck} kills, "
                    f"{'DIFFERS in ' + ', '.join(differing) if differing else 'equal'} "
                    f"({time.monotonic() - begin:.0f} s)", flush=True,
                )  # fmt: skip
    parts = ", ".join(f"{count} {moment}" for moment, count in told.most_common())
    print(f"{sum(told.values())} kills: {parts}; {'all equal' if equal else 'NOT EQUAL'}")
    return equal


def new_run(folder, n_steps):
    folder.mkdir()
    (folder / "recipe.py").write_text(RECIPE.format(n=n_steps))
    return folder


def start(folder, n):
    """Start the processes of a run, forked from one that has imported the package already."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    several = [f"--distributed.n-processes={n}", f"--distributed.coordinator-address={address}"]
    processes = []
    for i in range(n):
        with open(folder / f"out.{i}.txt", "a") as out:
            out.write(START)
        options = [f"--mesh.cpu-devices={N_DEVICES // n}"]
        options += [*several, f"--distributed.process-id={i}"] if n > 1 else []
        processes.append(FORKS.Process(target=run_main, args=(str(folder), i, options)))
        processes[-1].start()
    return processes


def run_main(folder, process, options):
    """Run `python -m gpt3jax.main` in this process, and note the samples of each batch."""
    os.chdir(folder)
    out = os.open(f"out.{process}.txt", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.argv = ["main", "--config=recipe.py", *options]
    batches = loader.train_batches

    def noted(*args):
        for batch, *rest in batches(*args):
            with open(f"samples.{process}.jsonl", "a") as file:
                rows = [s.data.ravel().tolist() for s in batch["samples"].addressable_shards]
                file.write(json.dumps(rows) + "\n")
            yield batch, *rest

    loader.train_batches = noted
    runpy.run_module("gpt3jax.main", run_name="__main__")


def wait(processes):
    for process in processes:
        process.join(600)
    return [process.exitcode for process in processes]


def finish_with_kills(folder, n, most, life, rng):
    """Start a run until it completes, with at most `most` kills; return when they struck."""
    struck = collections.Counter()
    while True:
        processes = start(folder, n)
        if sum(struck.values()) < most:
            await_moment(folder, processes, rng.random() < 0.4, rng.uniform(0, life), rng)
            if all(process.is_alive() for process in processes):
                struck[moment_of(folder)] += 1
                victim = rng.randrange(n)
                processes[victim].kill()
                time.sleep(rng.uniform(0, 0.2))
                for process in processes:
                    process.kill()
        statuses = wait(processes)
        if statuses == [0] * n:
            return struck
        if any(status not in (0, -signal.SIGKILL) for status in statuses):
            print(f"{folder.name}: exit statuses {statuses}, started again", flush=True)


def await_moment(folder, processes, in_a_save, seconds, rng):
    """Wait for `seconds`, or until the next save begins."""
    deadline = time.monotonic() + seconds
    known = set(unfinished(folder))
    while all(process.is_alive() for process in processes):
        if in_a_save and set(unfinished(folder)) - known:
            time.sleep(rng.uniform(0, 0.05))
            return
        if not in_a_save and time.monotonic() > deadline:
            return
        time.sleep(0.002)


def unfinished(folder):
    return [path.name for path in (folder / "checkpoints").glob("*.orbax-checkpoint-tmp*")]


def moment_of(folder):
    if unfinished(folder):
        return "in a save"
    last = (folder / "out.0.txt").read_text().rpartition(START)[2]
    return "in steps" if "iteration" in last.rpartition("compiling")[2] else "at the start"


def differences(run, reference, n):
    """Return how a killed run differs from the undisturbed one."""
    found = []
    if records(run) != records(reference):
        found.append("losses")
    if any(samples(run, i) != samples(reference, i) for i in range(n)):
        found.append("samples")
    pairs = zip(state_of(run, n), state_of(reference, n), strict=True)
    if not all(a.tobytes() == b.tobytes() for a, b in pairs):
        found.append("state")
    return found


def records(folder):
    lines = (folder / "logs" / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCKED} for line in lines]


def samples(folder, process):
    """Return the distinct lists of samples of each batch of a process, repeats left out."""
    lines = (folder / f"samples.{process}.jsonl").read_text().splitlines(keepends=True)
    batches = collections.defaultdict(set)
    for line in lines:
        if line.endswith("\n"):  # else the process was killed while writing it
            rows = json.loads(line)
            batches[min(map(min, rows)) // 8].add(str(rows))
    return dict(batches)


def state_of(folder, n):
    """Return the arrays of a run's last checkpoint; restoring checks their digests."""
    cfg = recipe.parse([f"--config={folder}/recipe.py"])
    store = storage.Checkpoints(str(folder / "checkpoints"), read_only=True)
    state = store.restore(store.steps()[0], parameters.abstract_state(cfg))
    store.close()
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
