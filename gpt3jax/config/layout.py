"""The layout of a step: the fields of a config that decide its speed and memory, and never a loss.

Each may be `auto`. What was chosen for a batch size is a flat dict of them, which goes into files
and checkpoints as it is. Imports no JAX.
"""

import dataclasses
import math
from typing import Any, TypeAlias

from gpt3jax import errors
from gpt3jax.config import schema

Layout: TypeAlias = dict[str, Any]  # a field's dotted name: int, bool or str

# The axes of the mesh, slowest network first.
AXES = ("copies", "data", "stage", "fsdp", "context", "tensor")
_MESH = tuple(f"mesh.{axis}" for axis in AXES)
# What auto means where no layout is looked for: data parallelism, nothing else.
_PLAIN: Layout = {
    **dict.fromkeys(_MESH, 1),
    "mesh.virtual_stages": 1,
    "mesh.shard_optimizer": False,
    "mesh.sequence_parallel": True,
    "batch.microbatch_size": 1,
    "model.remat": "none",
    "model.n_loss_chunks": 1,
}
FIELDS = tuple(_PLAIN)


def of(cfg: schema.Config) -> Layout:
    """Return the layout's fields of a config, `auto` included."""
    flat = schema.flatten(cfg)
    return {name: flat[name] for name in FIELDS}


def automatic(cfg: schema.Config) -> list[str]:
    """Return the names of the fields that are `auto`."""
    return [name for name, value in of(cfg).items() if value == schema.AUTO]


def given(cfg: schema.Config) -> Layout:
    """Return the layout's fields that the user gave; an axis of -1 is given by the others."""
    return {name: value for name, value in of(cfg).items() if value not in (schema.AUTO, -1)}


def with_layout(cfg: schema.Config, layout: Layout) -> schema.Config:
    """Return a config with these fields of a layout, and all others as they are."""
    parts: dict[str, Layout] = {"mesh": {}, "batch": {}, "model": {}}
    for name, value in layout.items():
        group, _, field = name.partition(".")
        parts[group][field] = value
    replaced = {name: dataclasses.replace(getattr(cfg, name), **f) for name, f in parts.items()}
    return dataclasses.replace(cfg, **replaced)


def plain(cfg: schema.Config) -> schema.Config:
    """Return a config whose `auto` fields say data parallelism, and nothing is recomputed."""
    return with_layout(cfg, plain_fields(cfg))


def plain_fields(cfg: schema.Config) -> Layout:
    """Return what `plain` puts in the place of each field that is `auto`."""
    chosen = {name: _PLAIN[name] for name in automatic(cfg)}
    return chosen | {f"mesh.{axis}": n for axis, n in plain_axes(cfg.mesh).items()}


def plain_axes(mesh: schema.Mesh) -> dict[str, int]:
    """Return the axes of a mesh; in place of `auto`, `data` has the rest of the devices."""
    axes = {axis: getattr(mesh, axis) for axis in AXES}
    if axes["data"] == schema.AUTO and -1 not in axes.values():
        axes["data"] = -1
    return {axis: 1 if n == schema.AUTO else n for axis, n in axes.items()}


def at_batch_size(cfg: schema.Config, batch_size: int) -> schema.Config:
    """Return a config whose batch has this size from the first step on."""
    batch = dataclasses.replace(cfg.batch, global_batch_size=batch_size, schedule="", ramp=())
    return dataclasses.replace(cfg, batch=batch)


def n_devices(layout: Layout) -> int:
    """Return how many devices a layout uses, whose axes all have a size."""
    return math.prod(layout[name] for name in _MESH)


def n_ranks(layout: Layout) -> int:
    """Return into how many parts a layout cuts a batch."""
    ranks: int = layout["mesh.data"] * layout["mesh.fsdp"]
    return ranks


def in_words(layout: Layout) -> str:
    """Return a layout in a few words, as "fsdp 512 x tensor 2, microbatch 3, remat mlp"."""
    axes = " x ".join(f"{a} {layout[f'mesh.{a}']}" for a in AXES if layout[f"mesh.{a}"] > 1)
    extras = [
        f", {layout['mesh.virtual_stages']} virtual stages" * (layout["mesh.virtual_stages"] > 1),
        ", sharded optimizer" * (layout["mesh.shard_optimizer"] and layout["mesh.data"] > 1),
        f", microbatch {layout['batch.microbatch_size']}",
        f", remat {layout['model.remat']}",
        f", {layout['model.n_loss_chunks']} loss chunks" * (layout["model.n_loss_chunks"] > 1),
    ]
    return (axes or "one device") + "".join(extras)


def options(layout: Layout) -> tuple[str, ...]:
    """Return the options of the command line that give a layout."""
    return tuple(f"--{name.replace('_', '-')}={value}" for name, value in layout.items())


def check(layout: Layout, source: str) -> None:
    """Check that a layout from a file has all fields and no `auto`.

    Raises:
        UserError: it has not; the error names the source.
    """
    wrong = [n for n in FIELDS if not isinstance(layout.get(n), type(_PLAIN[n]))]
    if wrong or set(layout) != set(FIELDS):
        names = ", ".join(wrong or sorted(set(layout) - set(FIELDS)))
        raise errors.UserError(
            f"{source}: a layout needs a value for each of {', '.join(FIELDS)} and nothing else "
            f"(look at {names}): write it with gpt3jax.plan --write-layouts",
            page="parallelism.md#the-layout-is-found",
        )
