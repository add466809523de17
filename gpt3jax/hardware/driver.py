"""Which CUDA NVIDIA's driver here runs, and which driver a CUDA needs. Imports no JAX."""

import ctypes

from gpt3jax import errors
from gpt3jax.hardware import nvidia_smi

NEEDED = {12: "525.60", 13: "580"}
"""The oldest driver for each major version of CUDA, on Linux, whatever the minor version (NVIDIA's
"CUDA Compatibility")."""


def check(cuda: int) -> None:
    """Check that the driver runs this major version of CUDA, where it says what it runs.

    JAX would say of an old driver only that it cannot start the GPU.

    Raises:
        UserError: the driver is too old.
    """
    newest = newest_cuda()
    if newest is None or newest[0] >= cuda:
        return
    versions = sorted({row[0] for row in nvidia_smi.query("driver_version", timeout=20)})
    name = f"NVIDIA's driver {' and '.join(versions)}".rstrip()
    older = [major for major in NEEDED if major <= newest[0]]
    way = f", or install 'gpt3jax[cuda{max(older)}]' in a new environment" if older else ""
    needed = f", which needs driver {NEEDED[cuda]} or newer" if cuda in NEEDED else ""
    raise errors.UserError(
        f"{name} runs CUDA up to {newest[0]}.{newest[1]}, and JAX is installed with CUDA {cuda}"
        f"{needed}: update the driver{way}",
        page="launching.md#drivers",
    )


def newest_cuda() -> tuple[int, int] | None:
    """Return the newest CUDA that the driver's library runs; None where there is no library.

    It is right with NVIDIA's packages for forward compatibility too, whose library is newer than
    the driver. It starts no GPU.
    """
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(number)):
        return None
    return number.value // 1000, number.value % 1000 // 10
