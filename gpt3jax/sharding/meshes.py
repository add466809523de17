"""The device mesh: its axes, slowest network first, and their sizes."""

import math

import jax
from jax.sharding import AxisType

from gpt3jax import errors
from gpt3jax.config import layout, schema

AXES = layout.AXES


def make_mesh(mesh: schema.Mesh, n_devices: int = 0) -> jax.sharding.Mesh:
    """Return the mesh over the first `n_devices` devices of all processes (0: all of them).

    -1 and `auto` are resolved as in `axis_sizes`.

    Raises:
        UserError: the axes' product is not the number of devices.
    """
    n_devices = n_devices or jax.device_count()
    sizes = axis_sizes(mesh, n_devices)
    if sizes is None:
        asked = " x ".join(f"{a} {getattr(mesh, a)}" for a in AXES)
        raise errors.UserError(
            f"mesh: {asked} does not fit {n_devices} {jax.default_backend()} device(s): the axes' "
            f"product must be {n_devices}; change one, give -1 to one, or start more devices",
            page="parallelism.md#which-sizes-are-possible",
        )
    auto_types = (AxisType.Auto,) * len(AXES)
    devices = jax.devices()[:n_devices]
    return jax.make_mesh(list(sizes.values()), AXES, axis_types=auto_types, devices=devices)


def axis_sizes(mesh: schema.Mesh, n_devices: int) -> dict[str, int] | None:
    """Return the axes' sizes on so many devices; None if they do not fit.

    -1 is the rest of the devices; so is `auto` for `data`, and 1 for the others.
    """
    sizes = layout.plain_axes(mesh)
    fixed = math.prod(size for size in sizes.values() if size != -1)
    for axis, size in sizes.items():
        if size == -1 and n_devices % fixed == 0:
            sizes[axis] = n_devices // fixed
    return sizes if math.prod(sizes.values()) == n_devices else None
