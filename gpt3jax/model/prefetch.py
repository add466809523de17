"""Layers one after the other, with the weights of the next one on their way meanwhile.

Where `fsdp` cuts the weights, each layer's are gathered before use, and the gradients are added up
over the devices and cut again after it. Left alone, XLA starts these transfers late, and one behind
another, so the arithmetic waits. Here a layer is a list of parts (`Part`), and `run` goes through
them forward and backward itself. At fixed places (`Window`s) it starts to gather weights of the
next layer, or to add up gradients, and at others it asks for the result; an `optimization_barrier`
holds each place.

Matrices that are whole, and their gradients before they are added up, have two dimensions in front
for the devices that have a part of the activations each: those of `fsdp` and of `context` (shape
suffixes F and C). So gradients can be carried from layer to layer before they are added up.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from gpt3jax.model import float8, remat
from gpt3jax.sharding import layouts, rules

Tree: TypeAlias = Any
_InPeriod = TypeVar("_InPeriod")  # what each layer of a period has
Arrays: TypeAlias = dict[str, Array]
"""Weights of all layers, or gradients of a layer's, by name."""
Held: TypeAlias = dict[str, Array | float8.Scaled]
"""Weights by name, some of them in 8 bits."""


class Part(NamedTuple):
    """A part of a layer: `function(block, *inputs, args) -> output`."""

    output: str
    inputs: tuple[str, ...]
    weights: tuple[str, ...]
    """Those that the function reads, by their names in the block."""
    function: Callable[..., Array]
    is_affine: bool = False
    """Its derivative needs no value of its inputs."""


Period: TypeAlias = tuple[tuple[Part, ...], ...]
"""The parts of each layer of a period; layers repeat in periods."""


class Window(NamedTuple):
    """From when all of `start` are known until all of `end` are, these transfers are under way.

    `d NAME` is the gradient of a value; `dw NAME` are those of the weights of its part.
    """

    start: tuple[str, ...]
    end: tuple[str, ...]
    gather: tuple[str, ...] = ()
    """Parts whose weights are gathered for the next layer."""
    add: tuple[str, ...] = ()
    """Parts whose gradients are added up over the devices."""
    add_late: tuple[str, ...] = ()
    """Parts whose gradients of the layer before, in the order of work, are added up. Those of
    vectors are added up without being asked; here they need not be there before the window ends."""


class Weights:
    """The blocks of a stack by the names of their arrays."""

    def __init__(self, stack: Tree, dtype: str, *, in_8_bits: bool = False) -> None:
        """Know the stack's structure; matrices are gathered in `dtype`, or in 8 bits."""
        variables = jax.tree.leaves(stack, is_leaf=layouts.is_variable)
        self.names = layouts.array_names(stack)
        self._tree = jax.tree.structure(stack)
        self._axes = {
            name: variable.get_metadata("axes")
            for name, variable in zip(self.names, variables, strict=True)
        }
        self._dtype, self._in_8_bits = dtype, in_8_bits
        self.n_layers = len(jax.tree.leaves(stack)[0])

    def arrays(self, stack: Tree) -> Arrays:
        """Return the arrays of a stack by name."""
        return dict(zip(self.names, jax.tree.leaves(stack), strict=True))

    def is_cut(self, name: str) -> bool:
        """Return whether `fsdp` cuts a weight."""
        return "embed" in self._axes[name]

    def block(self, arrays: Mapping[str, Tree]) -> Tree:
        """Return a block with these arrays alone."""
        return jax.tree.unflatten(self._tree, [arrays.get(name) for name in self.names])

    def held(self, stack: Arrays) -> Held:
        """Return what each device keeps of a stack for the network: matrices that are gathered."""

        def hold(name: str, x_L: Array) -> Array | float8.Scaled:
            if not self.is_cut(name) or not self._in_8_bits:
                return x_L
            scaled = float8.in_layers(x_L.astype(self._dtype))
            values_L = rules.constrain(scaled.values, None, *self._axes[name])
            return dataclasses.replace(scaled, values=values_L)

        return {name: hold(name, x_L) for name, x_L in stack.items()}

    def shards(self, held: Held, layer: Array | int) -> Held:
        """Return what each device keeps of a layer's weights."""

        def of_layer(x_L: Array) -> Array:
            return jax.lax.dynamic_index_in_dim(x_L, layer, keepdims=False)

        def shard(name: str, x: Array | float8.Scaled) -> Array | float8.Scaled:
            if isinstance(x, float8.Scaled):
                values = rules.constrain(x.values, *self._axes[name])
                return dataclasses.replace(x, values=values)
            x = x.astype(self._dtype) if self.is_cut(name) else x
            return rules.constrain(x, *self._axes[name])

        return {name: shard(name, jax.tree.map(of_layer, x_L)) for name, x_L in held.items()}

    def gathered(self, shards: Held) -> Held:
        """Return weights as `run` uses them: matrices whole, `[F, C, ...]`."""
        return {name: self._gathered(name, x) for name, x in shards.items()}

    def _gathered(self, name: str, x: Array | float8.Scaled) -> Array | float8.Scaled:
        if isinstance(x, float8.Scaled):
            return dataclasses.replace(x, values=self._whole(name, x.values))
        return self._whole(name, x) if self.is_cut(name) else x

    def _whole(self, name: str, x: Array) -> Array:
        return self.fixed(name, jnp.broadcast_to(x, (*_n_parts(), *x.shape)))

    def trained(self, weight: Array | float8.Scaled) -> Array | float8.Weight:
        """Return a weight to take the gradient of."""
        if not isinstance(weight, float8.Scaled):
            return weight
        return float8.Weight(weight, jnp.zeros(weight.values.shape, self._dtype))

    def fixed(self, name: str, x: Array) -> Array:
        """Return a weight as `run` uses it, or its gradient, with its layout fixed."""
        axes = self._axes[name]
        if self.is_cut(name):
            axes = (*_parts(), *(None if axis == "embed" else axis for axis in axes))
        return rules.constrain(x, *axes)

    def added(self, grads: Arrays) -> Arrays:
        """Return gradients that are added up, cut as the weights are, in fp32."""

        def add(name: str, grad_FC: Array) -> Array:
            if not self.is_cut(name):
                return grad_FC  # a vector's is whole
            # Not jnp.sum, which would send 16-bit values as fp32.
            parts = tuple(range(len(_parts())))
            grad = jax.lax.reduce(grad_FC, grad_FC.dtype.type(0), jax.lax.add, parts)
            return rules.constrain(grad, *self._axes[name]).astype(jnp.float32)

        return {name: add(name, grad_FC) for name, grad_FC in grads.items()}

    def zeros(self, held: Held, names: Iterable[str]) -> Arrays:
        """Return zeros in the shapes of gathered weights."""

        def zero(name: str) -> Array:
            shape = jax.tree.leaves(held[name])[0].shape[1:]
            if not self.is_cut(name):
                return self.fixed(name, jnp.zeros(shape, jnp.float32))
            return self.fixed(name, jnp.zeros((*_n_parts(), *shape), self._dtype))

        return {name: zero(name) for name in names}


def _parts() -> tuple[str, ...]:
    """Return the axes of the dimensions in front of a whole matrix."""
    return ("embed", "seq") if rules.n_ways("seq") > 1 else ("embed",)


def _n_parts() -> tuple[int, ...]:
    return tuple(map(rules.n_ways, _parts()))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Layers:
    """What `run` runs.

    Attributes:
        parts: of each layer of a period.
        saved: values that the forward pass saves for the backward pass, besides the layer's input.
        kept: parts that do not run again, because what their derivative needs is saved.
        forward: the windows of the forward pass; all cut weights are in one of them.
        backward: the same, with the gradients of all cut weights.
        args: (arrays of `run`, number of a layer) -> the last argument of the parts' functions.
    """

    parts: Period
    saved: tuple[str, ...]
    kept: tuple[str, ...]
    forward: tuple[Window, ...]
    backward: tuple[Window, ...]
    weights: Weights
    args: Callable[[Tree, Array], Tree]

    def part(self, output: str) -> Part:
        """Return the part that makes a value."""
        return next(part for part in self.parts[0] if part.output == output)

    def cut_weights(self, outputs: Iterable[str]) -> list[str]:
        """Return the names of those weights of parts that `fsdp` cuts."""
        names = [name for output in outputs for name in self.part(output).weights]
        return [name for name in names if self.weights.is_cut(name)]

    def late_weights(self, window: Window) -> list[str]:
        """Return the weights of a window's late parts: those that are cut, or vectors alone."""
        names = [self.part(output).weights for output in window.add_late]
        return [n for part in names for n in [x for x in part if self.weights.is_cut(x)] or part]

    @property
    def late(self) -> list[str]:
        """The weights whose gradients are added up during the next layer's work."""
        return [name for window in self.backward for name in self.late_weights(window)]


def stretches(
    n_layers: int, period: tuple[_InPeriod, ...]
) -> list[tuple[int, int, tuple[_InPeriod, ...]]]:
    """Return stretches of layers, (first, stop), with what repeats in each.

    Layers repeat in periods; a last, shorter period may be left over.
    """
    n_whole = n_layers // len(period) * len(period)
    both = [(0, n_whole, period), (n_whole, n_layers, period[: n_layers - n_whole])]
    return [stretch for stretch in both if stretch[0] < stretch[1]]


class Saved(NamedTuple):
    """What the forward pass of a layer saves: values, and what the derivatives of parts need."""

    values: dict[str, Array]
    kept: dict[str, list[Array]]


class _Pass:
    """One layer's values on one pass, and the transfers that go on beside them."""

    def __init__(
        self, layers: Layers, windows: Sequence[Window], shards: Held, late_grads: Arrays
    ) -> None:
        self._layers, self._windows, self._shards = layers, windows, shards
        self._late_grads = late_grads
        self._known: set[str] = set()
        self._under_way: dict[Window, tuple[Held, Arrays, Arrays]] = {}
        self._done: set[Window] = set()
        self.values: dict[str, Tree] = {}
        self.gathered = layers.weights.gathered(
            {name: x for name, x in shards.items() if not layers.weights.is_cut(name)}
        )
        self.added: Arrays = {}
        self.late_added: Arrays = {}

    def set(self, name: str, value: Tree) -> None:
        """Make a value known, and let the windows begin and end that wait for it."""
        self.values[name] = value
        self._known.add(name)
        for window in self._windows:
            if window in self._under_way and self._known.issuperset(window.end):
                self._finish(window)
        for window in self._windows:
            is_new = window not in self._under_way and window not in self._done
            if is_new and self._known.issuperset(window.start):
                self._begin(window)

    def _begin(self, window: Window) -> None:
        shards = {name: self._shards[name] for name in self._layers.cut_weights(window.gather)}
        grads: Arrays = {}
        for output in window.add:
            grads |= self.values.pop(f"dw {output}")
        late = {name: self._late_grads[name] for name in self._layers.late_weights(window)}
        matrices = {name: grad for name, grad in late.items() if self._layers.weights.is_cut(name)}
        shards, grads, matrices = self._tied(window.start, (shards, grads, matrices))
        weights = self._layers.weights
        added_late = late | weights.added(matrices)
        transfers = weights.gathered(shards), weights.added(grads), added_late
        self._under_way[window] = transfers

    def _finish(self, window: Window) -> None:
        gathered, added, late = self._tied(window.end, self._under_way.pop(window))
        self._done.add(window)
        self.gathered |= gathered
        self.added |= added
        self.late_added |= late

    def _tied(self, names: tuple[str, ...], arrays: Tree) -> Tree:
        """Return arrays that are there no earlier than the values, and the other way round."""
        values = {name: self.values[name] for name in names if name in self.values}
        values, arrays = jax.lax.optimization_barrier((values, arrays))
        self.values |= values
        return arrays

    def finish(self) -> None:
        """Check that no transfer is left over."""
        assert len(self._done) == len(self._windows), set(self._windows) - self._done


class _Run(NamedTuple):
    """A part with what it reads."""

    function: Callable[[Tree, list[Array]], Array]
    weights: dict[str, Array | float8.Weight]
    inputs: list[Array]

    def kept(self) -> tuple[Array, list[Array]]:
        """Return the part's output, and what its derivative needs besides what it reads."""
        output, pullback = self._pullback()
        return output, [x for x in jax.tree.leaves(pullback) if not self._reads(x)]

    def pullback_from(self, kept: list[Array]) -> Callable[[Array], Tree]:
        """Return the part's pullback from what `kept` returned; the part does not run for it."""
        leaves, tree = jax.tree.flatten(self._pullback()[1])
        values = iter(kept)
        leaves = [x if self._reads(x) else next(values) for x in leaves]
        pullback: Callable[[Array], Tree] = jax.tree.unflatten(tree, leaves)
        return pullback

    def _pullback(self) -> tuple[Array, Callable[[Array], Tree]]:
        return jax.vjp(remat.keeping_attention(self.function), self.weights, self.inputs)

    def _reads(self, x: Array) -> bool:
        return any(x is read for read in jax.tree.leaves((self.weights, self.inputs)))


def _run_of(layers: Layers, part: Part, weights: Held, inputs: list[Array], args: Tree) -> _Run:
    def function(weights: Tree, inputs: list[Array]) -> Array:
        return part.function(layers.weights.block(weights), *inputs, args)

    trained = {name: layers.weights.trained(weights[name]) for name in part.weights}
    return _Run(function, trained, inputs)


class _Backward(_Pass):
    """The backward pass of a layer."""

    def __init__(self, layers: Layers, shards: Held, late_grads: Arrays, saved: Saved) -> None:
        """Begin with the saved values."""
        super().__init__(layers, layers.backward, shards, late_grads)
        self.vector_grads: Arrays = {}
        self._pullbacks: dict[str, Callable[[Array], Tree]] = {}
        self._saved = saved

    def start(self, parts: Sequence[Part], d_out: Array) -> None:
        """Begin with the saved values and the gradient of the last part's output."""
        self._waits = collections.Counter(name for part in parts for name in part.inputs)
        for name, value in self._saved.values.items():
            self.set(name, value)
        self.set(f"d {parts[-1].output}", d_out)

    def make(self, part: Part, weights: Held, args: Tree) -> None:
        """Run a part again."""
        inputs = [self.values[name] for name in part.inputs]
        run = _run_of(self._layers, part, weights, inputs, args)
        output, self._pullbacks[part.output] = jax.vjp(run.function, run.weights, run.inputs)
        self.set(part.output, output)

    def pull(self, part: Part, weights: Held, args: Tree) -> None:
        """Turn the gradient of a part's output into those of its inputs and weights."""
        d_output = self.values[f"d {part.output}"]
        d_weights, d_inputs = self._pullback(part, weights, args)(d_output)
        of_part = self._layers.weights
        d_weights = {name: of_part.fixed(name, _gradient(d)) for name, d in d_weights.items()}
        late = self._layers.late
        to_add = {n: g for n, g in d_weights.items() if of_part.is_cut(n) or n in late}
        self.vector_grads |= {n: g for n, g in d_weights.items() if n not in to_add}
        if to_add:
            self.set(f"dw {part.output}", to_add)
        for name, grad in zip(part.inputs, d_inputs, strict=True):
            total = f"d {name}"
            self.values[total] = self.values[total] + grad if total in self.values else grad
            self._waits[name] -= 1
            if not self._waits[name]:
                self.set(total, self.values[total])

    def left_over(self) -> Arrays:
        """Return the gradients that are to be added up during the next layer's work."""
        grads = (value for name, value in self.values.items() if name.startswith("dw "))
        return {name: grad for of_part in grads for name, grad in of_part.items()}

    def _pullback(self, part: Part, weights: Held, args: Tree) -> Callable[[Array], Tree]:
        if part.output in self._pullbacks:
            return self._pullbacks[part.output]
        values = self.values
        if part.is_affine:  # it may do without its inputs: any values of their shape serve
            values = dict.fromkeys(part.inputs, self.values[f"d {part.output}"]) | values
        inputs = [values[name] for name in part.inputs]
        run = _run_of(self._layers, part, weights, inputs, args)
        if part.output in self._saved.kept:
            return run.pullback_from(self._saved.kept[part.output])
        pullback: Callable[[Array], Tree] = jax.vjp(run.function, run.weights, run.inputs)[1]
        return pullback


def _gradient(d_weight: Array | float8.Weight) -> Array:
    return d_weight.stand_in if isinstance(d_weight, float8.Weight) else d_weight


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def run(layers: Layers, stack: Arrays, x: Array, arrays: Tree) -> Array:
    """Return `x` after all layers of a stack; the arrays go to the function `args`."""
    return _run_forward(layers, layers.weights.held(stack), x, arrays, saves=False)[0]


_AllSaved = list[tuple[Saved, ...]]  # of each stretch and layer of its period, stacked
_Residuals: TypeAlias = tuple[Held, _AllSaved, Tree]


def _forward(layers: Layers, stack: Arrays, x: Array, arrays: Tree) -> tuple[Array, _Residuals]:
    held = layers.weights.held(stack)
    x, saved = _run_forward(layers, held, x, arrays, saves=True)
    return x, (held, saved, arrays)


def _run_forward(
    layers: Layers, held: Held, x: Array, arrays: Tree, *, saves: bool
) -> tuple[Array, _AllSaved]:
    weights, all_saved = layers.weights, _AllSaved()

    def layer(
        carry: tuple[Array, Held], number: Array, parts: Sequence[Part]
    ) -> tuple[tuple[Array, Held], Saved]:
        x, whole = carry
        following = weights.shards(held, jnp.minimum(number + 1, weights.n_layers - 1))
        this = _Pass(layers, layers.forward, following, {})
        this.set("x", x)
        args, kept = layers.args(arrays, number), {}
        for part in parts:
            inputs = [this.values[name] for name in part.inputs]
            one = _run_of(layers, part, whole, inputs, args)
            if saves and part.output in layers.kept:
                output, kept[part.output] = one.kept()
            else:
                output = one.function(one.weights, one.inputs)
            this.set(part.output, output)
        this.finish()
        saved = {name: this.values[name] for name in ("x", *layers.saved) if saves}
        return (this.values[parts[-1].output], this.gathered), Saved(saved, kept)

    carry = x, weights.gathered(weights.shards(held, 0))
    for first, stop, period in stretches(weights.n_layers, layers.parts):

        def step(
            carry: tuple[Array, Held], number: Array, period: Period = period
        ) -> tuple[tuple[Array, Held], tuple[Saved, ...]]:
            saved = []
            for i, parts in enumerate(period):
                carry, of_layer = layer(carry, number + i, parts)
                saved.append(of_layer)
            return carry, tuple(saved)

        carry, saved = jax.lax.scan(step, carry, jnp.arange(first, stop, len(period)))
        all_saved.append(saved)
    return carry[0], all_saved


_BackwardCarry: TypeAlias = tuple[Array, Held, Arrays]  # dx, weights, late gradients


def _backward(layers: Layers, residuals: _Residuals, dx: Array) -> tuple[Arrays, Array, None]:
    held, all_saved, arrays = residuals
    weights = layers.weights

    def layer(
        carry: _BackwardCarry, number: Array, saved: Saved, parts: Sequence[Part]
    ) -> tuple[_BackwardCarry, Arrays]:
        dx, whole, late = carry
        following = weights.shards(held, jnp.maximum(number - 1, 0))
        this = _Backward(layers, following, late, saved)
        args = layers.args(arrays, number)
        this.start(parts, dx)
        this.pull(parts[-1], whole, args)
        needed = _needed(parts, {"x", *layers.saved}, layers.kept)
        for part in parts[:-1]:
            if part.output in needed:
                this.make(part, whole, args)
        for part in reversed(parts[:-1]):
            this.pull(part, whole, args)
        this.finish()
        grads = this.vector_grads | this.added | this.late_added
        return (this.values["d x"], this.gathered, this.left_over()), grads

    end = weights.n_layers - 1
    last_weights = weights.gathered(weights.shards(held, end))
    carry: _BackwardCarry = dx, last_weights, weights.zeros(held, layers.late)
    all_grads = list[Arrays]()
    all_stretches = stretches(weights.n_layers, layers.parts)
    for (first, stop, period), of_stretch in zip(
        reversed(all_stretches), reversed(all_saved), strict=True
    ):

        def step(
            carry: _BackwardCarry, of_period: tuple[Array, tuple[Saved, ...]],
            period: Period = period,
        ) -> tuple[_BackwardCarry, Arrays]:  # fmt: skip
            number, saved = of_period
            grads = list[Arrays]()
            for i in reversed(range(len(period))):
                carry, of_layer = layer(carry, number + i, saved[i], period[i])
                grads.insert(0, of_layer)
            return carry, jax.tree.map(lambda *layers: jnp.stack(layers), *grads)

        numbers = jnp.arange(first, stop, len(period))
        carry, grads = jax.lax.scan(step, carry, (numbers, of_stretch), reverse=True)
        all_grads.insert(0, jax.tree.map(lambda g: g.reshape(-1, *g.shape[2:]), grads))
    d_stack = jax.tree.map(lambda *parts: jnp.concatenate(parts), *all_grads)
    # Late gradients are one layer too early; those of the first layer are still to be added up.
    for name, grad in weights.added(carry[2]).items():
        d_stack[name] = jnp.concatenate([grad[None], d_stack[name][:-1]])
    return d_stack, carry[0], None


def _needed(parts: Sequence[Part], known: set[str], kept: Sequence[str]) -> set[str]:
    """Return the values that the backward pass computes again."""
    needed = set[str]()
    for part in reversed(parts[:-1]):
        if part.output in needed or not part.is_affine:
            needed |= set(part.inputs) - known
    assert not needed & set(kept)
    return needed


run.defvjp(_forward, _backward)
