"""The collectives that a layout needs in a step, by closed forms: kind, axis, count, bytes.

docs/parallelism.md derives them. `timeline` reads those of a compiled step.
"""

import dataclasses

from gpt3jax.config import schema
from gpt3jax.hardware import gpus
from gpt3jax.model import remat
from gpt3jax.plan import hlo, memory_model, placement


@dataclasses.dataclass(frozen=True)
class Needed:
    """A collective that a layout needs in a step."""

    kind: str
    axis: str
    count: int
    n_bytes: float
    """The whole buffer of one execution."""


def collectives(cfg: schema.Config, layout: placement.Layout) -> list[Needed]:
    """Return the collectives that the layout needs in a step."""
    needed = [
        *_of_fsdp(cfg, layout),
        *_of_context(cfg, layout),
        *_of_stage(cfg, layout),
        *_of_tensor(cfg, layout),
        *_of_data(cfg, layout),
    ]
    return [row for row in needed if layout.sizes[row.axis] > 1]


def collective(
    kind: str, axis: str, n_bytes: float, layout: placement.Layout, network: gpus.Network
) -> hlo.Collective:
    """Return a collective over an axis; a permutation is as slow as its slowest pair."""
    size, in_node = layout.sizes[axis], layout.in_node(axis, network.gpus_per_node)
    if kind == "collective-permute":
        size, in_node = 2, 2 if in_node == size else 1
    return hlo.Collective(
        kind=kind,
        axes=(axis,),
        group_size=size,
        in_node=in_node,
        n_bytes=round(n_bytes),
        is_async=True,
    )


def _of_fsdp(cfg: schema.Config, layout: placement.Layout) -> list[Needed]:
    n_layers = _layer_passes(cfg, layout)
    weights = 12 * cfg.model.d_model**2 / layout.sizes["tensor"] * memory_model.width(cfg)
    return [
        Needed("all-gather", "fsdp", 2 * n_layers, weights),
        Needed("reduce-scatter", "fsdp", n_layers, weights),
    ]


def _of_context(cfg: schema.Config, layout: placement.Layout) -> list[Needed]:
    n_layers, again = _layer_passes(cfg, layout), _runs_forward_again(cfg, layout)
    keys_and_values = 2 * _whole_activations(cfg, layout) * layout.sizes["context"]
    keys_and_values /= layout.sizes["tensor"]
    return [
        Needed("all-gather", "context", (1 + again) * n_layers, keys_and_values),
        Needed("reduce-scatter", "context", n_layers, keys_and_values),
    ]


def _of_stage(cfg: schema.Config, layout: placement.Layout) -> list[Needed]:
    n_ticks, part = (
        placement.schedule(cfg, layout).n_ticks,
        memory_model.activation_bytes(cfg, layout),
    )
    return [Needed("collective-permute", "stage", 4 * n_ticks, part)]


def _of_tensor(cfg: schema.Config, layout: placement.Layout) -> list[Needed]:
    n_layers, again = _layer_passes(cfg, layout), _runs_forward_again(cfg, layout)
    whole, n_sums = _whole_activations(cfg, layout), 4 + (cfg.model.remat == "full")
    if not cfg.mesh.sequence_parallel:
        return [Needed("all-reduce", "tensor", n_sums * n_layers, whole)]
    return [
        Needed("all-gather", "tensor", (4 + 2 * again) * n_layers, whole),
        Needed("reduce-scatter", "tensor", n_sums * n_layers, whole),
    ]


def _of_data(cfg: schema.Config, layout: placement.Layout) -> list[Needed]:
    held = memory_model.parameters(cfg, layout.sizes, over_data=False)
    if not cfg.mesh.shard_optimizer:
        return [Needed("all-reduce", "data", 1, 4.0 * held)]
    return [
        Needed("reduce-scatter", "data", 1, 4.0 * held),
        Needed("all-gather", "data", 1, float(memory_model.width(cfg) * held)),
    ]


def _layer_passes(cfg: schema.Config, layout: placement.Layout) -> int:
    """Return how often a GPU runs a layer in a step; idle ticks communicate too."""
    n_passes = -(-placement.schedule(cfg, layout).n_ticks // cfg.mesh.virtual_stages)
    return cfg.model.n_layers // layout.sizes["stage"] * n_passes


def _runs_forward_again(cfg: schema.Config, layout: placement.Layout) -> bool:
    """Return whether the backward pass gathers the outputs of norms again."""
    return remat.in_effect(cfg.model.remat, layout.sizes["stage"] > 1) != "none"


def _whole_activations(cfg: schema.Config, layout: placement.Layout) -> float:
    """Return the bytes of a microbatch's residual stream, gathered over `tensor`."""
    ways = layout.sizes["tensor"] if cfg.mesh.sequence_parallel else 1
    return memory_model.activation_bytes(cfg, layout) * ways
