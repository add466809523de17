"""GPT-3: a pre-LayerNorm transformer with learned positions, biases and a tied head.

NNX modules only hold parameters; each is a pytree that plain `jax.jit`, `grad`, `scan` and Optax
accept. Blocks are stacked along a leading layer dimension and scanned. Numerics follow Megatron-LM;
docs/from_megatron.md lists the deliberate differences.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from gpt3jax.config import schema
from gpt3jax.model import attention, dropout, embedding_lookup, float8, gelu, prefetch, remat
from gpt3jax.sharding import rules


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compute:
    """How the network runs on this mesh: settings that change speed and rounding, no parameter."""

    dtype: str = "float32"
    attention: str = "xla"
    sequence_parallel: bool = False
    prefetch: bool = False  # gather each layer's weights during the layer before (model.prefetch)
    float8: bool = False  # products of layers in 8 bits (model.float8)
    end_layers: int = 0  # layers at either end whose products are not

    @property
    def residual_axes(self) -> tuple[str | None, str | None, None]:
        """Logical axes of the residual stream, norms and dropout."""
        return ("batch", "seq_shard" if self.sequence_parallel else "seq", None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardArgs:
    """The arguments that all layers of a forward pass share."""

    segments_BT: Array | None = None  # document numbers, where documents are hidden from each other
    noise: dropout.Noise | None = None  # None: without dropout (evaluation)
    compute: Compute = Compute()

    def fold(self, number: int | Array) -> "ForwardArgs":
        """Return the arguments of a part of the network, which has dropout's noise of its own."""
        if self.noise is None:
            return self
        return dataclasses.replace(self, noise=self.noise.fold(number))


Axes: TypeAlias = tuple[str | None, ...]


def weight(key: Array, shape: tuple[int, ...], std: float, axes: Axes) -> nnx.Param[Array]:
    """Return a matrix drawn from N(0, std), fp32, subject to weight decay."""
    return nnx.Param(std * jax.random.normal(key, shape, jnp.float32), axes=axes, decays=True)


def vector(value: float, shape: tuple[int, ...], axes: Axes) -> nnx.Param[Array]:
    """Return a bias or scale, fp32, without weight decay."""
    return nnx.Param(jnp.full(shape, value, jnp.float32), axes=axes, decays=False)


def product(equation: str, x_BT: Array, weight: nnx.Param[Array], compute: Compute) -> Array:
    """Return the product of an activation `[B, T, ...]` and a matrix, in the activation's format.

    A matrix may have dimensions `[F, C]` in front for the devices that have a part of B and T each
    (see `model.prefetch`): then it meets their part.
    """
    matrix = weight.get_value()
    if isinstance(matrix, Array):  # else it is a `float8.Weight`
        matrix = matrix.astype(x_BT.dtype)
    plain = functools.partial(_plain_product, equation)
    if compute.float8:
        return float8.product(plain, equation, x_BT, matrix)
    return plain(x_BT, matrix)


def _plain_product(equation: str, x_BT: Array, w: Array) -> Array:
    x, matrix, out = re.split(",|->", equation)
    if w.ndim == len(matrix):
        return _einsum(equation, x_BT, w)
    if w.ndim == len(matrix) + 1:
        x_FBT = x_BT.reshape(len(w), -1, *x_BT.shape[1:])
        out_FBT = _einsum(f"x{x},x{matrix}->x{out}", x_FBT, w)
        return out_FBT.reshape(-1, *out_FBT.shape[2:])
    x, out = (term.replace("bt", "xbyt") for term in (x, out))
    x_FBCT = x_BT.reshape(w.shape[0], -1, w.shape[1], x_BT.shape[1] // w.shape[1], *x_BT.shape[2:])
    out_FBCT = _einsum(f"{x},xy{matrix}->{out}", x_FBCT, w)
    return out_FBCT.reshape(*x_BT.shape[:2], *out_FBCT.shape[4:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _einsum(equation: str, x: Array, w: Array) -> Array:
    """Return an einsum; the gradient of `w` is made in its own order of dimensions.

    JAX's would be made in another one and be copied, because that of QKV is cut along the first.
    """
    return jnp.einsum(equation, x, w)


def _einsum_forward(equation: str, x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return _einsum(equation, x, w), (x, w)


def _einsum_backward(
    equation: str, operands: tuple[Array, Array], d_out: Array
) -> tuple[Array, Array]:
    (x, w), (left, right, out) = operands, re.split(",|->", equation)
    d_x = jnp.einsum(f"{out},{right}->{left}", d_out, w)
    return d_x, jnp.einsum(f"{left},{out}->{right}", x, d_out)


_einsum.defvjp(_einsum_forward, _einsum_backward)


@jax.custom_vjp
def apart(x: Array) -> Array:
    """Return x; the gradient that comes back for it is finished before anything is made of it.

    Else XLA sums the gradient of a bias in the kernel that makes this one, and slows all of it
    down: the sums leave few threads for the rest.
    """
    return x


apart.defvjp(lambda x: (x, None), lambda _, d_x: (jax.lax.optimization_barrier(d_x),))


class LayerNorm(nnx.Module):
    """LayerNorm with fp32 statistics."""

    def __init__(self, model: schema.Model):
        self.scale_D = vector(1.0, (model.d_model,), (None,))
        self.bias_D = vector(0.0, (model.d_model,), (None,))
        self.eps = model.norm_eps

    def __call__(self, x_BTD: Array, dtype: str) -> Array:
        """Return the normalised input in `dtype`."""
        x_BTD = x_BTD.astype(jnp.float32)
        centred_BTD = x_BTD - x_BTD.mean(-1, keepdims=True)
        variance_BT1 = (centred_BTD**2).mean(-1, keepdims=True)
        normed_BTD = centred_BTD * jax.lax.rsqrt(variance_BT1 + self.eps)
        return (normed_BTD * self.scale_D[...] + self.bias_D[...]).astype(dtype)


class Attention(nnx.Module):
    """Multi-head causal self-attention."""

    def __init__(self, model: schema.Model, key: Array):
        k_qkv, k_out = jax.random.split(key)
        d, h, k = model.d_model, model.n_heads, model.d_head
        self.w_qkv_D3HK = weight(
            k_qkv, (d, 3, h, k), model.init_std, ("embed", None, "heads", "head_dim")
        )
        self.b_qkv_3HK = vector(0.0, (3, h, k), (None, "heads", "head_dim"))
        self.w_out_HKD = weight(k_out, (h, k, d), output_std(model), ("heads", "head_dim", "embed"))
        self.b_out_D = vector(0.0, (d,), (None,))
        self.dropout_rate = model.attention_dropout
        self.gather_again = model.remat in ("dots", "mlp")

    def qkv(self, x_BTD: Array, args: ForwardArgs) -> Array:
        """Return queries, keys and values, `[B, T, 3, H, K]`."""
        qkv_BT3HK = product("btd,dchk->btchk", x_BTD, self.w_qkv_D3HK, args.compute)
        qkv_BT3HK += self.b_qkv_3HK[...].astype(args.compute.dtype)
        return rules.constrain(qkv_BT3HK, "batch", "seq", None, "heads", "head_dim")

    def attend(self, qkv_BT3HK: Array, window: int | None, args: ForwardArgs) -> Array:
        """Return the branch's output without its bias, which is added in the residual's layout."""
        options = attention.Options(
            implementation=args.compute.attention,
            window=window,
            dropout_rate=self.dropout_rate,
            gather_again=self.gather_again,
        )
        out_BTHK = attention.attend(
            *(qkv_BT3HK[:, :, i] for i in range(3)),
            options=options,
            segments_BT=args.segments_BT,
            noise=args.noise,
        )
        out_BTHK = rules.constrain(out_BTHK, "batch", "seq", "heads", "head_dim")
        return product("bthk,hkd->btd", out_BTHK, self.w_out_HKD, args.compute)


class Mlp(nnx.Module):
    """Two matrices with GELU between them."""

    def __init__(self, model: schema.Model, key: Array):
        k_in, k_down = jax.random.split(key)
        d, f = model.d_model, model.d_ff
        self.w_in_DF = weight(k_in, (d, f), model.init_std, ("embed", "mlp"))
        self.b_in_F = vector(0.0, (f,), ("mlp",))
        self.w_down_FD = weight(k_down, (f, d), output_std(model), ("mlp", "embed"))
        self.b_down_D = vector(0.0, (d,), (None,))
        self.approximate = model.gelu == "tanh"
        self.hidden_is_saved = "hidden" in remat.SAVED[model.remat]

    def hidden(self, x_BTD: Array, args: ForwardArgs) -> Array:
        """Return the hidden layer before GELU, `[B, T, F]`."""
        hidden_BTF = product("btd,df->btf", x_BTD, self.w_in_DF, args.compute)
        hidden_BTF += self.b_in_F[...].astype(args.compute.dtype)
        if not args.compute.prefetch:  # there a window's barrier does the same
            hidden_BTF = apart(hidden_BTF)
        return rules.constrain(hidden_BTF, "batch", "seq", "mlp")

    def activate(self, hidden_BTF: Array) -> Array:
        """Return the hidden layer after GELU."""
        if self.approximate and self.hidden_is_saved:
            return gelu.gelu(hidden_BTF)
        return remat.elementwise(jax.nn.gelu)(hidden_BTF, self.approximate)

    def down(self, activated_BTF: Array, args: ForwardArgs) -> Array:
        """Return the branch's output without its last bias (see `Attention.attend`)."""
        return product("btf,fd->btd", activated_BTF, self.w_down_FD, args.compute)


class Block(nnx.Module):
    """One layer: attention, then MLP, each behind a LayerNorm and added to the residual."""

    def __init__(self, model: schema.Model, key: Array):
        k_attention, k_mlp = jax.random.split(key)
        self.norm_1 = LayerNorm(model)
        self.attention = Attention(model, k_attention)
        self.norm_2 = LayerNorm(model)
        self.mlp = Mlp(model, k_mlp)
        self.dropout_rate = model.dropout

    def __call__(self, x_BTD: Array, window: int | None, args: ForwardArgs) -> Array:
        """Return the residual stream after the layer."""
        values = {"x": x_BTD}
        for part in block_parts(window):
            value = part.function(self, *(values[name] for name in part.inputs), args)
            values[part.output] = checkpoint_name(value, part.output)
        return values["out"]

    def norm_branch(self, norm: LayerNorm, x_BTD: Array, args: ForwardArgs) -> Array:
        """Return a branch's input, whole along the sequence."""
        # Both constraints are needed: with the second alone the fp32 value is gathered over the
        # tensor axis; with none the partitioner gathers weights instead.
        normed_BTD = remat.elementwise(norm)(x_BTD, args.compute.dtype)
        normed_BTD = rules.constrain(normed_BTD, *args.compute.residual_axes)
        return rules.constrain(normed_BTD, "batch", "seq", None)

    def add(
        self, x_BTD: Array, out_BTD: Array, bias_D: nnx.Param[Array], args: ForwardArgs
    ) -> Array:
        """Add a branch's output to the residual stream, with its bias and dropout."""
        # Both constraints are needed here too: with the second alone, and `context` in use, the
        # partitioner gathers the whole sequence before the product.
        out_BTD = rules.constrain(out_BTD, "batch", "seq", None)
        out_BTD = rules.constrain(out_BTD, *args.compute.residual_axes)
        out_BTD += bias_D[...].astype(args.compute.dtype)
        x_BTD += dropout.apply(out_BTD, self.dropout_rate, args.noise)
        return rules.constrain(x_BTD, *args.compute.residual_axes)


def block_parts(window: int | None) -> tuple[prefetch.Part, ...]:
    """Return a layer as its parts, in order: what each makes, of which values, by which weights."""
    part = prefetch.Part
    return (
        part("normed_1", ("x",), ("norm_1/scale_D", "norm_1/bias_D"),
             lambda block, x, args: block.norm_branch(block.norm_1, x, args)),
        part("qkv", ("normed_1",), ("attention/w_qkv_D3HK", "attention/b_qkv_3HK"),
             lambda block, normed, args: block.attention.qkv(normed, args)),
        part("projected", ("qkv",), ("attention/w_out_HKD",),
             lambda block, qkv, args: block.attention.attend(qkv, window, args.fold(0))),
        part("middle", ("x", "projected"), ("attention/b_out_D",),
             lambda block, x, out, args: block.add(x, out, block.attention.b_out_D, args.fold(1)),
             is_affine=True),
        part("normed_2", ("middle",), ("norm_2/scale_D", "norm_2/bias_D"),
             lambda block, x, args: block.norm_branch(block.norm_2, x, args)),
        part("hidden", ("normed_2",), ("mlp/w_in_DF", "mlp/b_in_F"),
             lambda block, normed, args: block.mlp.hidden(normed, args)),
        part("activated", ("hidden",), (),
             lambda block, hidden, _: block.mlp.activate(hidden)),
        part("down", ("activated",), ("mlp/w_down_FD",),
             lambda block, activated, args: block.mlp.down(activated, args)),
        part("out", ("middle", "down"), ("mlp/b_down_D",),
             lambda block, x, out, args: block.add(x, out, block.mlp.b_down_D, args.fold(2)),
             is_affine=True),
    )  # fmt: skip


# Which transfers go on beside which products. A product whose result is added up over `tensor` has
# no window that ends with it: the barrier would keep the sum from being scattered. None ends with
# what enters GELU on the way forward: cuBLAS then runs GELU at the end of the product. Windows that
# could be open together follow each other, or XLA would make one transfer of two. What a later
# product needs over `tensor` is there before a long transfer begins that it would stand behind:
# hence `normed_1` before the gradient of the MLP's second matrix, and norms' gradients late.
_FORWARD = (
    prefetch.Window(("normed_1",), ("qkv",), gather=("qkv",)),
    prefetch.Window(("qkv",), ("middle",), gather=("projected",)),
    prefetch.Window(("normed_2",), ("activated",), gather=("hidden",)),
    prefetch.Window(("activated",), ("out",), gather=("down",)),
)
_BACKWARD = (
    prefetch.Window(
        ("normed_2",), ("hidden",), gather=("down",), add_late=("normed_1", "normed_2")
    ),
    prefetch.Window(
        ("hidden", "d down"), ("d hidden",), gather=("hidden",), add_late=("qkv", "projected")
    ),
    prefetch.Window(("d hidden",), ("d middle",), gather=("qkv", "projected")),
    prefetch.Window(("normed_1", "d projected", "dw down"), ("d qkv", "dw hidden"), add=("down",)),
    prefetch.Window(("d qkv", "dw hidden"), ("d x",), add=("hidden",)),
)
# The same where the hidden layer is saved, so that its product does not run again.
_BACKWARD_WITH_HIDDEN = (
    prefetch.Window(
        ("d down",), ("d hidden",), gather=("down", "hidden"), add_late=("normed_1", "normed_2")
    ),
    prefetch.Window(("d hidden",), ("d middle",), gather=("qkv", "projected")),
    prefetch.Window(
        ("normed_1", "d projected", "dw down"),
        ("d qkv", "dw hidden"),
        add=("down",),
        add_late=("qkv", "projected"),
    ),
    prefetch.Window(("d qkv", "dw hidden"), ("d x",), add=("hidden",)),
)


# Gradient sums, in the shapes of stacked blocks, that a pipeline stage hands from layer to layer.
Sums: TypeAlias = Block | None
Carry: TypeAlias = tuple[Array, Sums]  # the residual stream, the sums
# (an entry of `run_layers`' stack, sums) -> the block that the entry stands for, sums
BlockAt: TypeAlias = Callable[[Array, Sums], tuple[Block, Sums]]


class GPT(nnx.Module):
    """The whole network, up to the final hidden states; the head is its embedding table."""

    def __init__(self, model: schema.Model, key: Array, virtual_stages: int = 1):
        """Draw the weights; with R virtual stages blocks are stacked `[R, L / R, ...]`."""
        k_embedding, k_positions, k_blocks = jax.random.split(key, 3)
        self.embedding_VD = weight(
            k_embedding, (model.padded_vocab_size, model.d_model), model.init_std,
            ("vocab", "embed"),
        )  # fmt: skip
        self.positions_TD = weight(
            k_positions, (model.seq_len, model.d_model), model.init_std, (None, "embed")
        )
        make_blocks = jax.vmap(functools.partial(Block, model))
        keys = jax.random.split(k_blocks, model.n_layers)
        if virtual_stages > 1:
            make_blocks, keys = jax.vmap(make_blocks), keys.reshape(virtual_stages, -1)
        self.blocks = make_blocks(keys)
        self.norm = LayerNorm(model)
        self.model = model

    def __call__(
        self,
        tokens_BT: Array,
        positions_BT: Array,
        segments_BT: Array | None = None,
        noise: dropout.Noise | None = None,
        compute: Compute = Compute(),
    ) -> Array:
        """Return the final hidden states `[B, T, D]`; dropout acts where `noise` is given."""
        x_BTD = self.embed(tokens_BT, positions_BT, noise, compute)
        numbers_L = jnp.arange(self.model.n_layers)
        args = ForwardArgs(segments_BT=segments_BT, noise=noise, compute=compute)
        x_BTD, _ = self.run_layers(self.blocks, numbers_L, x_BTD, args)
        return self.final_norm(x_BTD, compute)

    def embed(
        self, tokens_BT: Array, positions_BT: Array, noise: dropout.Noise | None, compute: Compute
    ) -> Array:
        """Return what enters the first layer, `[B, T, D]`."""
        out_axes = compute.residual_axes[:2]
        # In fp32, because the gradient of a lookup adds up all places of a token: thousands for a
        # frequent one.
        x_BTD = embedding_lookup.rows(
            ("vocab", "embed"), out_axes, self.embedding_VD[...], tokens_BT
        )
        x_BTD += embedding_lookup.rows(
            (None, "embed"), out_axes, self.positions_TD[...], positions_BT
        )
        x_BTD = x_BTD.astype(compute.dtype)
        if noise is not None:
            x_BTD = dropout.apply(x_BTD, self.model.dropout, noise.fold(self.model.n_layers))
        return rules.constrain(x_BTD, *compute.residual_axes)

    def final_norm(self, x_BTD: Array, compute: Compute) -> Array:
        """Return the head's input, whole along the sequence."""
        normed_BTD = rules.constrain(self.norm(x_BTD, compute.dtype), *compute.residual_axes)
        return rules.constrain(normed_BTD, "batch", "seq", None)

    def head_VD(self, compute: Compute) -> Array:
        """Return the table that turns the head's input into logits."""
        return rules.constrain(self.embedding_VD[...].astype(compute.dtype), "vocab", None)

    def run_layers(
        self,
        stack: Block | Array,
        numbers_L: Array,
        x_BTD: Array,
        args: ForwardArgs,
        block_at: BlockAt | None = None,
        sums: Sums = None,
    ) -> Carry:
        """Return the residual stream after the layers with these numbers, and the sums.

        `stack` holds their blocks (leaves `[L, ...]`); or, with `block_at`, something that
        `block_at` makes each block from, and then `sums` go through it from layer to layer. The
        layers are consecutive, and the first of them begins a period of `layer_windows`.
        """
        carry = x_BTD, sums
        for first, stop, compute in _spans(numbers_L.size, args.compute):
            windows = layer_windows(self.model, first)
            of_span = dataclasses.replace(args, compute=compute)
            whole = (stack, numbers_L)
            if stop - first < numbers_L.size:
                whole = jax.tree.map(lambda leaf, s=slice(first, stop): leaf[s], whole)
            if compute.prefetch:
                carry = self._run_prefetched(*whole, carry[0], windows, of_span), sums
                continue
            for begin, end, repeated in prefetch.stretches(stop - first, windows):
                part = jax.tree.map(lambda leaf, s=slice(begin, end): leaf[s], whole)
                carry = self._scan(carry, part, repeated, of_span, block_at)
        return carry

    def _run_prefetched(
        self, stack: Block | Array, numbers_L: Array, x_BTD: Array,
        windows: tuple[int | None, ...], args: ForwardArgs,
    ) -> Array:  # fmt: skip
        assert isinstance(stack, Block)
        saved = remat.SAVED[self.model.remat]
        weights = prefetch.Weights(stack, args.compute.dtype, in_8_bits=args.compute.float8)

        def args_of(arrays: prefetch.Tree, layer: Array) -> ForwardArgs:
            numbers_L, noise, segments_BT = arrays
            shared = dataclasses.replace(args, noise=noise, segments_BT=segments_BT)
            return shared.fold(numbers_L[layer])

        layers = prefetch.Layers(
            parts=tuple(map(block_parts, windows)),
            saved=saved,
            kept=("projected",) if "qkv" in saved else (),
            forward=_FORWARD,
            backward=_BACKWARD_WITH_HIDDEN if "hidden" in saved else _BACKWARD,
            weights=weights,
            args=args_of,
        )
        arrays = numbers_L, args.noise, args.segments_BT
        return prefetch.run(layers, weights.arrays(stack), x_BTD, arrays)

    def _scan(
        self,
        carry: Carry,
        part: tuple[Block | Array, Array],
        windows: tuple[int | None, ...],
        args: ForwardArgs,
        block_at: BlockAt | None,
    ) -> Carry:
        """Run the layers of `part`, a stack and its numbers: a whole number of periods."""
        layer = self._layer(args, block_at)

        def period(carry: Carry, part: tuple[Block | Array, Array]) -> tuple[Carry, None]:
            stack, numbers = part
            for i, window in enumerate(windows):
                entry = jax.tree.map(lambda leaf, i=i: leaf[i], stack)
                carry = layer(entry, args.fold(numbers[i]).noise, carry, window)
            return carry, None

        def grouped(leaf: Array) -> Array:
            return leaf.reshape(-1, len(windows), *leaf.shape[1:])

        return jax.lax.scan(period, carry, jax.tree.map(grouped, part))[0]

    def _layer(self, args: ForwardArgs, block_at: BlockAt | None) -> Callable[..., Carry]:
        """Return what runs one layer: (entry of the stack, noise, carry, window) -> carry."""

        def layer(
            entry: Block | Array, noise: dropout.Noise | None, carry: Carry, window: int | None
        ) -> Carry:
            x_BTD, sums = carry
            block, sums = (entry, sums) if block_at is None else block_at(entry, sums)
            assert isinstance(block, Block)
            return block(x_BTD, window, dataclasses.replace(args, noise=noise)), sums

        policy = remat.policy(remat.in_effect(self.model.remat, block_at is not None))
        if policy is None:
            return layer
        return jax.checkpoint(layer, policy=policy, prevent_cse=False, static_argnums=3)


def output_std(model: schema.Model) -> float:
    """Return the std of projections into the residual stream, a sum of 2 L (GPT-2, 2.3)."""
    return model.init_std / math.sqrt(2 * model.n_layers)


def layer_windows(model: schema.Model, first: int = 0) -> tuple[int | None, ...]:
    """Return how many earlier positions each layer of a period sees; None for all of them.

    The period begins with layer `first`.
    """
    if model.attention.pattern == "dense":
        return (None,)
    windows = (model.attention.band, None)
    return windows[first % 2 :] + windows[: first % 2]


def _spans(n_layers: int, compute: Compute) -> list[tuple[int, int, Compute]]:
    """Return spans of layers, (first, stop), with how each computes.

    Layers at the ends whose products are not in 8 bits form spans of their own. They are few, so
    their weights are gathered when they are needed.
    """
    if not compute.float8 or not compute.end_layers:
        return [(0, n_layers, compute)]
    first, last = compute.end_layers, n_layers - compute.end_layers
    at_ends = dataclasses.replace(compute, float8=False, prefetch=False)
    return [(0, first, at_ends), (first, last, compute), (last, n_layers, at_ends)]
