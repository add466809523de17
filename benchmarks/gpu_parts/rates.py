"""What the GPU reaches of its peaks: in large products, and in moving data."""

import math

import jax
import jax.numpy as jnp

from gpt3jax.config import schema
from gpt3jax.distributed import joining
from gpt3jax.hardware import devices, flops, gpus
from gpt3jax.model import float8
from gpt3jax.preflight import speed


def measure(task):
    """Yield TFLOP/s of products in bfloat16 and 8 bits, GB/s of a copy, their shares of peaks."""
    joining.start(schema.Distributed(), schema.Mesh(cpu_devices=1 if task.tiny else 0))
    device = jax.devices()[0]
    gpu = gpus.like(device.device_kind, devices.compute_capability(device))
    sizes = speed.sizes_for(device.platform)
    reached = speed.matmul_tflops(device, sizes)
    peak = flops.peak_flops(device.device_kind, "bfloat16")
    yield {"product TFLOP/s": reached, "of the peak": 1e12 * reached / peak if peak else None}
    in_8_bits = flops.peak_flops(device.device_kind, "float8")
    if in_8_bits or task.tiny:
        reached = tflops_in_8_bits(device, sizes)
        share = 1e12 * reached / in_8_bits if in_8_bits else None
        yield {"8-bit product TFLOP/s": reached, "of their peak": share}
    x = jnp.ones(sizes.n_bytes, jnp.bfloat16)
    seconds = speed.best_seconds(sizes.rounds, jax.jit(lambda x: x + 1), x)
    rate = 2 * x.nbytes / seconds  # read and written
    share = rate / gpu.memory_bandwidth if device.platform != "cpu" else None
    yield {"copy GB/s": rate / 1e9, "of the memory's": share}


def tflops_in_8_bits(device, sizes):
    """Return the TFLOP/s of 8-bit products, each with the rounding of its result to 8 bits."""
    n = sizes.matrix
    x, w = (
        jax.device_put(jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16), device)
        for i in range(2)
    )

    def product(x, w):
        return (x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(float8.E4M3)

    def chain(x, w):
        return jax.lax.fori_loop(0, sizes.products, lambda _, y: product(y, w), x)

    in_8_bits = x.astype(float8.E4M3), (w / math.sqrt(n)).astype(float8.E4M3)
    seconds = speed.best_seconds(sizes.rounds, jax.jit(chain), *in_8_bits)
    return 2 * n**3 * sizes.products / seconds / 1e12
