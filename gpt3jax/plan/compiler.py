"""Compiles a config's true training step for GPUs that are not here, in a process of its own.

`compile_step` starts that process, because XLA reads its options once, when JAX starts; a cache
keeps its answers. `python -m gpt3jax.plan.compiler` is the process, and reads a request from its
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
from typing import Any, TypedDict

import jax
import jax.experimental.topologies
import numpy as np
from jax.sharding import AxisType

from gpt3jax import errors, step
from gpt3jax.config import batch_schedule, recipe, schema
from gpt3jax.hardware import gpus, xla_flags
from gpt3jax.model import cudnn_attention, triton_attention
from gpt3jax.plan import buffer_assignment, hlo
from gpt3jax.sharding import meshes

_PLUGINS = ("jax-cuda13-plugin", "jax-cuda12-plugin")
# Groups of a config that do not change the program.
_ELSEWHERE = ("checkpoint.", "log.", "distributed.")
# Variables of the compiling process, whatever the user's own environment says.
_FIXED = {
    "JAX_PLATFORMS": "cpu",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # there is no driver, and none is needed
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "JAX_TRACEBACK_FILTERING": "off",  # else errors end with advice on tracebacks
}
# Needed by jax 0.10 to keep kernels; 0.12 has no such option, and keeps them.
_KEEPS_KERNELS = "xla_gpu_enable_llvm_module_compilation_parallelism"
_MOST_KERNELS = 100_000_000  # bytes of compiled kernels that are kept; a program has about 1 MB
_PACKAGES = ("gpt3jax", "jax", "jaxlib", "flax", "optax", "jax-triton", "triton", *_PLUGINS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """A compiled step; bytes are those of one GPU."""

    argument_bytes: int
    """Bytes of the state and the batch."""
    temp_bytes: int
    """Bytes of everything else that is alive at the peak."""
    peak_bytes: int
    attention: str
    """The implementation of attention: cudnn, triton or xla."""
    largest_buffers: list[buffer_assignment.Buffer]
    """The largest temporary arrays."""
    fused_attention: dict[str, bool]
    """Whether cuDNN's kernels are in the program: forward, backward."""
    compile_seconds: float
    """Seconds of tracing, lowering and compiling."""
    host_bytes: int
    """The most memory that the compiling process held."""
    versions: dict[str, str]
    cached: bool
    """Whether it comes from the cache; `compile_seconds` are then those of the first time."""
    text: str
    """The optimised, scheduled program."""
    program: hlo.Program
    """The parsed text."""


class _Step(TypedDict):
    """The step to compile, as JSON."""

    args: list[str]
    """The command line of the recipe."""
    axis_sizes: dict[str, int]
    target: str
    """The GPU, as `gpus.target_text` describes it."""
    capability: tuple[int, int]
    gpus_per_node: int


class _Request(_Step):
    """A request to the compiling process."""

    out: str
    """The file for its answer."""
    dump: str
    """The folder for XLA's dumps."""


class _Answer(TypedDict):
    """The answer of the compiling process, and a file of the cache; fields as in `Compiled`."""

    argument_bytes: int
    temp_bytes: int
    peak_bytes: int
    attention: str
    compile_seconds: float
    host_bytes: int
    versions: dict[str, str]
    hlo: str
    """The program's text."""
    largest_buffers: list[dict[str, Any]]
    """Fields of `buffer_assignment.Buffer`."""


def missing_extra() -> str:
    """Return why there is no compiler for GPUs and how to install it, "" if it is installed."""
    installed = versions()
    plugins = [installed[name] for name in _PLUGINS if name in installed]
    if installed["jax"] in plugins:
        return ""
    if sys.platform != "linux":
        return f"the compiler for GPUs exists for Linux only, not for {sys.platform}"
    reason = f"jax {installed['jax']} needs a CUDA plugin of its version"
    reason += f", not {' or '.join(plugins)}" if plugins else ", and none is installed"
    return f"{reason}: pip install -e '.[plan]'"


def versions() -> dict[str, str]:
    """Return the versions of the packages that decide the program, as far as installed."""
    installed = {}
    for name in _PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def compile_step(
    cfg: schema.Config, args: list[str], axis_sizes: dict[str, int], gpu: gpus.Gpu,
    network: gpus.Network,
) -> Compiled:  # fmt: skip
    """Compile the step of the command line `args`, or read it from the cache.

    `cfg` is the config of `args`; `axis_sizes` are the sizes of its mesh, none of them -1.

    Raises:
        UserError: the model does not fit the mesh, XLA does not know an option of the user's, the
            compiler failed, or no folder can be written to.
    """
    environment = _environment()
    wanted: _Step = {
        "args": args,
        "axis_sizes": axis_sizes,
        "target": gpus.target_text(gpu),
        "capability": gpu.capability,
        "gpus_per_node": network.gpus_per_node,
    }
    file = _cache_folder() / f"{_key(cfg, wanted, environment)}.json.gz"
    answer = _read(file)
    cached = answer is not None
    if answer is None:
        xla_flags.check(environment["XLA_FLAGS"])
        _run(wanted, environment, file)
        answer = _read(file)
        assert answer is not None, f"{file} was just written"
    return _compiled(answer, cached=cached)


def _environment() -> dict[str, str]:
    """Return the variables that the compiling process gets, the user's own among them.

    A run's own settings are not there: `step.build` gives them to the program.
    """
    flags = f"{xla_flags.text(xla_flags.of_plan())} {os.environ.get('XLA_FLAGS', '')}".strip()
    of_user = {name: value for name, value in os.environ.items() if name.startswith("JAX_")}
    return {**of_user, **_FIXED, "XLA_FLAGS": flags}  # XLA takes the last of each option


def _key(cfg: schema.Config, wanted: _Step, environment: dict[str, str]) -> str:
    """Return a digest of everything that decides the program."""
    fields = {k: v for k, v in schema.flatten(cfg).items() if not k.startswith(_ELSEWHERE)}
    target = [wanted["axis_sizes"], wanted["target"], wanted["gpus_per_node"]]
    described = [fields, target, environment, versions(), _sources()]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:32]


def _read(file: pathlib.Path) -> _Answer | None:
    """Return the content of a file of the cache; None where it is missing or damaged."""
    content = _unpacked(file)
    return json.loads(content) if content else None


def _unpacked(file: pathlib.Path) -> bytes:
    """Return the content of a file of the cache; nothing where it is missing or damaged."""
    try:
        return gzip.decompress(file.read_bytes())
    except (OSError, EOFError, zlib.error):
        return b""


def _compiled(answer: _Answer, *, cached: bool) -> Compiled:
    return Compiled(
        argument_bytes=answer["argument_bytes"],
        temp_bytes=answer["temp_bytes"],
        peak_bytes=answer["peak_bytes"],
        attention=answer["attention"],
        largest_buffers=[
            buffer_assignment.Buffer(**buffer) for buffer in answer["largest_buffers"]
        ],
        fused_attention=hlo.fused_attention(answer["hlo"]),
        compile_seconds=answer["compile_seconds"],
        host_bytes=answer["host_bytes"],
        versions=answer["versions"],
        cached=cached,
        text=answer["hlo"],
        program=hlo.parse(answer["hlo"]),
    )


def main() -> int:
    """Answer the request on standard input; the exit status is 2 for errors a user can fix."""
    request: _Request = json.load(sys.stdin)
    try:
        answer = _compile(request)
    except errors.UserError as error:
        sys.stderr.write(f"{json.dumps([error.message, error.page])}\n")
        return errors.REFUSED
    file = pathlib.Path(request["out"])
    file.write_bytes(gzip.compress(json.dumps(answer).encode(), compresslevel=3))
    return 0


def _compile(request: _Request) -> _Answer:
    started = time.monotonic()
    major, minor = request["capability"]
    cudnn_attention.assume_gpu((major, minor), gpus.CUDNN)
    triton_attention.assume_gpu((major, minor))
    cfg = recipe.parse(request["args"])
    mesh = target_mesh(request["target"], request["axis_sizes"], request["gpus_per_node"])
    schedule = batch_schedule.from_config(cfg.batch, cfg.model.seq_len)
    _, run_samples = schedule.end(cfg.train, cfg.model.seq_len)
    program = step.build(cfg, mesh, run_samples)
    with jax.set_mesh(mesh):
        args = step.abstract_args(program, cfg, cfg.batch.global_batch_size)
        traced = program.train.jitted.trace(*args)
        compiled = traced.lower(lowering_platforms=("cuda",)).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    # The largest report is the step's: other programs that were compiled have their own.
    dumped = pathlib.Path(request["dump"]).glob("*optimizations-buffer-assignment.txt")
    reports = sorted(dumped, key=lambda file: file.stat().st_size)
    largest = buffer_assignment.largest(reports[-1].read_text(), text) if reports else []
    return {
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "peak_bytes": memory.peak_memory_in_bytes,
        "attention": program.compute.attention,
        "compile_seconds": time.monotonic() - started,
        "host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "versions": versions(),
        "hlo": text,
        "largest_buffers": [dataclasses.asdict(buffer) for buffer in largest],
    }


def target_mesh(target: str, axis_sizes: dict[str, int], gpus_per_node: int) -> jax.sharding.Mesh:
    """Return a mesh of GPUs that are not there; `target` is the text of `gpus.target_text`."""
    sizes = [axis_sizes[axis] for axis in meshes.AXES]
    n_gpus = int(np.prod(sizes))
    per_node = min(n_gpus, gpus_per_node)
    topology = jax.experimental.topologies.get_topology_desc(
        platform="cuda", target_config=target, topology=f"1x{n_gpus // per_node}x{per_node}"
    )
    devices: np.ndarray = np.array(topology.devices).reshape(sizes)
    return jax.sharding.Mesh(devices, meshes.AXES, axis_types=(AxisType.Auto,) * len(sizes))


def _run(wanted: _Step, environment: dict[str, str], file: pathlib.Path) -> None:
    """Run the compiling process; its answer appears under the file's name only when complete."""
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        request: _Request = {**wanted, "out": f"{folder}/answer", "dump": f"{folder}/dump"}
        # Kernels that programs share. Each process has a copy: XLA expects no other writer.
        capability = "".join(map(str, wanted["capability"]))
        shared = file.parent / f"kernels_{versions()['jaxlib']}_sm{capability}.gz"
        kernels = pathlib.Path(folder, "kernels")
        known = _unpacked(shared)  # XLA would fail on a file that is damaged
        if 0 < len(known) < _MOST_KERNELS:  # else it begins anew
            kernels.write_bytes(known)
        flags = (
            f"{environment['XLA_FLAGS']} --xla_dump_to={_quoted(request['dump'])}"
            f" --xla_gpu_kernel_cache_file={_quoted(str(kernels))}"
        )
        if xla_flags.is_known(_KEEPS_KERNELS):
            flags += f" --{_KEEPS_KERNELS}=true"
        done = subprocess.run(
            [sys.executable, "-m", "gpt3jax.plan.compiler"],
            input=json.dumps(request), text=True, errors="replace", capture_output=True,
            env={**os.environ, **environment, "XLA_FLAGS": flags},
        )  # fmt: skip
        if done.returncode:
            raise _failure(done.returncode, done.stderr)
        os.replace(request["out"], file)
        if kernels.exists():
            packed = pathlib.Path(folder, "packed")
            packed.write_bytes(gzip.compress(kernels.read_bytes(), compresslevel=1))
            os.replace(packed, shared)


def _quoted(text: str) -> str:
    """Return a value as XLA_FLAGS needs it: in quotes that it does not contain (none escape)."""
    quote = '"' if "'" in text else "'"
    return f"{quote}{text}{quote}"


def _failure(status: int, stderr: str) -> errors.UserError:
    """Return why the compiling process ended: what `main` said, or its signal and last error."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()] or ["no message"]
    if status == errors.REFUSED:
        message, page = json.loads(lines[-1])
        return errors.UserError(message, page=page)
    fatal = re.compile(r"F\d{4} |[A-Za-z_][\w.]*(Error|Exception)\b.*:")  # XLA's, Python's
    error = next((line for line in reversed(lines) if fatal.match(line)), lines[-1])
    reason = "the compiler failed"
    if status < 0:
        name = signal.Signals(-status).name
        hint = " (is there too little memory?)" if name == "SIGKILL" else ""
        reason = f"the compiler was ended by {name}{hint}"
    return errors.UserError(f"{reason}: {error}", page="plan.md#where-the-figures-come-from")


def _sources() -> str:
    """Return a digest of the package's own code, which may change under one version."""
    package = pathlib.Path(__file__).parent.parent
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _cache_folder() -> pathlib.Path:
    """Make and return the folder of compiled steps: the user's, else a temporary one.

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
        "compiled steps",
        page="plan.md",
    )


if __name__ == "__main__":
    sys.exit(main())
