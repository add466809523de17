"""The choice of JAX's devices: GPUs where there are any, else the CPU, and never by mistake.

By itself, JAX uses the CPU where it cannot use a GPU, and starts an installed CUDA plugin even on
machines without a GPU.
"""

import importlib.util
import os
import pkgutil
import re

import jax

from gpt3jax import errors
from gpt3jax.hardware import driver, nvidia_smi, xla_flags

# Files of a machine or a container with an NVIDIA GPU; the last one is of Linux under Windows.


def choose(cpu_devices: int) -> None:
    """Set the devices that JAX uses; call this before anything touches a device.

    `cpu_devices` are emulated if there are any. Otherwise JAX_PLATFORMS decides, then the machine.
    On GPUs the environment gets what JAX, XLA and Orbax must find there.

    Raises:
        UserError: JAX_PLATFORMS asks for GPUs and none is visible, or one is visible and JAX is
            installed without CUDA, or for a newer driver.
    """
    if cpu_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", cpu_devices)
        return
    platforms, gpu = jax.config.values["jax_platforms"], visible_gpu()
    if not platforms:
        platforms = "cuda,cpu" if gpu else "cpu"
        jax.config.update("jax_platforms", platforms)
    if not {"cuda", "gpu"} & set(platforms.split(",")):
        return
    if not gpu:
        raise errors.UserError(
            f"JAX_PLATFORMS={platforms}, but no NVIDIA GPU is visible here: see nvidia-smi and "
            "CUDA_VISIBLE_DEVICES, start a container with --gpus=all, or set JAX_PLATFORMS=cpu to "
            "use the CPU",
            page="launching.md#gpus-or-the-cpu",
        )
    if not (cuda := installed_cuda()):
        raise errors.UserError(
            f"an NVIDIA GPU is visible ({gpu}), but JAX is installed without CUDA: pip install "
            "'gpt3jax[cuda13]' (cuda12 for drivers before 580), or set JAX_PLATFORMS=cpu to use "
            "the CPU",
            page="launching.md#gpus-or-the-cpu",
        )
    driver.check(cuda)
    os.environ.update(xla_flags.variables(os.environ, nvidia_smi.capabilities()))
    os.environ["JAX_PLATFORMS"] = platforms  # Orbax saves by it, not by JAX's config


def compute_capability(device: jax.Device) -> tuple[int, int] | None:
    """Return the compute capability of an NVIDIA GPU, present or described; None for others."""
    numbers = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))
    return (int(numbers[1]), int(numbers[2])) if numbers else None


def visible_gpu() -> str:
    """Return the file that shows an NVIDIA GPU, "" where there is none or all are hidden."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "all").split(",")[0].strip()
    if shown in ("", "-1", "NoDevFiles"):  # the ways in which people and Slurm hide them
        return ""
    return nvidia_smi.gpu_file()


def installed_cuda() -> int:
    """Return the major version of CUDA that JAX's plugin is made for; 0 if there is no plugin."""
    plugins = importlib.util.find_spec("jax_plugins")
    folders = plugins.submodule_search_locations if plugins else None
    names = (re.fullmatch(r"xla_cuda(\d+)", m.name) for m in pkgutil.iter_modules(folders or []))
    return max((int(name[1]) for name in names if name), default=0)
