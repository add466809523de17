"""Functions that run on each replica of the model and each pipeline stage, and sums over these.

A replica (`data`) has its own rows of the batch, a stage its own layers. Inside of such a function
these two axes are manual; all other axes are left to the partitioner.
"""

import functools
from collections.abc import Callable
from typing import TypeAlias, TypeVar

import jax
from jax.sharding import PartitionSpec

from gpt3jax.sharding import layouts, meshes, rules

Params = TypeVar("Params")
Result = TypeVar("Result")
Sums = TypeVar("Sums")
PyTree: TypeAlias = layouts.PyTree
Batch: TypeAlias = dict[str, jax.Array]
Sum: TypeAlias = jax.Array
Gradient: TypeAlias = Callable[[Params, Batch], tuple[Sum, Params]]
"""(params, rows of a batch) -> (sum, gradients like params)."""
_MANUAL = frozenset({"data", "stage"})


def sum_on_replicas(
    function: Callable[[Params, Batch], Sum], params: Params
) -> Callable[[Params, Batch], Sum]:
    """Return a function that adds up what `function` returns on each replica and stage.

    `params` are the parameters that it will be called with, or their shapes.
    """
    if _is_alone():
        return function
    return _on_replicas(
        lambda params, batch: _sum_over_both(function(params, batch)), params, PartitionSpec()
    )


def sum_grads_on_replicas(function: Gradient[Params], params: Params) -> Gradient[Params]:
    """Return a function that adds up the sum and the gradients that `function` returns.

    The gradients are added up once, at the end. Those of layers stay with their stage.
    """
    return _grads_on_replicas(function, params, _all_reduced, _spec_of_stage)


def scatter_grads_on_replicas(function: Gradient[Params], params: Params) -> Gradient[Params]:
    """Return `sum_grads_on_replicas` where a replica gets only its part of each gradient (ZeRO-1).

    `layouts.data_dim` is the dimension that is cut; gradients without one stay whole.
    """
    spec_of_part = functools.partial(_spec_of_part, jax.sharding.get_abstract_mesh())
    return _grads_on_replicas(function, params, _scattered, spec_of_part)


def _grads_on_replicas(
    function: Gradient[Params],
    params: Params,
    add_up: Callable[[PyTree], PyTree],
    spec_of: Callable[[PyTree], PyTree],
) -> Gradient[Params]:
    """Return `function` on each replica and stage: `add_up` and `spec_of` are of each gradient."""
    if _is_alone():
        return function

    def summed(params: Params, batch: Batch) -> tuple[Sum, Params]:
        loss_sum, grads = function(params, batch)
        return _sum_over_both(loss_sum), layouts.map_variables(add_up, grads)

    specs = layouts.map_variables(spec_of, params)
    return _on_replicas(summed, params, (PartitionSpec(), specs))


def _is_alone() -> bool:
    shape = jax.sharding.get_abstract_mesh().shape
    return bool(shape["data"] == shape["stage"] == 1)


def _on_replicas(
    function: Callable[[Params, Batch], Result], params: Params, out_specs: PyTree
) -> Callable[[Params, Batch], Result]:
    mapped: Callable[[Params, Batch], Result] = jax.shard_map(
        function,
        in_specs=(layouts.map_variables(_spec_of_stage, params), PartitionSpec(None, "data")),
        out_specs=out_specs,
        axis_names=_MANUAL,
        check_vma=False,
    )
    return mapped


def _spec_of_stage(variable: PyTree) -> PyTree:
    """Return how the manual axes cut a parameter: layers are cut by `stage`."""
    if not layouts.is_variable(variable):
        return PartitionSpec()
    spec = rules.spec(layouts.variable_axes(variable), frozenset(meshes.AXES) - _MANUAL)
    return jax.tree.map(lambda _: spec, variable)


def _spec_of_part(mesh: jax.sharding.AbstractMesh, variable: PyTree) -> PyTree:
    """Return how the manual axes cut a gradient that is scattered over `data`."""
    spec = _spec_of_stage(variable)
    if not layouts.is_variable(variable):
        return spec
    dim = layouts.data_dim(variable, mesh)
    return jax.tree.map(lambda whole: layouts.with_data(whole, dim), spec)


def _sum_over_both(x: Sums) -> Sums:
    return jax.lax.psum(x, ("data", "stage"))


def _belongs_to_stage(variable: PyTree) -> bool:
    return layouts.is_variable(variable) and layouts.is_of_layers(variable)


def _all_reduced(grad: PyTree) -> PyTree:
    return jax.lax.psum(grad, "data") if _belongs_to_stage(grad) else _sum_over_both(grad)


def _scattered(grad: PyTree) -> PyTree:
    dim = None
    if layouts.is_variable(grad):
        dim = layouts.data_dim(grad, jax.sharding.get_abstract_mesh())
    if dim is None:
        return _all_reduced(grad)
    if not _belongs_to_stage(grad):
        grad = jax.lax.psum(grad, "stage")
    # All axes are manual here: left to the partitioner, the gradient would be gathered first.
    scatter = functools.partial(
        jax.lax.psum_scatter, axis_name="data", scatter_dimension=dim, tiled=True
    )
    axes = layouts.variable_axes(grad)
    return jax.tree.map(rules.map_shards(scatter, [axes], axes), grad)
