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


def _saving(*names: str) -> Policy:
    """Return the policy that saves the values with these names, and attention's results."""

    def policy(primitive: Primitive, *_: object, **params: object) -> bool:
        named = primitive.name == "name" and params["name"] in (*names, cudnn_attention.SAVED)
        return named or "dot_product_attention_fwd" in primitive.name  # its softmax sums too

    return policy


# What each policy saves:
#   none       all but attention's scores and the insides of norms and GELU: Megatron's "selective"
#   dots       the layer's input, QKV, attention's results, the residual stream after it and the
#              MLP's hidden layer: so norms, dropout and GELU are computed again, but no product
#   mlp        the same without the MLP's hidden layer
#   residual   the layer's input, and the residual stream after attention
#   full       the layer's input only
POLICIES: dict[str, Policy | None] = {
    "none": None,
    "dots": _saving("qkv", "residual", "hidden"),
    "mlp": _saving("qkv", "residual"),
    "residual": jax.checkpoint_policies.save_only_these_names("residual"),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def in_effect(name: str, has_stages: bool) -> str:
    """Return the policy that acts where `model.remat` has this name.

    With stages `none` is `dots`: a layer reads its weights from a stack there, inside of what is
    recomputed, or else a copy of the weights would be kept for every microbatch.
    """
    return "dots" if has_stages and name == "none" else name


# Recompute a function whose second argument is static. If they were kept, the parts of the
# derivatives of elementwise work would be half of a layer's memory.
elementwise = functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=1)
