"""The layout of parameters, optimizer state and gradients, from their declared axes."""

import math
from typing import Any

import jax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from gpt3jax import errors
from gpt3jax.config import ranges
from gpt3jax.sharding import rules


def constrain_like_params(tree: Any) -> Any:
    """Fix each variable of a module-shaped tree (gradients, say) to its parameter's layout."""

    def one(variable: nnx.Variable[Any]) -> Any:
        return jax.tree.map(lambda x: rules.constrain(x, *variable_axes(variable)), variable)

    return jax.tree.map(one, tree, is_leaf=is_variable)


def array_names(tree: Any) -> list[str]:
    """Return the name of each array of a tree of variables, as `blocks/mlp/w_in_DF`."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]
    return [name.removesuffix("/value") for name in names]


def is_variable(node: Any) -> bool:
    """Tell a parameter, moment or gradient with its metadata from a plain array."""
    return isinstance(node, nnx.Variable)


def variable_axes(variable: nnx.Variable[Any]) -> tuple[str | None, ...]:
    """Return the declared logical axes; what stacks layers adds dimensions but no names.

    Layers are stacked as `[L, ...]`, or, of R virtual stages, as `[R, L / R, ...]`.
    """
    axes: tuple[str | None, ...] = variable.get_metadata("axes")
    n_stacked = variable.get_value().ndim - len(axes)
    return ((), ("layers",), (None, "layers"))[n_stacked] + axes


def data_dim(variable: nnx.Variable[Any], mesh: Any) -> int | None:
    """Return which dimension of a parameter `data` cuts where it shards the optimizer.

    The largest that it divides and no other axis cuts; None if there is none, as in small vectors.
    """
    n_data = mesh.shape["data"]
    best, dim = 0, None
    for i, axis in enumerate(variable_axes(variable)):
        size = variable.get_value().shape[i]
        if (
            size > best
            and size % n_data == 0
            and all(mesh.shape[a] == 1 for a in rules.RULES[axis])
        ):
            best, dim = size, i
    return dim


def with_data(specification: PartitionSpec, dim: int | None) -> PartitionSpec:
    """Return a specification that cuts one more dimension, by `data` (None: none)."""
    entries = list(specification)
    if dim is not None:
        entries[dim] = "data"
    return PartitionSpec(*entries)


def state_shardings(abstract_state: Any, mesh: jax.sharding.Mesh, over_data: bool = False) -> Any:
    """Return the NamedSharding of every leaf of a state: parameters, moments, counters.

    Used for init, for the step and as the restore target. Plain arrays are replicated. With
    `over_data`, parameters and moments are cut by `data` too (`data_dim`).

    Raises:
        UserError: a dimension that its mesh axes do not divide; it names tensor and numbers.
    """
    replicated = NamedSharding(mesh, PartitionSpec())

    def one(path: Any, node: Any) -> Any:
        if not is_variable(node):
            return replicated
        axes = variable_axes(node)
        _check_divides(jax.tree_util.keystr(path, simple=True, separator="/"), node, axes, mesh)
        specification = with_data(rules.spec(axes), data_dim(node, mesh) if over_data else None)
        return jax.tree.map(lambda _: NamedSharding(mesh, specification), node)

    return jax.tree.map_with_path(one, abstract_state, is_leaf=is_variable)


def _check_divides(name: str, variable: Any, axes: Any, mesh: jax.sharding.Mesh) -> None:
    for size, axis in zip(variable.get_value().shape, axes, strict=True):
        ways = math.prod(mesh.shape[a] for a in rules.RULES[axis])
        if size % ways:
            raise errors.UserError(
                f"mesh.{'*'.join(rules.RULES[axis])}={ways} does not divide {axis}={size} of "
                f"{name}: use one of {ranges.divisors(size)}"
            )
