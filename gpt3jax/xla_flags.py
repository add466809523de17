"""XLA's options for GPUs, each with its reason: for a run (`launch/`) and for a plan.

`python -m gpt3jax.xla_flags` prints those of a run. Imports no JAX: they must be in the environment
(XLA_FLAGS) before JAX starts.
"""

import dataclasses
import sys

from gpt3jax import gpus

# Share of the GPU that JAX's allocator takes (XLA_PYTHON_CLIENT_MEM_FRACTION; JAX's own is 0.75).
# What is left, 6.3 GiB of an H100, is for CUDA's context, NCCL's buffers and library handles.
MEMORY_FRACTION = 0.92


@dataclasses.dataclass(frozen=True)
class Flag:
    """One option of XLA and why it is set."""

    name: str
    value: str
    reason: str


def of_run(network: gpus.Network) -> tuple[Flag, ...]:
    """Return the options of a training run on this network."""
    options = (
        f"nic_speed_gbps={network.nic_bandwidth / 1e9:g},nccl_op_launch_us=20,rtt_us=4,"
        f"chunk_prep_us=1,gpus_per_node={network.gpus_per_node}"
    )
    return (
        Flag(
            "xla_gpu_enable_latency_hiding_scheduler",
            "true",
            "starts collectives early and does arithmetic meanwhile",
        ),
        Flag(
            "xla_gpu_enable_analytical_sol_latency_estimator",
            "true",
            "tells that scheduler how long collectives and products take",
        ),
        Flag(
            "xla_gpu_analytical_latency_estimator_options",
            options,
            "the network's rate: XLA assumes 25 GB/s, half of 400 Gb/s InfiniBand",
        ),
    )


def of_plan(network: gpus.Network) -> tuple[Flag, ...]:
    """Return the options of compiling that run's step without a GPU."""
    return (
        *of_run(network),
        Flag(
            "xla_gpu_enable_triton_gemm",
            "false",
            "without a GPU nothing is autotuned, and an untuned Triton tile would replace cuBLASLt",
        ),
    )


def text(flags: tuple[Flag, ...]) -> str:
    """Return options as XLA_FLAGS has them."""
    return " ".join(f"--{flag.name}={flag.value}" for flag in flags)


if __name__ == "__main__":
    sys.stdout.write(text(of_run(gpus.network_of(gpus.GPUS["h100"]))) + "\n")
