"""`python -m gpt3jax.hardware.xla_flags --config=RECIPE.py ...`: print XLA's options for a run.

It prints lines for a shell: the options must be in the environment before JAX starts. Here stand
those for runs (`launch/`) and plans on GPUs, and one for CPUs, each with its reason. Imports no
JAX.
"""

import contextlib
import dataclasses
import difflib
import importlib.util
import mmap
import pathlib
import re
import shlex
import sys
from collections.abc import Iterator, Sequence

from gpt3jax import errors
from gpt3jax.config import command_line, recipe
from gpt3jax.hardware import gpus, nvidia_smi


@dataclasses.dataclass(frozen=True)
class Setting:
    """An option of XLA, or a variable of the environment, and why it is set."""

    name: str
    value: str
    reason: str


MEMORY_FRACTION = 0.92


def variables(n_stages: int) -> tuple[Setting, ...]:
    """Return the environment of a training run."""
    level = Setting(
        "JAX_OPTIMIZATION_LEVEL",
        "O1",
        "pipelines the collectives of the loop over layers, for 2 to 3 GiB",
    )
    return (
        Setting(
            "JAX_PLATFORMS",
            "cuda,cpu",
            "refuses a machine whose GPUs are not visible: by itself JAX would use its CPU",
        ),
        Setting(
            "XLA_PYTHON_CLIENT_MEM_FRACTION",
            str(MEMORY_FRACTION),
            "the allocator's share of the GPU (JAX: 0.75); the rest, 6.3 GiB of an H100, is "
            "for CUDA's context, NCCL's buffers and library handles",
        ),
        Setting(
            "JAX_COMPILER_ENABLE_REMAT_PASS",
            "false",
            "XLA counts saved activations twice, and so gathers weights again that it still has; "
            "model.remat decides what is recomputed, and the plan says whether it fits",
        ),
        # With stages it is slower: it computes parts of a layer once more.
        *([level] if n_stages == 1 else []),
    )


def of_run(gpu: gpus.Gpu, network: gpus.Network, n_stages: int) -> tuple[Setting, ...]:
    """Return the options of a training run on these GPUs and this network."""
    options = (
        f"nic_speed_gbps={network.nic_bandwidth / 1e9:g},nccl_op_launch_us=20,rtt_us=4,"
        f"chunk_prep_us=1,gpus_per_node={network.gpus_per_node}"
    )
    name = "xla_gpu_enable_analytical_sol_latency_estimator"
    no_estimator = Setting(name, "false", "XLA has tables for it from Hopper on")
    estimator = (
        Setting(name, "true", "estimates for the scheduler how long collectives and products take"),
        Setting(
            "xla_gpu_analytical_latency_estimator_options",
            options,
            "the network's rate: XLA assumes 25 GB/s, half of 400 Gb/s InfiniBand",
        ),
    )
    overlap = Setting(
        "xla_gpu_experimental_parallel_collective_overlap_limit",
        "4",
        "lets weights be gathered while another collective waits: with 1 they are gathered when "
        "they are needed",
    )
    return (
        Setting(
            "xla_gpu_enable_latency_hiding_scheduler",
            "true",
            "starts collectives early and runs arithmetic meanwhile",
        ),
        Setting(
            "xla_gpu_memory_limit_slop_factor",
            f"{100 * MEMORY_FRACTION / 0.8:.0f}",
            "percent of 80% of the GPU: the scheduler may use what the allocator has. With XLA's "
            "own 95 it saves memory from 60 GiB of an H100 on, and exposes communication",
        ),
        *(estimator if gpu.capability >= (9, 0) else (no_estimator,)),
        *([overlap] if n_stages == 1 else []),
    )


def of_plan(gpu: gpus.Gpu, network: gpus.Network, n_stages: int) -> tuple[Setting, ...]:
    """Return the options of compiling that run's step without a GPU."""
    return (
        *of_run(gpu, network, n_stages),
        Setting(
            "xla_gpu_enable_triton_gemm",
            "false",
            "without a GPU nothing is autotuned, and an untuned Triton tile would replace cuBLASLt",
        ),
        Setting(
            "xla_gpu_collect_cost_model_stats",
            "true",
            "writes XLA's estimate of each kernel's time into the program; changes nothing else",
        ),
    )


def for_equal_weights(platform: str) -> dict[str, int]:
    """Return the compiler's options with which random weights do not depend on the mesh.

    On a CPU, LLVM's vector loops and the scalar loops that finish a row round `normal` differently
    (jaxlib 0.12), and the mesh decides where a row ends. Without optimization there is one loop.
    """
    return {"xla_backend_optimization_level": 0} if platform == "cpu" else {}


def text(settings: tuple[Setting, ...]) -> str:
    """Return options in the form of XLA_FLAGS."""
    return " ".join(f"--{setting.name}={setting.value}" for setting in settings)


def check(flags: str) -> None:
    """Check that this XLA knows all options in `flags`: it would abort without a hint.

    Raises:
        UserError: an option is unknown; the error names the nearest known ones.
    """
    for name in re.findall(r"--(xla_\w+)", flags):
        if is_known(name):
            continue
        with _library() as code:
            known = {match.decode() for match in re.findall(rb"xla_[a-z0-9_]+(?=\0)", code)}
        near = difflib.get_close_matches(name, known, 3)
        hint = f"did you mean {' or '.join(near)}?" if near else "remove it"
        raise errors.UserError(
            f"XLA_FLAGS: this XLA has no option {name}: {hint}", page="plan.md#xlas-settings"
        )


def is_known(name: str) -> bool:
    """Return whether this XLA has an option, which depends on jaxlib's version."""
    with _library() as code:
        return not code or code.find(name.encode() + b"\0") >= 0


@contextlib.contextmanager
def _library() -> Iterator[mmap.mmap | bytes]:
    """Open jaxlib's library, which has the names of all options; empty where it is not found."""
    spec = importlib.util.find_spec("jaxlib")
    folder = pathlib.Path(spec.origin).parent if spec and spec.origin else None
    library = folder / "libjax_common.so" if folder else None
    if library is None or not library.exists():
        yield b""
        return
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as code:
        yield code


def _gpu_here() -> gpus.Gpu:
    """Return this machine's kind of GPU; an H100 where it is unknown or of another kind."""
    names = str(nvidia_smi.query("name")).lower()
    return next((gpu for name, gpu in gpus.GPUS.items() if name in names), gpus.GPUS["h100"])


def main(args: Sequence[str] | None = None) -> int:
    """Print, for a shell, the settings of a run on this machine; variables already set win.

    The shell runs what it reads, so nothing else goes to standard output: neither `--help` nor what
    a recipe prints.
    """

    def print_settings() -> None:
        with contextlib.redirect_stdout(sys.stderr):
            cfg = recipe.parse(sys.argv[1:] if args is None else args)
        if cfg.mesh.stage == -1:
            raise errors.UserError(
                "mesh.stage=-1: XLA's settings depend on the stages, whose number is not known "
                "yet; give it",
                page="plan.md#xlas-settings",
            )
        gpu, n_stages = _gpu_here(), cfg.mesh.stage
        flags = text(of_run(gpu, gpus.network_of(gpu), n_stages))
        lines = [f'export XLA_FLAGS={shlex.quote(flags)}" ${{XLA_FLAGS:-}}"']
        for variable in variables(n_stages):
            name, value = variable.name, variable.value
            lines.append(f'export {name}="${{{name}:-{value}}}"')
        sys.stdout.write("\n".join(lines) + "\n")

    return command_line.run(print_settings)


if __name__ == "__main__":
    sys.exit(main())
