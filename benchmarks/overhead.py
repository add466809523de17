"""Measure how much watching a run adds to a step, in one process.

    python benchmarks/overhead.py [--config RECIPE.py] [--devices 4] [--steps 40] [--rounds 5]

"Without" takes the batches from the loader, dispatches the steps and reads the loss one behind.
"With" is the loop of `gpt3jax.main`: watchdog, metrics to the console, metrics.jsonl and
TensorBoard, time accounting, gradient norms, replicas compared every 10 steps (10 times as often
as by default). The two alternate, and take the same compiled step of the quickstart's model, data
parallel on emulated CPU devices. Nothing is saved. Compare the medians.
"""

import argparse
import contextlib
import io
import statistics
import sys
import tempfile
import time

import jax

from gpt3jax import train
from gpt3jax.config import recipe
from gpt3jax.data import loader
from gpt3jax.distributed import joining
from gpt3jax.record import recording
from gpt3jax.run import startup, stopping
from gpt3jax.watch import phases, watchers


def parse(args):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/quickstart.py")
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args(args)


def main(args):
    options = parse(args)
    with tempfile.TemporaryDirectory() as folder:
        cfg = recipe.parse([
            f"--config={options.config}", "--mesh.data=-1",
            f"--mesh.cpu-devices={options.devices}", "--checkpoint.dir=", f"--log.dir={folder}",
            "--log.interval=1", "--train.checksum-interval=10", "--train.eval-interval=0",
            f"--train.n-steps={options.steps}", "--train.n-samples=0", "--train.n-tokens=0",
            "--data.mock", "--data.from-text=", "--data.vocab-file=", "--data.merge-file=",
            "--data.paths",
        ])  # fmt: skip
        joining.start(cfg.distributed, cfg.mesh)
        measure(cfg, options.rounds)


def measure(cfg, rounds):
    started = startup.start_or_resume(cfg, phases.Phases())
    run, state, start = started.run, started.state, started.position
    times = {"without": [], "with": []}
    state, _ = without(run, state, start)  # compiles, and fills caches
    state, _ = watched(run, state, start)
    for i in range(rounds):
        state, seconds = without(run, state, start)
        times["without"].append(seconds)
        state, seconds = watched(run, state, start)
        times["with"].append(seconds)
        print(f"round {i + 1}: " + ", ".join(f"{k} {v[-1] * 1e3:.1f} ms" for k, v in times.items()))
    medians = {name: statistics.median(values) for name, values in times.items()}
    extra = medians["with"] - medians["without"]
    print(
        f"{jax.device_count()} emulated devices, jax {jax.__version__}: a step takes "
        f"{medians['without'] * 1e3:.1f} ms without and {medians['with'] * 1e3:.1f} ms with: "
        f"{extra * 1e3:+.2f} ms, {extra / medians['without']:+.2%}"
    )


def without(run, state, start):
    """Return the state after the bare steps, and the seconds per step."""
    batches = loader.train_batches(
        run.splits, run.cfg, run.schedule, run.mesh, start.samples, run.end.samples
    )
    begin, before, n = time.perf_counter(), None, 0
    for batch, _, _ in batches:
        state, found = run.program.train(state, batch)
        if before is not None:
            before["loss"].item()
        before, n = found, n + 1
    before["loss"].item()
    return state, (time.perf_counter() - begin) / n


def watched(run, state, start):
    """Return the state after the steps of `train.loop`, and the seconds per step."""
    cfg = run.cfg
    with contextlib.redirect_stdout(io.StringIO()), watchers.Oversight(cfg) as overseer:
        overseer.begin(start.step, startup.describe_mesh(run.mesh))
        with (
            recording.Recorder(
                cfg,
                recording.Span(
                    start_step=0, start_samples=0, end_step=run.end.step,
                    end_samples=run.end.samples,
                ),
                n_devices=jax.device_count(), peak_flops=None,
            ) as recorder,
            stopping.Stop(lambda: "") as stop,
            overseer.clock.during(phases.HOST),
        ):  # fmt: skip
            _, state, position = train.loop(run, state, start, recorder, stop, overseer)
        return state, phases.step_seconds(overseer.clock.seconds()) / position.step


if __name__ == "__main__":
    main(sys.argv[1:])
