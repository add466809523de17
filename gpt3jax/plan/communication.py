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


def layer_weights(cfg: schema.Config, layout: placement.Layout) -> float:
    """Return the bytes of a layer's matrices as they are gathered, whole over `fsdp`."""
    width = 1 if memory_model.gathers_8_bits(cfg, layout) else memory_model.width(cfg)
    return 12 * cfg.model.d_model**2 / layout.sizes["tensor"] * width


def layer_gradients(cfg: schema.Config, layout: placement.Layout) -> float:
    """Return the bytes of a layer's gradients that are added up over `fsdp`.

    Over `context` too they are all-reduced, twice the bytes, over as many times the network cards.
    """
    context = layout.sizes["context"]
    n_bytes = 12 * cfg.model.d_model**2 / layout.sizes["tensor"] * memory_model.width(cfg)
    return n_bytes * (2 / context if context > 1 else 1)


def products_again(name: str) -> float:
    """Return the share of a layer's products that run again with a policy of `model.remat`.

    A layer has 12 D^2 weights: QKV 3, the projection 1, each matrix of the MLP 4. Nothing in the
    backward pass needs the MLP's second product.
    """
    sizes = {"qkv": 3, "middle": 1, "hidden": 4}
    return sum(size for value, size in sizes.items() if value not in remat.SAVED[name]) / 12


def _of_fsdp(cfg: schema.Config, layout: placement.Layout) -> list[Needed]:
    """Return the gathers of weights and the sums of gradients, of layers and of the table.

    A layer's four matrices are gathered one by one, forward and backward, with stages once more for
    a product that runs again. Their gradients are added up in 3 transfers (with stages 4), those of
    norms and biases in 2 small ones. Lookup and head gather the table, and each adds up a gradient.
    """
    n_layers = layer_passes(cfg, layout)
    weights, gradients = layer_weights(cfg, layout), layer_gradients(cfg, layout)
    has_stages = layout.sizes["stage"] > 1
    n_gathers = 8 + 4 * products_again(cfg.model.remat) * has_stages
    n_sums = 4 if has_stages else 3
    return [
        Needed("all-gather", "fsdp", round(n_gathers * n_layers), weights / 4),
        Needed("reduce-scatter", "fsdp", n_sums * n_layers, gradients / n_sums),
        Needed("all-reduce", "fsdp", 2 * n_layers, 26.0 * cfg.model.d_model),
        *of_table(cfg, layout),
    ]


def of_table(cfg: schema.Config, layout: placement.Layout) -> list[Needed]:
    """Return the transfers of the vocabulary's table over `fsdp`, in fp32."""
    n_microbatches = memory_model.end_microbatches(cfg, layout)
    table = 4.0 * cfg.model.padded_vocab_size * cfg.model.d_model / layout.sizes["tensor"]
    return [
        Needed("all-gather", "fsdp", 2 * n_microbatches, table),
        Needed("reduce-scatter", "fsdp", 2 * n_microbatches, table),
    ]


def _of_context(cfg: schema.Config, layout: placement.Layout) -> list[Needed]:
    n_layers, again = layer_passes(cfg, layout), _runs_forward_again(cfg, layout)
    keys_and_values = 2 * _whole_activations(cfg, layout) * layout.sizes["context"]
    keys_and_values /= layout.sizes["tensor"]
    return [
        Needed("all-gather", "context", (1 + again) * n_layers, keys_and_values),
        Needed("reduce-scatter", "context", n_layers, keys_and_values),
    ]


def _of_stage(cfg: schema.Config, layout: placement.Layout) -> list[Needed]:
    """Return the hand-overs of each tick, and the sum of the gradients of table and positions."""
    n_ticks = placement.schedule(cfg, layout).n_ticks
    part = memory_model.activation_bytes(cfg, layout)
    return [
        Needed("collective-permute", "stage", 4 * n_ticks, part),
        Needed("all-reduce", "stage", 1, 4.0 * memory_model.end_parameters(cfg, layout.sizes)),
    ]


def _of_tensor(cfg: schema.Config, layout: placement.Layout) -> list[Needed]:
    n_layers, again = layer_passes(cfg, layout), _runs_forward_again(cfg, layout)
    whole, n_sums = _whole_activations(cfg, layout), 4 + (cfg.model.remat == "full")
    if not cfg.mesh.sequence_parallel:
        return [Needed("all-reduce", "tensor", n_sums * n_layers, whole)]
    return [
        Needed("all-gather", "tensor", (4 + 2 * again) * n_layers, whole),
        Needed("reduce-scatter", "tensor", n_sums * n_layers, whole),
    ]


def _of_data(cfg: schema.Config, layout: placement.Layout) -> list[Needed]:
    """Return the sums of gradients in fp32, over `data`.

    With a sharded optimizer they are halves of a sum, for those that `data` cuts; then matrices of
    layers are gathered in the compute format, and the table in fp32.
    """
    held, n_data = memory_model.parameters(cfg, layout.sizes, over_data=False), layout.sizes["data"]
    if not cfg.mesh.shard_optimizer or n_data == 1:
        return [Needed("all-reduce", "data", 1, 4.0 * held)]
    stored = memory_model.parameters(cfg, layout.sizes, over_data=True)
    cut = (held - stored) / (1 - 1 / n_data)
    ends = min(cut, memory_model.end_parameters(cfg, layout.sizes))
    return [
        Needed("all-reduce", "data", 1, 4.0 * (held - cut)),
        Needed("reduce-scatter", "data", 1, 4.0 * cut),
        Needed("all-gather", "data", 1, memory_model.width(cfg) * (cut - ends) + 4.0 * ends),
    ]


def layer_passes(cfg: schema.Config, layout: placement.Layout) -> int:
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
