"""Check and measure one GPU in eight minutes: its numbers, its speed, and whether runs repeat.

    python benchmarks/gpu.py [--parts golden 350m] [--limit 1.0] [--output runs/gpu] [--cpu]

Each part is a process of its own with its own time limit, so that one that fails, or does not end,
does not stop the others; all together have eight minutes, and --limit multiplies both. A part's
result is one line of JSON, on the console and in OUTPUT/results.jsonl, written as it comes; what
the parts print is in OUTPUT/log.txt. In the end OUTPUT/tables.md has all in two tables. Settings
are the project's own, as in a run. All parts share one cache of compiled programs, OUTPUT/compiled
(or JAX_COMPILATION_CACHE_DIR), which a second call finds again. With --cpu, and where there is no
GPU, all parts run with tiny sizes. docs/gpu.md says what the parts are and how to read the tables.
It exits with 1 if not all parts ended well.
"""

import argparse
import contextlib
import dataclasses
import importlib
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

from gpt3jax.hardware import devices

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Part:
    """A check or a measurement: a function of `gpu_parts`, and how it is called."""

    function: str
    """MODULE.FUNCTION. It takes a `Task`, and yields what it found, a dictionary at a time."""
    limit: float
    """The most seconds that it may take."""
    args: tuple[str, ...] = ()
    xla_flags: str = ""
    variables: tuple[tuple[str, str], ...] = ()
    """Other variables of its environment."""


@dataclasses.dataclass(frozen=True)
class Task:
    """What the function of a part is given."""

    args: tuple[str, ...]
    folder: pathlib.Path
    """An empty folder."""
    tiny: bool
    """Whether the sizes are to be tiny, as there is no GPU."""


def _model(recipe, *options):
    # 32 sequences a step: the optimizer has the share of a step that it has on a few GPUs.
    batch = "--batch.global-batch-size=32", "--batch.microbatch-size=4"
    return (f"--config={REPOSITORY}/configs/{recipe}.py", *batch, *options)


_350M = _model("gpt3/350m", "--model.remat=none")
_345M = _model("345m", "--model.remat=none", "--precision.compute-dtype=bfloat16")
_IMPLEMENTATION = "--model.attention.implementation={}"
SECONDS = 480.0  # of all parts together
# The most important first: the last ones are left out where the time is over.
PARTS = {
    "environment": Part("environment.describe", 30, _350M),
    "golden": Part("golden.compare", 60),
    "350m": Part("training.measure", 75, _350M),
    "attention": Part("attention.compare", 75),
    "1.3b": Part("training.measure", 60, _model("gpt3/1_3b", "--model.remat=none")),
    "2.7b": Part("training.measure", 75, _model("gpt3/2_7b", "--model.remat=dots")),
    "repeat": Part("runs.repeat", 90),
    "shards": Part("attention.compare_shards", 40),
    "rates": Part("rates.measure", 20),
    "decoding": Part("decoding.compare", 45),
    "345m triton": Part("training.measure", 45, (*_345M, _IMPLEMENTATION.format("triton"))),
    "345m xla": Part("training.measure", 45, (*_345M, _IMPLEMENTATION.format("xla"))),
    "350m 8 connections": Part(
        "training.measure", 30, _350M, variables=(("CUDA_DEVICE_MAX_CONNECTIONS", "8"),)
    ),
    "350m command buffers": Part(
        "training.measure",
        60,
        _350M,
        xla_flags="--xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN",
    ),
    "350m deterministic": Part("training.measure", 60, (*_350M, "--precision.deterministic")),
    "repeat deterministic": Part("runs.repeat", 90, ("--precision.deterministic",)),
    "profile": Part("runs.profile", 40),
}


def parse(args):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="NAME")
    parser.add_argument("--limit", type=float, default=1.0, help="multiplies all times")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs", "gpu"))
    parser.add_argument("--cpu", action="store_true", help="tiny sizes, on the CPU")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(args)
    if not options.limit > 0:
        parser.error(f"--limit={options.limit:g} must be above 0: 2 gives each part twice its time")
    return options


def main(args):
    options = parse(args)
    if options.worker:
        return work(*options.worker, tiny=options.cpu)
    options.cpu = options.cpu or not devices.visible_gpu()
    output = options.output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    results, end = [], time.monotonic() + options.limit * SECONDS
    with (output / "results.jsonl").open("w") as lines, (output / "log.txt").open("wb") as log:
        for name in options.parts:
            seconds = min(options.limit * PARTS[name].limit, end - time.monotonic())
            results.append(run(name, seconds, output, log, cpu=options.cpu))
            line = json.dumps(results[-1])
            print(line, flush=True)
            print(line, file=lines, flush=True)
    sys.path.insert(0, str(pathlib.Path(__file__).parent))
    text = importlib.import_module("gpu_parts.tables").render(results)
    (output / "tables.md").write_text(text)
    print(f"\n{text}\n{output} has these tables, the results and what the parts printed")
    return 0 if all(result["status"] in ("ok", "skipped") for result in results) else 1


def run(name, limit, output, log, *, cpu):
    """Run a part as a process of its own, in so many seconds at most, and return its result."""
    if limit <= 0:
        why = f"the {SECONDS:g} s of all parts are over: --limit=2 doubles them, --parts chooses"
        return result_of(name, "left out", 0.0, 0.0, why, {})
    begin = time.monotonic()
    log.write(f"==== {name}\n".encode())
    log.flush()
    n_before = log.tell()
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        values = pathlib.Path(folder, "values.jsonl")
        values.touch()
        command = [sys.executable, __file__, "--worker", name, str(values), folder]
        process = subprocess.Popen(
            [*command, *(["--cpu"] if cpu else [])],
            env=environment(PARTS[name], output, cpu=cpu),
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with all that it started
            process.wait()
        found = {}
        for line in values.read_text().splitlines(keepends=True):
            found |= json.loads(line) if line.endswith("\n") else {}  # cut off by the time limit
    printed = pathlib.Path(log.name).read_bytes()[n_before:].decode(errors="replace").split("\n")
    last = next((line for line in reversed(printed) if line.strip()), "it printed nothing")
    status, why = outcome(status, found, limit, last[:300])
    return result_of(name, status, time.monotonic() - begin, limit, why, found)


def result_of(name, status, seconds, limit, why, values):
    """Return the result of a part as it is written."""
    result = {"part": name, "status": status, "seconds": round(seconds, 1), "limit": round(limit)}
    return result | ({"why": why} if why else {}) | {"values": values}


def outcome(status, found, limit, last_line):
    """Return how a part ended, and why if not well, from its exit status (None: it did not)."""
    if status is None:
        return "timeout", f"it had not ended after {limit:.3g} s: --limit=2 doubles the time"
    if status < 0:
        return "failed", f"ended by {signal.Signals(-status).name}: {last_line}"
    if status:
        return "failed", found.pop("error", f"exit status {status}: {last_line}")
    if "skipped" in found:
        return "skipped", found.pop("skipped")
    wrong = [name for name, value in found.items() if not passes(value)]
    return ("wrong", f"not within its limit: {', '.join(wrong)}") if wrong else ("ok", "")


def passes(value):
    """Return whether what was found is no check, or a check whose error is within its limit."""
    if not isinstance(value, dict) or "limit" not in value:
        return True
    return isinstance(value["error"], int | float) and value["error"] <= value["limit"]


def environment(part, output, *, cpu):
    """Return the variables of a part's process; a run's own settings come from the project."""
    paths = [str(REPOSITORY), str(REPOSITORY / "tests"), os.environ.get("PYTHONPATH", "")]
    variables = {
        "JAX_COMPILATION_CACHE_DIR": str(output / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONUNBUFFERED": "1",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {part.xla_flags}".strip(),
        **dict(part.variables),
    }
    return variables | ({"JAX_PLATFORMS": "cpu"} if cpu else {})


def work(name, values, folder, *, tiny):
    """Do a part in this process; each dictionary that it yields is written at once."""
    part = PARTS[name]
    module, function = part.function.split(".")
    task = Task(part.args, pathlib.Path(folder, "work"), tiny)
    task.folder.mkdir()
    with pathlib.Path(values).open("a") as lines:
        try:
            for found in getattr(importlib.import_module(f"gpu_parts.{module}"), function)(task):
                print(json.dumps(plain(found)), file=lines, flush=True)
        except Exception as error:
            first = next(iter(str(error).splitlines()), "")
            print(json.dumps({"error": f"{type(error).__name__}: {first}"}), file=lines, flush=True)
            raise
    return 0


def plain(value):
    """Return a value as JSON can hold it: numbers with 4 digits, and neither NaN nor None."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, bool | str | int):
        return value
    return float(f"{value:.4g}") if math.isfinite(value) else str(float(value))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
