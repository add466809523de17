"""Options of XLA and CUDA for training steps on GPUs, each with its reason; of plans, and of CPUs.

A step's options go with its program (`jax.jit`'s `compiler_options`), as they depend on the layout.
Others must be in the environment before JAX starts. What the user gives there wins. Imports no JAX.
"""

import contextlib
import dataclasses
import difflib
import functools
import importlib.util
import mmap
import pathlib
import re
from collections.abc import Collection, Iterator, Mapping
from typing import TypeAlias

from gpt3jax import errors
from gpt3jax.hardware import gpus

Value: TypeAlias = bool | int | str
Options: TypeAlias = dict[str, Value]


@dataclasses.dataclass(frozen=True)
class Setting:
    """An option of XLA, and why it is set."""

    name: str
    value: Value
    reason: str
    variable: str = ""
    """The variable of JAX that sets the same."""


MEMORY_FRACTION = 0.92
"""The allocator's share of a GPU (JAX: 0.75). The rest, 6.3 GiB of an H100, is for CUDA's context,
NCCL's buffers and library handles."""
# JAX's variables for it, the newer one first; it refuses both at once.
_FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
BLACKWELL = (10, 0)
_QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS"
"""How many queues a GPU takes kernels from. With one, up to Hopper, a collective that is launched
before a product starts before it, and both overlap; from several queues the product may take all
multiprocessors first. Blackwell gives them to streams of higher priority at once, and is slower
with one queue (NVIDIA's JAX-Toolbox)."""


def of_step(
    capability: tuple[int, int],
    n_stages: int,
    state_share: float = 0.0,
    *,
    deterministic: bool = False,
) -> tuple[Setting, ...]:
    """Return the settings of a step on GPUs of this compute capability, and so many stages.

    `state_share` is the part of a GPU's memory that the state takes.
    """
    return (
        Setting(
            "xla_disable_hlo_passes",
            "rematerialization",
            "XLA counts saved activations twice, and so gathers weights again that it still has; "
            "model.remat decides what is recomputed, and the plan says whether it fits",
            variable="JAX_COMPILER_ENABLE_REMAT_PASS",
        ),
        Setting(
            "xla_gpu_enable_latency_hiding_scheduler",
            True,
            "starts collectives early and runs arithmetic meanwhile",
        ),
        Setting(
            "xla_gpu_memory_limit_slop_factor",
            _slop_factor(state_share),
            "percent of what the step's arguments leave of 80% of the GPU: the scheduler may use "
            "what the allocator has. With XLA's own 95 it saves memory from 60 GiB of an H100 on, "
            "and exposes communication",
        ),
        _estimator(capability),
        _command_buffers(capability),
        *(_without_stages() if n_stages == 1 else ()),
        *((_DETERMINISTIC,) if deterministic else ()),
    )


# Not xla_gpu_deterministic_ops, which forbids autotuning too: its choices are kept with the run.
_DETERMINISTIC = Setting(
    "xla_gpu_exclude_nondeterministic_ops",
    True,
    "asks cuDNN for sums in one order, and refuses a program that could not keep to one",
)


def _slop_factor(state_share: float) -> int:
    """Return the percentage by which XLA's limit becomes the allocator's memory, less the state."""
    held = min(state_share, 0.7)  # with more no step fits
    return int(100 * (MEMORY_FRACTION - held) / (0.8 - held))


def _estimator(capability: tuple[int, int]) -> Setting:
    name = "xla_gpu_enable_analytical_sol_latency_estimator"
    if capability < (9, 0):
        return Setting(name, False, "XLA has tables for it from Hopper on")
    reason = "estimates for the scheduler how long collectives and products take"
    return Setting(name, True, reason)


def _command_buffers(capability: tuple[int, int]) -> Setting:
    """Return which kernels are launched together, as CUDA graphs: XLA's default are most kinds.

    Both values are those of NVIDIA's JAX-Toolbox; neither was measured here.
    """
    name = "xla_gpu_enable_command_buffer"
    if capability < BLACKWELL:
        return Setting(
            name,
            "",
            "kernels of a large step take longer than their launch, so a graph saves nothing; it "
            "takes memory beside the allocator's, and time when buffers move",
        )
    return Setting(name, "FUSION,CUSTOM_CALL", "kernels are so short that launches are felt")


def _without_stages() -> tuple[Setting, ...]:
    return (
        Setting(
            "xla_gpu_experimental_parallel_collective_overlap_limit",
            4,
            "lets weights be gathered while another collective waits: with 1 they are gathered "
            "when they are needed",
        ),
        Setting(
            "optimization_level",
            19,  # O1
            "pipelines the collectives of the loop over layers, for 2 to 3 GiB; stages are slower "
            "with it, as it computes parts of a layer once more",
            variable="JAX_OPTIMIZATION_LEVEL",
        ),
    )


def compiler_options(
    capability: tuple[int, int] | None,
    n_stages: int,
    environment: Mapping[str, str],
    state_share: float = 0.0,
    *,
    deterministic: bool = False,
) -> Options:
    """Return the options to compile a step with: none where there is no GPU (None).

    `state_share` is the part of a GPU's memory that the state takes.
    Those that the user's environment gives, and those that this XLA does not have, are left out.
    """
    settings: tuple[Setting, ...] = ()
    if capability:
        settings = of_step(capability, n_stages, state_share, deterministic=deterministic)
    given = {*_names(environment.get("XLA_FLAGS", "")), *environment}
    unknown = _unknown(tuple(s.name for s in settings if s.name.startswith("xla_")))
    return {
        setting.name: setting.value
        for setting in settings
        if not given & {setting.name, setting.variable} and setting.name not in unknown
    }


def of_process() -> tuple[Setting, ...]:
    """Return what must be in XLA_FLAGS before JAX starts: a map, which no program can be given."""
    network = gpus.network_of(gpus.GPUS["h100"])  # that of all GPUs that have the estimator
    return (
        Setting(
            "xla_gpu_analytical_latency_estimator_options",
            f"nic_speed_gbps={network.nic_bandwidth / 1e9:g},nccl_op_launch_us=20,rtt_us=4,"
            f"chunk_prep_us=1,gpus_per_node={network.gpus_per_node}",
            "the network's rate: XLA assumes 25 GB/s, half of 400 Gb/s InfiniBand",
        ),
    )


def of_plan() -> tuple[Setting, ...]:
    """Return what is in XLA_FLAGS where a run's step is compiled without a GPU."""
    return (
        *of_process(),
        Setting(
            "xla_gpu_enable_triton_gemm",
            False,
            "without a GPU nothing is autotuned, and an untuned Triton tile would replace cuBLASLt",
        ),
        Setting(
            "xla_gpu_collect_cost_model_stats",
            True,
            "writes XLA's estimate of each kernel's time into the program; changes nothing else",
        ),
    )


def variables(
    environment: Mapping[str, str], capabilities: Collection[tuple[int, int]] = ()
) -> dict[str, str]:
    """Return the variables that a run on GPUs adds to the environment before JAX starts.

    `capabilities` are those of this machine's GPUs, as far as they are known.
    """
    flags = environment.get("XLA_FLAGS", "")
    new = text(tuple(setting for setting in of_process() if is_known(setting.name)))
    added = {"XLA_FLAGS": f"{new} {flags}".strip()}  # XLA takes the last of each option
    if not any(environment.get(name) for name in _FRACTIONS):
        added[_FRACTIONS[0]] = str(MEMORY_FRACTION)
    if capabilities and max(capabilities) < BLACKWELL and not environment.get(_QUEUES):
        added[_QUEUES] = "1"
    return added


def for_equal_weights(platform: str) -> Options:
    """Return the compiler's options with which random weights do not depend on the mesh.

    On a CPU, LLVM's vector loops and the scalar loops that finish a row round `normal` differently
    (jaxlib 0.12), and the mesh decides where a row ends. Without optimization there is one loop.
    """
    return {"xla_backend_optimization_level": 0} if platform == "cpu" else {}


def text(settings: tuple[Setting, ...]) -> str:
    """Return options in the form of XLA_FLAGS."""
    return " ".join(f"--{setting.name}={str(setting.value).lower()}" for setting in settings)


def check(flags: str) -> None:
    """Check that this XLA knows all options in `flags`: it would abort without a hint.

    Raises:
        UserError: an option is unknown; the error names the nearest known ones.
    """
    for name in _unknown(_names(flags)):
        with _library() as code:
            known = {match.decode() for match in re.findall(rb"xla_[a-z0-9_]+(?=\0)", code)}
        near = difflib.get_close_matches(name, known, 3)
        hint = f"did you mean {' or '.join(near)}?" if near else "remove it"
        raise errors.UserError(
            f"XLA_FLAGS: this XLA has no option {name}: {hint}", page="plan.md#xlas-settings"
        )


def is_known(name: str) -> bool:
    """Return whether this XLA has an option, which depends on jaxlib's version."""
    return not _unknown((name,))


def _names(flags: str) -> tuple[str, ...]:
    return tuple(re.findall(r"--(xla_\w+)", flags))


@functools.cache
def _unknown(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return those of some options that this XLA does not have."""
    with _library() as code:
        return tuple(name for name in names if code and code.find(name.encode() + b"\0") < 0)


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
