"""What is here: versions, driver, memory, and the options that a run gets."""

import importlib
import importlib.metadata
import os
import pathlib
import platform
import subprocess

import jax

from gpt3jax.hardware import devices, gpus, nvidia_smi
from gpt3jax.plan import memory_model

import train_step
from gpu_parts import sizes

PACKAGES = (
    "gpt3jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "jax-triton",
    "triton", "jax-cuda13-plugin", "jax-cuda12-plugin", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12",
    "nvidia-nccl-cu13", "nvidia-nccl-cu12",
)  # fmt: skip
VARIABLES = (
    "XLA_FLAGS", "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "CUDA_DEVICE_MAX_CONNECTIONS", "JAX_PLATFORMS", "JAX_COMPILATION_CACHE_DIR",
)  # fmt: skip


def describe(task):
    """Yield versions, then the driver's facts, then what JAX sees with a run's settings."""
    yield {"commit": commit(), "python": platform.python_version(), "versions": versions()}
    fields = "name", "driver_version", "memory.total", "power.limit", "clocks.max.sm"
    yield {"GPUs": [dict(zip(fields, row, strict=True)) for row in nvidia_smi.query(*fields)]}
    laid, _ = train_step.prepare(sizes.recipe_args(task, *task.args))
    device = jax.devices()[0]
    capability = devices.compute_capability(device)
    yield {"device": device.device_kind, "compute capability": capability, "cuDNN": cudnn()}
    gpu = gpus.like(device.device_kind, capability)
    limit = (device.memory_stats() or {}).get("bytes_limit", 0)
    yield {
        "taken for": gpu.name,
        "GiB of the allocator": limit / 2**30,
        "GiB of it in a plan": memory_model.pool(gpu) / 2**30,
        "options of a step": laid.program.train.options,
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def commit():
    """Return the commit of this copy of the repository, None where git does not know one."""
    command = ["git", "-C", str(pathlib.Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def versions():
    """Return the versions of the packages that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def cudnn():
    """Return the version of cuDNN that JAX's plugin loads, as 91002; 0 without a GPU."""
    for name in ("jax_cuda13_plugin", "jax_cuda12_plugin"):
        try:
            return importlib.import_module(f"{name}._versions").cudnn_get_version()
        except (ImportError, RuntimeError):
            continue
    return 0
