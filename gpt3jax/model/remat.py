"""Which values of a layer are saved for the backward pass (`model.remat`); it recomputes the rest.

The network names the values where it makes them (`checkpoint_name`).
"""

import functools
from collections.abc import Callable
from typing import TypeAlias

import jax
from jax.extend.core import Primitive

from gpt3jax.model import cudnn_attention

Policy: TypeAlias = Callable[..., bool]


# What each policy saves besides a layer's input, by the names of `gpt.block_parts`. Where QKV is
# saved, so are attention's results with their softmax sums, and no kernel of it runs again.
#   none       all but attention's scores and the insides of norms and GELU: Megatron's "selective"
#   dots       what norms, dropout and GELU are computed again from, so that no product is
#   mlp        the same without the MLP's hidden layer
#   residual   the residual stream after attention
#   full       nothing
SAVED: dict[str, tuple[str, ...]] = {
    "none": ("normed_1", "qkv", "middle", "normed_2", "hidden", "activated"),
    "dots": ("qkv", "middle", "hidden"),
    "mlp": ("qkv", "middle"),
    "residual": ("middle",),
    "full": (),
}


def policy(name: str) -> Policy | None:
    """Return the policy of jax.checkpoint that saves these values; None saves all."""
    if name == "none":
        return None
    if "qkv" in SAVED[name]:
        return _saving_attention(*SAVED[name])
    return jax.checkpoint_policies.save_only_these_names(*SAVED[name])


def _saving_attention(*names: str) -> Policy:
    def saves(primitive: Primitive, *_: object, **params: object) -> bool:
        named = primitive.name == "name" and params["name"] in (*names, cudnn_attention.SAVED)
        return named or "dot_product_attention_fwd" in primitive.name  # its softmax sums too

    return saves


# Run a function again in the backward pass, but for attention's results.
keeping_attention = functools.partial(jax.checkpoint, policy=_saving_attention(), prevent_cse=False)


def in_effect(name: str, has_stages: bool) -> str:
    """Return the policy that acts where `model.remat` has this name.

    With stages `none` is `dots`: a layer reads its weights from a stack there, inside of what is
    recomputed, or else a copy of the weights would be kept for every microbatch.
    """
    return "dots" if has_stages and name == "none" else name


# Recompute a function whose second argument is static. If they were kept, the parts of the
# derivatives of elementwise work would be half of a layer's memory.
elementwise = functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=1)
