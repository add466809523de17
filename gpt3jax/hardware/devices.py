"""Which devices JAX computes on: GPUs where there are any, else the CPU; never by mistake.

JAX by itself takes the CPU where it cannot use a GPU, and starts its CUDA plugin, where one is
installed, on machines without a GPU as well.
"""

import glob
import importlib.util
import os
import pkgutil

import jax

from gpt3jax import errors

# What a machine or a container with an NVIDIA GPU has; the last one is of Windows' Linux.
_SIGNS = ("/dev/nvidia[0-9]*", "/dev/nvidiactl", "/usr/lib/wsl/lib/libcuda.so.1")


def choose(cpu_devices: int) -> None:
    """Tell JAX which devices to use; call it before anything touches one.

    `cpu_devices` are emulated, if there are any; else JAX_PLATFORMS decides, else the machine.

    Raises:
        UserError: JAX_PLATFORMS asks for GPUs and none is visible, or one is visible and JAX is
            installed without CUDA.
    """
    if cpu_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", cpu_devices)
        return
    asked, gpu = jax.config.values["jax_platforms"], _visible_gpu()
    if not asked:
        asked = "cuda,cpu" if gpu else "cpu"
        jax.config.update("jax_platforms", asked)
    if not {"cuda", "gpu"} & set(asked.split(",")):
        return
    if not gpu:
        raise errors.UserError(
            f"JAX_PLATFORMS={asked}, but no NVIDIA GPU is visible here: see nvidia-smi and "
            "CUDA_VISIBLE_DEVICES, start a container with --gpus=all, or set JAX_PLATFORMS=cpu to "
            "use the CPU"
        )
    if not _has_cuda():
        raise errors.UserError(
            f"an NVIDIA GPU is visible ({gpu}), but JAX is installed without CUDA: pip install "
            "'gpt3jax[cuda13]' (cuda12 for drivers before 580), or set JAX_PLATFORMS=cpu to use "
            "the CPU"
        )


def _visible_gpu() -> str:
    """Return the file that shows an NVIDIA GPU, "" where there is none or they are hidden."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "all").split(",")[0].strip()
    if shown in ("", "-1", "NoDevFiles"):  # as people, and Slurm, hide them
        return ""
    return next((file for sign in _SIGNS for file in sorted(glob.glob(sign))), "")


def _has_cuda() -> bool:
    """Tell whether JAX's CUDA plugin is installed, where JAX looks for it."""
    plugins = importlib.util.find_spec("jax_plugins")
    folders = plugins.submodule_search_locations if plugins else None
    return any("cuda" in module.name for module in pkgutil.iter_modules(folders or []))
