"""What the backward pass finds saved of a layer (`model.remat`); it computes the rest again.

Values have names where the network makes them (`checkpoint_name`).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax

from gpt3jax.model import cudnn_attention


def _saving(*names: str) -> Callable[..., bool]:
    """Return the policy that saves what has these names, and what attention gives."""

    def policy(primitive: Any, *args: Any, **params: Any) -> bool:
        named = primitive.name == "name" and params["name"] in (*names, cudnn_attention.SAVED)
        return named or "dot_product_attention_fwd" in primitive.name  # its softmax sums too

    return policy


#   none       all but attention's scores, and the insides of norms and GELU: Megatron's "selective"
#   dots       the layer's input, QKV, what attention gives, the residual stream after it, the MLP's
#              hidden layer: so norms, dropout and GELU are computed again, but no product
#   mlp        the same without the MLP's hidden layer
#   residual   the layer's input, and the residual stream after attention
#   full       the layer's input only
POLICIES: dict[str, Any] = {
    "none": None,
    "dots": _saving("qkv", "residual", "hidden"),
    "mlp": _saving("qkv", "residual"),
    "residual": jax.checkpoint_policies.save_only_these_names("residual"),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def in_effect(name: str, has_stages: bool) -> str:
    """Return the policy that acts where `model.remat` is this one.

    With stages a layer takes its weights from a stack, inside of what is recomputed, or a copy of
    them would be kept for every microbatch. So `none` is `dots` there.
    """
    return "dots" if has_stages and name == "none" else name


# For a function whose second argument is static. Kept, the parts of the derivatives of elementwise
# work would be half of a layer's memory.
elementwise = functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=1)
