"""The layout of parameters, optimizer state and gradients, from the axes that they declare.

`state_shardings` turns the declared logical axes into the layout of a whole train state. Init, the
training step and the restore target all use it.
"""

import math
from collections.abc import Callable
from typing import Any, TypeAlias, TypeGuard, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from gpt3jax import errors
from gpt3jax.config import ranges
from gpt3jax.sharding import rules

PyTree: TypeAlias = Any  # nested containers of variables and arrays, or of what stands for them
Tree = TypeVar("Tree")
Variable: TypeAlias = "nnx.Variable[jax.Array]"


def state_shardings(abstract_state: PyTree, mesh: Mesh, *, over_data: bool = False) -> PyTree:
    """Return the NamedSharding of every leaf of a state: parameters, moments, counters.

    Plain arrays are replicated. With `over_data`, the `data` axis cuts parameters and moments too,
    along their `data_dim`.

    Raises:
        UserError: mesh axes do not divide a dimension; the message names tensor and numbers.
    """
    replicated = NamedSharding(mesh, PartitionSpec())

    def sharding_of(path: tuple[Any, ...], node: PyTree) -> PyTree:
        if not is_variable(node):
            return replicated
        _check_divides(name_of(path), node, mesh)
        dim = data_dim(node, mesh) if over_data else None
        spec = with_data(rules.spec(variable_axes(node)), dim)
        return jax.tree.map(lambda _: NamedSharding(mesh, spec), node)

    return jax.tree.map_with_path(sharding_of, abstract_state, is_leaf=is_variable)


def bytes_per_device(abstract_state: PyTree) -> int:
    """Return the bytes that a device holds of a state with shardings."""
    leaves = jax.tree.leaves(abstract_state)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def constrain_like_params(tree: Tree) -> Tree:
    """Fix each variable of a module-shaped tree (gradients, say) to its parameter's layout."""

    def constrain(variable: Variable) -> Variable:
        return jax.tree.map(lambda x: rules.constrain(x, *variable_axes(variable)), variable)

    return map_variables(constrain, tree)


def zeros_like_params(params: Tree) -> Tree:
    """Return fp32 zeros in the shapes and layouts of parameters, to add gradients to."""
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    return constrain_like_params(zeros)


def data_dim(variable: Variable, mesh: Mesh | AbstractMesh) -> int | None:
    """Return the dimension of a parameter that `data` cuts where it shards the optimizer.

    This is the largest dimension that `data` divides and that no other axis cuts; None if there
    is none, as in small vectors.
    """
    n_data = mesh.shape["data"]
    largest, dim = 0, None
    for i, axis in enumerate(variable_axes(variable)):
        size = variable.get_value().shape[i]
        is_whole = all(mesh.shape[a] == 1 for a in rules.RULES[axis])
        if size > largest and size % n_data == 0 and is_whole:
            largest, dim = size, i
    return dim


def with_data(spec: PartitionSpec, dim: int | None) -> PartitionSpec:
    """Return a specification that also cuts dimension `dim` by `data`; None cuts nothing."""
    entries = list(spec)
    if dim is not None:
        entries[dim] = "data"
    return PartitionSpec(*entries)


def variable_axes(variable: Variable) -> tuple[str | None, ...]:
    """Return the logical axes of a variable, with those of the dimensions that stack layers.

    Layers are stacked as `[L, ...]` or, with R virtual stages, as `[R, L / R, ...]`.
    """
    axes: tuple[str | None, ...] = variable.get_metadata("axes")
    n_stacked = variable.get_value().ndim - len(axes)
    return ((), ("layers",), (None, "layers"))[n_stacked] + axes


def is_of_layers(variable: Variable) -> bool:
    """Return whether a variable stacks the layers' own arrays."""
    return "layers" in variable_axes(variable)


def map_variables(function: Callable[..., PyTree], tree: PyTree, *rest: PyTree) -> PyTree:
    """Return a tree (and trees like it) with `function` called for each variable or plain array."""
    return jax.tree.map(function, tree, *rest, is_leaf=is_variable)


def is_variable(node: PyTree) -> TypeGuard[Variable]:
    """Return whether a node is a parameter, moment or gradient with its metadata, not an array."""
    return isinstance(node, nnx.Variable)


def array_names(tree: PyTree) -> list[str]:
    """Return the name of each array of a tree of variables, such as `blocks/mlp/w_in_DF`."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    return [name_of(path).removesuffix("/value") for path in paths]


def name_of(path: jax.tree_util.KeyPath[object]) -> str:
    """Return the name of a node from its path in a tree: its keys with slashes between them."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _check_divides(name: str, variable: Variable, mesh: Mesh) -> None:
    sizes = variable.get_value().shape
    for size, axis in zip(sizes, variable_axes(variable), strict=True):
        mesh_axes = rules.RULES[axis]
        ways = math.prod(mesh.shape[a] for a in mesh_axes)
        if size % ways:
            raise errors.UserError(
                f"mesh.{'*'.join(mesh_axes)}={ways} does not divide {axis}={size} of {name}: "
                f"use one of {ranges.divisors(size)}",
                page="parallelism.md#which-sizes-are-possible",
            )
