"""The report's time, memory and size for a run of many logged steps: `python benchmarks/report.py`.

It makes up a run of 100,000 logged steps as a long one looks: a loss that falls by a power of the
tokens, with spikes and steps that are skipped, 24 restarts of which some take steps again, three
meshes, a batch that grows, an evaluation in every 1,000 steps. Then it runs `gpt3jax.report --html`
on it, as a process of its own.
"""

import argparse
import itertools
import json
import math
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np

from gpt3jax.config import recipe, schema
from gpt3jax.record import json_files
from gpt3jax.watch import goodput

REPOSITORY = pathlib.Path(__file__).parents[1]
SEQ_LEN, FLOPS_PER_TOKEN, PEAK = 2048, 8.8e9, 989e12  # of configs/gpt3/1_3b.py on an H100
BEGAN = 1.75e9  # Unix time
MESHES = ((0.0, "data 64", 64), (0.4, "data 16 x tensor 4", 64), (0.7, "data 16 x tensor 8", 128))


def batch_sizes(n_steps):
    """Return the batch size of each step: it grows in four stages."""
    stage = np.searchsorted([0.05, 0.12, 0.25], np.arange(n_steps) / n_steps)
    return np.array([64, 128, 256, 512])[stage]


def losses(rng, tokens):
    """Return a loss for each step, some with a spike that takes a while to pass, some NaN."""
    n = len(tokens)
    loss = 1.75 + 9.3 * (1 + tokens / 3e7) ** -0.28 + 0.02 * rng.standard_normal(n)
    loss[0] = math.log(50_304)
    for step in rng.integers(n // 20, n, 14):
        passing = np.arange(min(n - step, 80))
        loss[step : step + len(passing)] += rng.uniform(0.5, 3) * 0.9**passing
    nan = rng.choice(n, max(n // 4000, 1), replace=False)
    loss[nan] = np.nan
    return loss


def step_times(rng, sizes, devices):
    """Return the seconds of each step, some of them slow."""
    seconds = sizes * SEQ_LEN * FLOPS_PER_TOKEN / (devices * 0.41 * PEAK)
    slow = np.where(rng.random(len(sizes)) < 0.001, rng.uniform(2, 12, len(sizes)), 1.0)
    return seconds * (1 + 0.02 * np.abs(rng.standard_normal(len(sizes)))) * slow


def learning_rate(share):
    """Return the learning rate after a share of the run: a warm-up, then half a cosine."""
    return 2e-4 * min(share / 0.02, 0.55 + 0.45 * math.cos(math.pi * share))


def starts_of(rng, n_steps, seconds):
    """Return the starts of a run, the Unix time at which each step ended, and their steps' mesh."""
    ends = [
        *np.sort(rng.choice(np.arange(1, n_steps), min(24, n_steps // 4), replace=False)),
        n_steps,
    ]
    starts, moment, first, times = [], BEGAN, 0, np.zeros(n_steps)
    for i, last in enumerate(ends):
        last = int(last)
        phases = {"start": 60.0, "restore": 40.0 if i else 0.0, "compile": 90.0}
        on_steps = np.cumsum(seconds[first:last])
        times[first:last] = moment + sum(phases.values()) + on_steps
        phases |= {"wait for devices": 0.97 * on_steps[-1], "wait for data": 0.01 * on_steps[-1]}
        phases |= {
            "host": 0.02 * on_steps[-1],
            "save": 0.5 * (last - first) / 100,
            "evaluate": 20.0,
        }
        end = "complete" if last == n_steps else "stopped" if i % 3 == 1 else ""
        mesh = next(mesh for mesh in reversed(MESHES) if first >= mesh[0] * n_steps)
        layout = {"mesh": mesh[1], "devices": f"{mesh[2]} x NVIDIA H100 80GB HBM3", "jax": "0.12.0"}
        starts.append(goodput.Start(moment, first, last, phases, end, layout))
        moment = max(times[last - 1], moment) + sum((phases["save"], 20.0)) + rng.exponential(1800)
        first = last if end else max(last - int(rng.integers(1, 200)), first)
    return starts, np.maximum.accumulate(times)


def write_metrics(folder, rng, n_steps, seconds, times):
    """Write metrics.jsonl; return the steps whose loss is not finite."""
    sizes = batch_sizes(n_steps)
    samples = np.cumsum(sizes)
    loss, norm = losses(rng, samples * SEQ_LEN), 0.3 + np.abs(0.1 * rng.standard_normal(n_steps))
    norm *= np.where(rng.random(n_steps) < 0.0005, 30, 1)
    with open(folder / "metrics.jsonl", "w", encoding="utf-8") as file:
        for i in range(n_steps):
            skipped = int(not math.isfinite(loss[i]))
            rate = float(sizes[i]) * SEQ_LEN / seconds[i]
            devices = next(mesh[2] for mesh in reversed(MESHES) if i >= mesh[0] * n_steps)
            tflops = rate / devices * FLOPS_PER_TOKEN / 1e12
            entry = {
                "step": i + 1, "time": times[i], "consumed_samples": int(samples[i]),
                "consumed_tokens": int(samples[i]) * SEQ_LEN, "batch_size": int(sizes[i]),
                "learning_rate": learning_rate((i + 1) / n_steps),
                "loss": loss[i], "grad_norm": math.nan if skipped else norm[i], "loss_scale": 1.0,
                "interval_loss": loss[i], "step_time": seconds[i], "skipped": skipped,
                "skipped_in_interval": skipped, "nan_in_interval": skipped,
                "spikes_in_interval": 0, "skipped_samples": 0, "tokens_per_second": rate,
                "tokens_per_second_per_device": rate / devices, "tflops_per_device": tflops,
                "mfu": tflops * 1e12 / PEAK,
            }  # fmt: skip
            file.write(json_files.to_json(entry) + "\n")
            if (i + 1) % max(n_steps // 100, 1) == 0:
                value = float(np.nanmean(loss[max(i - 50, 0) : i + 1])) + 0.03
                place = {"step": i + 1, "time": times[i], "consumed_samples": int(samples[i])}
                file.write(json_files.to_json(place | {"validation_loss": value}) + "\n")
    return np.flatnonzero(~np.isfinite(loss)) + 1


def change(then, now):
    return {"then": then["mesh"], "now": now["mesh"]}


def write_run(folder, n_steps, seed=0):
    """Write the files of a run of so many logged steps."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    devices = np.array([mesh[2] for mesh in MESHES])
    mesh = np.searchsorted([m[0] * n_steps for m in MESHES[1:]], np.arange(n_steps), side="right")
    seconds = step_times(rng, batch_sizes(n_steps), devices[mesh])
    starts, times = starts_of(rng, n_steps, seconds)
    nans = write_metrics(folder, rng, n_steps, seconds, times)
    args = [f"--config={REPOSITORY}/configs/gpt3/1_3b.py", "--data.mock", f"--log.dir={folder}"]
    cfg = recipe.parse([*args, f"--train.n-steps={n_steps}", "--train.n-tokens=0"], "gpt3jax.main")
    history = [
        {"step": b.first_step, "samples": 0, "changes": {"mesh": change(a.layout, b.layout)}}
        for a, b in itertools.pairwise(starts)
        if a.layout != b.layout
    ]
    content = schema.flatten(cfg) | {"history": history}
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")
    rows = [vars(start) for start in starts]
    (folder / "goodput.json").write_text(json.dumps({"starts": rows}, indent=1) + "\n")
    (folder / "faults").mkdir(exist_ok=True)
    for step in nans.tolist():
        fault = {"step": step, "samples": ["0:512"], "loss": math.nan, "skipped": 1}
        text = json_files.to_json(fault | {"fault": "not finite", "policy": "skip"}, indent=2)
        (folder / "faults" / f"step-{step}.json").write_text(text + "\n")


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000, help="logged steps")
    parser.add_argument("--runs", type=int, default=1, help="runs side by side")
    parser.add_argument("--folder", help="keep the runs and the page there")
    options = parser.parse_args(args)
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(options.folder or scratch)
        runs = [folder / f"run-{i}" for i in range(options.runs)]
        for seed, run in enumerate(runs):
            write_run(run, options.steps, seed)
        page = folder / "report.html"
        command = [sys.executable, "-m", "gpt3jax.report", *map(str, runs), "--html", str(page)]
        begin = time.perf_counter()
        subprocess.run(command, check=True, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - begin
        size = sum((run / "metrics.jsonl").stat().st_size for run in runs)
        memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**10
        print(
            f"{options.runs} x {options.steps:,} logged steps, {size / 1e6:.1f} MB of "
            f"metrics.jsonl: {seconds:.1f} s, {memory:.0f} MiB, page of "
            f"{page.stat().st_size / 1e3:.0f} KB"
        )


if __name__ == "__main__":
    main()
