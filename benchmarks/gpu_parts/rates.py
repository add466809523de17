"""What the GPU reaches of its peaks: in large products, and in moving data."""

import jax
import jax.numpy as jnp

from gpt3jax.config import schema
from gpt3jax.distributed import joining
from gpt3jax.hardware import devices, flops, gpus
from gpt3jax.preflight import speed


def measure(task):
    """Yield TFLOP/s of bfloat16 products, GB/s of a copy, and their shares of the peaks."""
    joining.start(schema.Distributed(), schema.Mesh(cpu_devices=1 if task.tiny else 0))
    device = jax.devices()[0]
    gpu = gpus.like(device.device_kind, devices.compute_capability(device))
    sizes = speed.sizes_for(device.platform)
    reached = speed.matmul_tflops(device, sizes)
    peak = flops.peak_flops(device.device_kind, "bfloat16")
    yield {"product TFLOP/s": reached, "of the peak": 1e12 * reached / peak if peak else None}
    x = jnp.ones(sizes.n_bytes, jnp.bfloat16)
    seconds = speed.best_seconds(sizes.rounds, jax.jit(lambda x: x + 1), x)
    rate = 2 * x.nbytes / seconds  # read and written
    share = rate / gpu.memory_bandwidth if device.platform != "cpu" else None
    yield {"copy GB/s": rate / 1e9, "of the memory's": share}
