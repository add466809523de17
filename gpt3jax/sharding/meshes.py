"""The device mesh: its axes, slowest network first, and their sizes."""

import math

import jax
from jax.sharding import AxisType

from gpt3jax import errors
from gpt3jax.config import schema

# Slowest network first.
AXES = ("data", "stage", "fsdp", "context", "tensor")


def make_mesh(mesh: schema.Mesh) -> jax.sharding.Mesh:
    """Return the mesh over all devices of all processes, with -1 resolved.

    Raises:
        UserError: the axes' product is not the number of devices.
    """
    n_devices = jax.device_count()
    sizes = axis_sizes(mesh, n_devices)
    if sizes is None:
        asked = " x ".join(f"{a} {getattr(mesh, a)}" for a in AXES)
        raise errors.UserError(
            f"mesh: {asked} does not fit {n_devices} {jax.default_backend()} device(s): the axes' "
            f"product must be {n_devices}; change one, give -1 to one, or start more devices",
            page="parallelism.md#which-sizes-are-possible",
        )
    return jax.make_mesh(list(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def axis_sizes(mesh: schema.Mesh, n_devices: int) -> dict[str, int] | None:
    """Return the axes' sizes on so many devices, with -1 resolved; None if they do not fit."""
    sizes = {axis: getattr(mesh, axis) for axis in AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    for axis, size in sizes.items():
        if size == -1 and n_devices % fixed == 0:
            sizes[axis] = n_devices // fixed
    return sizes if math.prod(sizes.values()) == n_devices else None
