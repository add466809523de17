"""How the arrays of a state are named: by their path, as `params/norm/scale_D/value`."""

from typing import Any, TypeAlias

import jax

from gpt3jax.checkpoint import metadata
from gpt3jax.sharding import layouts

PyTree: TypeAlias = layouts.PyTree

_PARAMS = "params"  # the field of `step.TrainState`


def saved_names(abstract_state: PyTree, meta: metadata.Meta) -> list[str]:
    """Return the names of a checkpoint's arrays, in the order of their digests."""
    names = [name for name, _ in named_leaves(abstract_state)]
    return [name for name in names if is_param(name)] if meta.only_params else names


def named_leaves(tree: PyTree) -> list[tuple[str, Any]]:
    """Return the leaves of a tree with their names, in the order of `jax.tree.leaves`."""
    return [
        (layouts.name_of(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def is_param(name: str) -> bool:
    """Return whether an array of a state is a parameter of the network: a leaf of `params`."""
    return name.split("/")[0] == _PARAMS


def in_state(name: str) -> str:
    """Return the name of an array in the state, from that of a parameter in the model."""
    return f"{_PARAMS}/{name}/value"


def in_model(name: str) -> str:
    """Return the name of a parameter in the model, from that of an array in the state."""
    return name.removeprefix(f"{_PARAMS}/").removesuffix("/value")
