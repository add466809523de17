"""What figures are drawn from: runs of this package, and JSON that says of which commit."""

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys

FOLDER = pathlib.Path(__file__).parent
REPOSITORY = FOLDER.parents[1]
DATA = FOLDER / "data"
RESULTS = ("docs/figures/data", "docs/figures/*.svg")  # what the scripts write


def main(name, measure, draw):
    """Measure and draw a figure, or draw it again from the data that are there."""
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__.splitlines()[0])
    parser.add_argument("--draw", action="store_true", help="draw only, from the data here")
    if not parser.parse_args().draw:
        begun = source()  # the files may change while it measures
        write(name, {"source": begun} | measure())
    draw(read(name), FOLDER)
    print(f"wrote {(FOLDER / name).with_suffix('.svg')}")


def write(name, data):
    """Write the data of a figure, a field on a line."""
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in data.items()]
    (DATA / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def read(name):
    """Return the data of a figure."""
    return json.loads((DATA / f"{name}.json").read_text())


def source():
    """Return what was measured, when and where."""
    return {
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "jax": importlib.metadata.version("jax"),
        "machine": f"{os.cpu_count()} cores, {cpu_name()}",
    }


def commit():
    """Return the commit of the code here; "+" follows it where files differ from it."""
    others = [f":!{path}" for path in RESULTS]
    differs = git("status", "--porcelain", "--", ".", *others)
    return git("rev-parse", "--short=10", "HEAD") + ("+" if differs else "")


def git(*args):
    """Return what git prints in this repository."""
    command = ["git", "-C", str(REPOSITORY), *args]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def cpu_name():
    """Return the processor's name where Linux tells it."""
    file = pathlib.Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def run(module, *args, folder):
    """Run `python -m module` with arguments from a folder.

    Raises:
        SystemExit: it failed; the message is what it printed last.
    """
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(REPOSITORY / ".cache" / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, args)],
        cwd=folder, capture_output=True, text=True, check=False,
        env=os.environ | cache | {"PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{module} failed: {done.stdout[-2000:]}{done.stderr[-2000:]}")


def losses(folder, name="loss"):
    """Return the losses that the log of a run has, in the order of its steps."""
    lines = (pathlib.Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [record[name] for record in map(json.loads, lines) if name in record]
