"""Matrix products in 8-bit floating point (FP8), forward and backward.

Activations and weights are rounded to E4M3, gradients to E5M2 (Micikevicius et al. 2022, FP8
formats for deep learning). Before that a tensor is scaled by its largest value, which comes near
the format's largest ("current scaling"). Scales are powers of two: so they change how no value is
rounded, but for values too small for the format, below 2^-13 of the largest in E4M3 and 2^-28 in
E5M2. Hence each device may scale its own part of a tensor, and no number goes round before a
product. Only weights that are gathered in 8 bits (`model.prefetch`) have one scale for all parts.

XLA finds `Scaled.value` before a product and then calls cuBLAS for 8 bits. On a CPU the product
runs in the format of the values: the rounding is the same, the order of sums is another.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from gpt3jax.sharding import rules

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
_LARGEST_EXPONENT = {E4M3: 8, E5M2: 15}  # of a power of two: the largest values are 1.75 times it

Plain: TypeAlias = Callable[[Array, Array], Array]
"""A product of an activation and a matrix in their own format."""
# Logical axes of dimensions that devices cut, by their letter in an einsum.
_AXES = {"b": "batch", "t": "seq", "h": "heads", "f": "mlp"}


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["values", "scale"], meta_fields=["axes"]
)
@dataclasses.dataclass(frozen=True)
class Scaled:
    """A tensor in 8 bits."""

    values: Array
    scale: Array
    """What the values are multiplied by, fp32."""
    axes: rules.Axes | None
    """Logical axes, where each device's part has a scale, `[parts of each dimension]`. None: there
    is one scale for all."""

    def value(self, dtype: DTypeLike) -> Array:
        """Return the tensor in another format, which holds it exactly."""

        def of_part(values: Array, scale: Array) -> Array:
            return values.astype(dtype) * scale.reshape(()).astype(dtype)

        if self.axes is None:
            return of_part(self.values, self.scale)
        of_parts = rules.map_shards(of_part, [self.axes, self.axes], self.axes)
        return of_parts(self.values, self.scale)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weight:
    """A matrix in 8 bits, with something to take the gradient of.

    JAX gives a gradient the format of the value. This one's is that of `stand_in`, an array of the
    matrix's shape in the compute format; its values are not used.
    """

    scaled: Scaled
    stand_in: Array


def in_parts(x: Array, dtype: DTypeLike, axes: rules.Axes) -> Scaled:
    """Return a tensor in 8 bits; each device scales its own part of it."""

    def scale_of_part(x: Array) -> Array:
        return _scale(jnp.max(jnp.abs(x), keepdims=True), dtype)

    def part(x: Array, scale: Array) -> Array:
        return _rounded(x, scale.reshape(()), dtype)

    scale = rules.map_shards(scale_of_part, [axes], axes)(x)
    return Scaled(rules.map_shards(part, [axes, axes], axes)(x, scale), scale, axes)


def in_layers(x_L: Array) -> Scaled:
    """Return matrices of stacked layers in E4M3, with a scale for each layer."""
    scale_L = _scale(jnp.max(jnp.abs(x_L), axis=tuple(range(1, x_L.ndim))), E4M3)
    scales = scale_L.reshape(-1, *(1 for _ in x_L.shape[1:]))
    return Scaled(_rounded(x_L, scales, E4M3), scale_L, None)


def _scale(largest: Array, dtype: DTypeLike) -> Array:
    """Return the power of two that values up to `largest` are divided by.

    That leaves them below the largest power of two in the format, and the largest of them not
    below its half.
    """
    _, exponent = jnp.frexp(largest.astype(jnp.float32))  # largest < 2^exponent
    return jnp.ldexp(jnp.float32(1), jnp.clip(exponent - _LARGEST_EXPONENT[dtype], -126, 126))


def _rounded(x: Array, scale: Array, dtype: DTypeLike) -> Array:
    return (x.astype(jnp.float32) * (1 / scale)).astype(dtype)


def product(plain: Plain, equation: str, x: Array, matrix: Array | Weight) -> Array:
    """Return `plain(x, matrix)` in the format of `x`, computed in 8 bits, as its gradients are.

    The equation is that of the product, of which the letters say how devices cut its tensors.
    """
    operand, rest = equation.split(",")
    x_axes, axes, out_axes = (
        tuple(_AXES.get(letter) for letter in term) for term in (operand, *rest.split("->"))
    )
    if not isinstance(matrix, Weight):
        matrix = Weight(in_parts(jax.lax.stop_gradient(matrix), E4M3, axes), matrix)
    return _product(plain, x_axes, out_axes, x, matrix)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _product(
    plain: Plain, x_axes: rules.Axes, out_axes: rules.Axes, x: Array, matrix: Weight
) -> Array:
    return _forward(plain, x_axes, out_axes, x, matrix)[0]


def _forward(
    plain: Plain, x_axes: rules.Axes, _: rules.Axes, x: Array, matrix: Weight
) -> tuple[Array, tuple[Scaled, Scaled]]:
    if "mlp" in x_axes:
        # The largest value is looked for once GELU is done: in one kernel XLA would leave too few
        # threads for GELU, which would take twice its time. Others gain nothing by a barrier, and
        # with barriers before all products the compiler of jax 0.10 fails on some layouts.
        x = jax.lax.optimization_barrier(x)
    operands = in_parts(x, E4M3, x_axes), matrix.scaled
    return plain(*(operand.value(x.dtype) for operand in operands)), operands


def _backward(
    plain: Plain,
    _: rules.Axes,
    out_axes: rules.Axes,
    operands: tuple[Scaled, Scaled],
    d_out: Array,
) -> tuple[Array, Weight]:
    pullback = jax.vjp(plain, *(operand.value(d_out.dtype) for operand in operands))[1]
    d_x, d_matrix = pullback(in_parts(d_out, E5M2, out_axes).value(d_out.dtype))
    return d_x, Weight(jax.tree.map(jnp.zeros_like, operands[1]), d_matrix)


_product.defvjp(_forward, _backward)
