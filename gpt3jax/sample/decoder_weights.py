"""The network's weights as decoding reads them: layer by layer, cast once.

Decoding reads every weight once for each token. So a weight's last dimensions are those that its
product sums over, whatever they are in training.
"""

import dataclasses
from typing import Any, TypeAlias

import jax
from jax import Array

from gpt3jax.config import schema
from gpt3jax.model import gpt
from gpt3jax.sharding import layouts, rules

Parameter: TypeAlias = Any  # a Flax variable, or a LayerNorm that holds two


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """A block's weights."""

    norm_1: gpt.LayerNorm
    w_qkv_3HKD: Array
    b_qkv_3HK: Array
    w_out_DHK: Array
    b_out_D: Array
    norm_2: gpt.LayerNorm
    w_in_FD: Array
    b_in_F: Array
    w_down_DF: Array
    b_down_D: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """All weights, in the compute format except the norms and the two tables of the input."""

    embedding_VD: Array
    positions_TD: Array
    layers: tuple[Layer, ...]
    norm: gpt.LayerNorm
    head_VD: Array
    cfg: schema.Model = dataclasses.field(metadata={"static": True})
    compute: gpt.Compute = dataclasses.field(metadata={"static": True})


def prepare(params: gpt.GPT, compute: gpt.Compute) -> Weights:
    """Return the weights for decoding, on the mesh that is set; the blocks' own arrays are freed.

    Only one stacked parameter at a time is held twice.
    """
    core, mlp = params.blocks.attention, params.blocks.mlp
    by_layer = {
        "norm_1": _unstack(params.blocks.norm_1, "float32"),
        "w_qkv_3HKD": _unstack(core.w_qkv_D3HK, compute.dtype, (1, 2, 3, 0)),
        "b_qkv_3HK": _unstack(core.b_qkv_3HK, compute.dtype),
        "w_out_DHK": _unstack(core.w_out_HKD, compute.dtype, (2, 0, 1)),
        "b_out_D": _unstack(core.b_out_D, compute.dtype),
        "norm_2": _unstack(params.blocks.norm_2, "float32"),
        "w_in_FD": _unstack(mlp.w_in_DF, compute.dtype, (1, 0)),
        "b_in_F": _unstack(mlp.b_in_F, compute.dtype),
        "w_down_DF": _unstack(mlp.w_down_FD, compute.dtype, (1, 0)),
        "b_down_D": _unstack(mlp.b_down_D, compute.dtype),
    }
    layers = [
        Layer(**{name: values[i] for name, values in by_layer.items()})
        for i in range(params.model.n_layers)
    ]
    return Weights(
        embedding_VD=params.embedding_VD[...],
        positions_TD=params.positions_TD[...],
        layers=tuple(layers),
        norm=params.norm,
        head_VD=params.embedding_VD[...].astype(compute.dtype),
        cfg=params.model,
        compute=compute,
    )


def _unstack(
    stacked: Parameter, dtype: str, order: tuple[int, ...] | None = None
) -> list[Parameter]:
    """Return a parameter layer by layer, its dimensions in this order; free the stacked arrays."""

    def split(stacked: Parameter) -> list[Parameter]:
        n_layers = jax.tree.leaves(stacked)[0].shape[0]
        return [jax.tree.map(lambda x, i=i: convert(x[i]), stacked) for i in range(n_layers)]

    def convert(x: Array) -> Array:
        if order is None:
            return x.astype(dtype)
        axes = layouts.variable_axes(stacked)[1:]
        return rules.constrain(x.astype(dtype).transpose(order), *(axes[i] for i in order))

    layers = jax.block_until_ready(jax.jit(split)(stacked))
    for leaf in jax.tree.leaves(stacked):
        leaf.delete()
    return [layer[...] if layouts.is_variable(layer) else layer for layer in layers]
