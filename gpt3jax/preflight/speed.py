"""Measures the speed of devices and networks: matrix products, collectives along each mesh axis.

The measurements are short and rough: they find broken machines and are not a benchmark. All
processes must call the same functions in the same order; `within` ends and names one that hangs.
"""

import dataclasses
import math
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from gpt3jax import errors

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of the measurements on a kind of device."""

    matrix: int
    """Rows and columns of each matrix."""
    products: int
    """Consecutive products that are timed together."""
    n_bytes: int
    """Bytes of each device in a collective."""
    rounds: int
    """Repetitions of each measurement; the fastest one counts."""


_GPU = Sizes(matrix=8192, products=16, n_bytes=256 << 20, rounds=5)  # 18 TFLOP: 25 ms on an H100
_CPU = Sizes(matrix=256, products=4, n_bytes=1 << 20, rounds=20)


def sizes_for(platform: str) -> Sizes:
    """Return the sizes for a platform of JAX."""
    return _CPU if platform == "cpu" else _GPU


def matmul_tflops(device: jax.Device, sizes: Sizes) -> float:
    """Return the TFLOP/s of bfloat16 products on a device of this process."""
    n = sizes.matrix

    def chain(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, sizes.products, lambda _, y: y @ w, x)

    place = jax.sharding.SingleDeviceSharding(device)
    # Random values make a chip draw its true power; the scale keeps the products finite.
    x, w = (
        jax.device_put(jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16), place)
        for i in range(2)
    )
    seconds = best_seconds(sizes.rounds, jax.jit(chain), x, w / math.sqrt(n))
    return 2 * n**3 * sizes.products / seconds / 1e12


def collective_gbytes(mesh: jax.sharding.Mesh, axis: str, kind: str, sizes: Sizes) -> float:
    """Return the GB/s of a collective along a mesh axis, in all its groups at once.

    The bytes are those that each of N devices sends at least in a ring: (N - 1) / N of the gathered
    bytes, and twice that share of the reduced ones ("bus bandwidth" of nccl-tests).
    """
    n = mesh.shape[axis]
    length = sizes.n_bytes // 4
    spec = PartitionSpec(mesh.axis_names)
    x = jax.jit(
        lambda: jnp.ones((length * mesh.size,), jnp.float32),
        out_shardings=NamedSharding(mesh, spec),
    )()

    def local(part: jax.Array) -> jax.Array:
        if kind == "all-reduce":
            return jax.lax.psum(part, axis)
        return jax.lax.all_gather(part, axis, tiled=True)[: length // n]

    run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    seconds = best_seconds(sizes.rounds, run, x)
    moved = 2 * (n - 1) / n * sizes.n_bytes if kind == "all-reduce" else (n - 1) * sizes.n_bytes
    return moved / seconds / 1e9


def best_seconds(rounds: int, function: Callable[..., jax.Array], *args: jax.Array) -> float:
    """Return the shortest time of several calls, after a first one that compiles."""
    jax.block_until_ready(function(*args))
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - begin)
    return min(times)


def within(seconds: float, doing: str, action: Callable[[], Result]) -> Result:
    """Return the result of an action that ends within a time limit.

    Raises:
        TransientError: it did not; its thread is still running, so the process should end.
    """
    result: list[Result] = []
    failure: list[BaseException] = []

    def call() -> None:
        try:
            result.append(action())
        except BaseException as error:  # raised again below
            failure.append(error)

    thread = threading.Thread(target=call, daemon=True, name=doing)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise errors.TransientError(
            f"preflight: {doing} did not end in {seconds:.0f} s: it hangs",
            page="preflight.md#what-is-checked-what-a-failure-means-what-to-do",
        )
    if failure:
        raise failure[0]
    return result[0]
