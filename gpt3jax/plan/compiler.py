"""Compiling a config's true training step for GPUs that are not here, in a process of its own.

`compile_step` starts that process (XLA reads its options once, when JAX starts) and keeps what it
found in a cache. `python -m gpt3jax.plan.compiler` is the process; it takes a request on its
standard input. Needs the extra `plan`. Nothing is allocated: the step is compiled from shapes.
"""

import dataclasses
import gzip
import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from typing import Any

import jax
import jax.experimental.topologies
import numpy as np
from jax.sharding import AxisType

from gpt3jax import errors, step
from gpt3jax.config import batch_schedule, recipe, schema
from gpt3jax.hardware import gpus, xla_flags
from gpt3jax.model import cudnn_attention
from gpt3jax.plan import buffers, hlo
from gpt3jax.sharding import meshes

_PLUGINS = ("jax-cuda13-plugin", "jax-cuda12-plugin")
# Groups of a config that do not change the program.
_ELSEWHERE = ("checkpoint.", "log.", "distributed.")
# What the compiling process is given, whatever the user's own environment says.
_ALONE = {
    "JAX_PLATFORMS": "cpu",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # there is no driver, and none is needed
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "JAX_TRACEBACK_FILTERING": "off",  # else an error ends with advice on its traceback
}
_PACKAGES = ("gpt3jax", "jax", "jaxlib", "flax", "optax", *_PLUGINS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """What XLA made of the step; bytes are of one GPU."""

    argument_bytes: int
    """The state and the batch."""
    temp_bytes: int
    """All else that is alive at the peak."""
    peak_bytes: int
    attention: str
    """What attention runs on: cudnn or xla."""
    largest_buffers: list[dict[str, Any]]
    """Temporary arrays, as `buffers.Buffer`."""
    cudnn: dict[str, bool]
    """Whether cuDNN's kernels are in the program: forward, backward."""
    compile_seconds: float
    """Tracing, lowering and compiling."""
    host_bytes: int
    """The most memory that the compiling process held."""
    versions: dict[str, str]
    cached: bool
    """Taken from the cache; `compile_seconds` are then of the time it was made."""
    text: str
    """The optimised, scheduled program."""
    program: hlo.Program
    """The same, read."""


def missing_extra() -> str:
    """Return what to do where the compiler for GPUs is not installed, "" where it is."""
    installed = versions()
    found = [installed[name] for name in _PLUGINS if name in installed]
    if found and installed["jax"] in found:
        return ""
    if sys.platform != "linux":
        return f"the compiler for GPUs is there for Linux only, not for {sys.platform}"
    have = f"jax {installed['jax']} needs a CUDA plugin of its version"
    have += f", not {' or '.join(found)}" if found else ", and there is none"
    return f"{have}: pip install -e '.[plan]'"


def compile_step(
    cfg: schema.Config, args: list[str], axis_sizes: dict[str, int], gpu: gpus.Gpu,
    network: gpus.Network,
) -> Compiled:  # fmt: skip
    """Compile the step of the command line `args`, or find it in the cache.

    `cfg` is what `recipe.parse` makes of `args`; `axis_sizes` are its mesh's, none of them -1.

    Raises:
        UserError: the model does not fit the mesh, XLA does not know an option of the user's, the
            compiler failed, or no folder can be written to.
    """
    n_stages = axis_sizes["stage"]
    flags = xla_flags.text(xla_flags.of_plan(gpu, network, n_stages))
    flags = f"{flags} {os.environ.get('XLA_FLAGS', '')}".strip()  # a run's user has the last word
    variables = {one.name: one.value for one in xla_flags.variables(n_stages)}
    variables |= {name: value for name, value in os.environ.items() if name.startswith("JAX_")}
    variables |= _ALONE
    request = {
        "args": args,
        "axis_sizes": axis_sizes,
        "target": gpus.target_text(gpu),
        "capability": gpu.capability,
        "gpus_per_node": network.gpus_per_node,
    }
    file = _cache_folder() / f"{_key(cfg, request, flags, variables)}.json.gz"
    found = _read(file)
    cached = found is not None
    if found is None:
        xla_flags.check(flags)
        _run(request, {**variables, "XLA_FLAGS": flags}, file)
        found = _read(file)
        assert found is not None, f"{file} was just written"
    text = found.pop("hlo")
    cudnn = hlo.cudnn_attention(text)
    return Compiled(text=text, program=hlo.parse(text), cudnn=cudnn, cached=cached, **found)


def _key(cfg: schema.Config, request: dict[str, Any], flags: str, variables: dict[str, str]) -> str:
    """Return a digest of all that decides the program."""
    fields = {k: v for k, v in schema.flatten(cfg).items() if not k.startswith(_ELSEWHERE)}
    target = [request[name] for name in ("axis_sizes", "target", "gpus_per_node")]
    described = [fields, target, flags, variables, versions(), _sources()]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:32]


def _read(file: pathlib.Path) -> dict[str, Any] | None:
    """Return what a file of the cache holds; None where it is missing or damaged."""
    try:
        return json.loads(gzip.decompress(file.read_bytes()))
    except (OSError, EOFError, ValueError, zlib.error):
        return None


def main() -> int:
    """Answer the request on standard input; the exit status is 2 for what a user can mend."""
    request = json.load(sys.stdin)
    try:
        answer = _compile(request)
    except errors.UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    file = pathlib.Path(request["out"])
    file.write_bytes(gzip.compress(json.dumps(answer).encode(), compresslevel=3))
    return 0


def _compile(request: dict[str, Any]) -> dict[str, Any]:
    started = time.monotonic()
    cudnn_attention.assume_gpu(tuple(request["capability"]), gpus.CUDNN)
    cfg = recipe.parse(request["args"])
    mesh = _target_mesh(request["target"], request["axis_sizes"], request["gpus_per_node"])
    schedule = batch_schedule.from_config(cfg.batch, cfg.model.seq_len)
    _, run_samples = schedule.end(cfg.train, cfg.model.seq_len)
    program = step.build(cfg, mesh, run_samples)
    with jax.set_mesh(mesh):
        args = step.abstract_args(program, cfg, cfg.batch.global_batch_size)
        traced = program.train.jitted.trace(*args)
        compiled = traced.lower(lowering_platforms=("cuda",)).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    # The step's is the largest: what else was compiled on the way has its own.
    dumped = pathlib.Path(request["dump"]).glob("*optimizations-buffer-assignment.txt")
    reports = sorted(dumped, key=lambda file: file.stat().st_size)
    found = buffers.largest(reports[-1].read_text(), text) if reports else []
    return {
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "peak_bytes": memory.peak_memory_in_bytes,
        "attention": program.compute.attention,
        "compile_seconds": time.monotonic() - started,
        "host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "versions": versions(),
        "hlo": text,
        "largest_buffers": [dataclasses.asdict(one) for one in found],
    }


def _target_mesh(target: str, axis_sizes: dict[str, int], gpus_per_node: int) -> jax.sharding.Mesh:
    sizes = [axis_sizes[axis] for axis in meshes.AXES]
    n_gpus = int(np.prod(sizes))
    per_node = min(n_gpus, gpus_per_node)
    topology = jax.experimental.topologies.get_topology_desc(
        platform="cuda", target_config=target, topology=f"1x{n_gpus // per_node}x{per_node}"
    )
    devices: Any = np.array(topology.devices).reshape(sizes)
    return jax.sharding.Mesh(devices, meshes.AXES, axis_types=(AxisType.Auto,) * len(sizes))


def _run(request: dict[str, Any], settings: dict[str, str], file: pathlib.Path) -> None:
    """Run the compiling process; its answer appears under the file's name only when whole."""
    environment = {**os.environ, **settings}
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        request = {**request, "out": f"{folder}/answer", "dump": f"{folder}/dump"}
        environment["XLA_FLAGS"] += f" --xla_dump_to={_quoted(request['dump'])}"
        done = subprocess.run(
            [sys.executable, "-m", "gpt3jax.plan.compiler"],
            input=json.dumps(request), text=True, errors="replace", capture_output=True,
            env=environment,
        )  # fmt: skip
        if done.returncode:
            raise errors.UserError(_failure(done.returncode, done.stderr))
        os.replace(request["out"], file)


def _quoted(text: str) -> str:
    """Return a value as XLA_FLAGS must have it: in quotes that it does not hold (none escape)."""
    quote = '"' if "'" in text else "'"
    return f"{quote}{text}{quote}"


def _failure(status: int, stderr: str) -> str:
    """Return in one line why the compiling process ended: its signal, the error it printed last."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()] or ["no message"]
    if status == 2:  # `main`
        return lines[-1]
    fatal = re.compile(r"F\d{4} |[A-Za-z_][\w.]*(Error|Exception)\b.*:")  # XLA's, Python's
    said = next((line for line in reversed(lines) if fatal.match(line)), lines[-1])
    if status > 0:
        return f"the compiler failed: {said}"
    name = signal.Signals(-status).name
    hint = " (is there too little memory?)" if name == "SIGKILL" else ""
    return f"the compiler was ended by {name}{hint}: {said}"


def versions() -> dict[str, str]:
    """Return the versions of what decides the program, as far as installed."""
    installed = {}
    for name in _PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def _sources() -> str:
    """Return a digest of the package's own code, which may change under one version."""
    package = pathlib.Path(__file__).parent.parent
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _cache_folder() -> pathlib.Path:
    """Return the folder of compiled steps, made: the user's, or where that cannot be, a temporary.

    Raises:
        UserError: neither can be written.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    temporary = f"{tempfile.gettempdir()}/gpt3jax-{os.getuid()}"
    for folder in (pathlib.Path(home, "gpt3jax", "plan"), pathlib.Path(temporary, "plan")):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError:
            continue
    raise errors.UserError(
        f"{home} cannot be written, nor can {temporary}: set XDG_CACHE_HOME to a folder for "
        "compiled steps"
    )


if __name__ == "__main__":
    sys.exit(main())
