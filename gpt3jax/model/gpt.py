"""GPT-3: a pre-LayerNorm transformer with learned positions, biases and a tied head.

NNX modules only hold parameters; each is a pytree that plain `jax.jit`, `grad`, `scan` and Optax
take as it is. Blocks are stacked along a leading layer dimension and scanned. Numerics follow
Megatron-LM; what differs on purpose is listed in docs/from_megatron.md.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from gpt3jax.config import schema
from gpt3jax.model import attention, dropout, lookup, remat
from gpt3jax.sharding import rules


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compute:
    """How the network runs here: what changes speed and rounding, but not the parameters."""

    dtype: str = "float32"
    attention: str = "xla"
    sequence_parallel: bool = False

    @property
    def residual_axes(self) -> tuple[str | None, ...]:
        """Logical axes of the residual stream, norms and dropout."""
        return ("batch", "seq_shard" if self.sequence_parallel else "seq", None)


def weight(key: Any, shape: tuple[int, ...], std: float, axes: tuple[str | None, ...]) -> Any:
    """Return a matrix drawn from N(0, std), fp32, subject to weight decay."""
    return nnx.Param(std * jax.random.normal(key, shape, jnp.float32), axes=axes, decays=True)


def vector(value: float, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> Any:
    """Return a bias or scale, fp32, without weight decay."""
    return nnx.Param(jnp.full(shape, value, jnp.float32), axes=axes, decays=False)


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

    def __init__(self, model: schema.Model, key: Any):
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

    def __call__(
        self,
        x_BTD: Array,
        segments_BT: Array | None,
        noise: dropout.Noise | None,
        window: int | None,
        compute: Compute,
    ) -> Array:
        """Return the branch's output without its bias, which is added in the residual's layout."""
        w_qkv_D3HK = self.w_qkv_D3HK[...].astype(compute.dtype)
        qkv_BT3HK = jnp.einsum("btd,dchk->btchk", x_BTD, w_qkv_D3HK)
        qkv_BT3HK += self.b_qkv_3HK[...].astype(compute.dtype)
        qkv_BT3HK = rules.constrain(qkv_BT3HK, "batch", "seq", None, "heads", "head_dim")
        qkv_BT3HK = checkpoint_name(qkv_BT3HK, "qkv")
        out_BTHK = attention.attend(
            qkv_BT3HK[:, :, 0],
            qkv_BT3HK[:, :, 1],
            qkv_BT3HK[:, :, 2],
            implementation=compute.attention,
            window=window,
            segments_BT=segments_BT,
            dropout_rate=self.dropout_rate,
            noise=noise,
            gather_again=self.gather_again,
        )
        out_BTHK = rules.constrain(out_BTHK, "batch", "seq", "heads", "head_dim")
        return jnp.einsum("bthk,hkd->btd", out_BTHK, self.w_out_HKD[...].astype(compute.dtype))


class Mlp(nnx.Module):
    """Two matrices with GELU between them."""

    def __init__(self, model: schema.Model, key: Any):
        k_in, k_down = jax.random.split(key)
        d, f = model.d_model, model.d_ff
        self.w_in_DF = weight(k_in, (d, f), model.init_std, ("embed", "mlp"))
        self.b_in_F = vector(0.0, (f,), ("mlp",))
        self.w_down_FD = weight(k_down, (f, d), output_std(model), ("mlp", "embed"))
        self.b_down_D = vector(0.0, (d,), (None,))
        self.approximate = model.gelu == "tanh"

    def __call__(self, x_BTD: Array, compute: Compute) -> Array:
        """Return the branch's output without its last bias (see `Attention`)."""
        hidden_BTF = jnp.einsum("btd,df->btf", x_BTD, self.w_in_DF[...].astype(compute.dtype))
        hidden_BTF += self.b_in_F[...].astype(compute.dtype)
        hidden_BTF = rules.constrain(hidden_BTF, "batch", "seq", "mlp")
        hidden_BTF = checkpoint_name(hidden_BTF, "hidden")
        hidden_BTF = remat.elementwise(jax.nn.gelu)(hidden_BTF, self.approximate)
        return jnp.einsum("btf,fd->btd", hidden_BTF, self.w_down_FD[...].astype(compute.dtype))


class Block(nnx.Module):
    """One layer: attention, then MLP, each behind a LayerNorm and added to the residual."""

    def __init__(self, model: schema.Model, key: Any):
        k_attention, k_mlp = jax.random.split(key)
        self.norm_1 = LayerNorm(model)
        self.attention = Attention(model, k_attention)
        self.norm_2 = LayerNorm(model)
        self.mlp = Mlp(model, k_mlp)
        self.dropout_rate = model.dropout

    def __call__(
        self,
        x_BTD: Array,
        segments_BT: Array | None,
        noise: dropout.Noise | None,
        window: int | None,
        compute: Compute,
    ) -> Array:
        """Return the residual stream after the layer."""
        parts = [None if noise is None else noise.fold(part) for part in range(3)]
        normed_BTD = self._norm(self.norm_1, x_BTD, compute)
        out_BTD = self.attention(normed_BTD, segments_BT, parts[0], window, compute)
        x_BTD = self._add(x_BTD, out_BTD, self.attention.b_out_D, parts[1], compute)
        x_BTD = checkpoint_name(x_BTD, "residual")
        out_BTD = self.mlp(self._norm(self.norm_2, x_BTD, compute), compute)
        return self._add(x_BTD, out_BTD, self.mlp.b_down_D, parts[2], compute)

    def _norm(self, norm: LayerNorm, x_BTD: Array, compute: Compute) -> Array:
        # Both constraints: with the second alone the fp32 value is gathered over the tensor axis,
        # with none the partitioner gathers weights instead.
        normed_BTD = remat.elementwise(norm)(x_BTD, compute.dtype)
        normed_BTD = rules.constrain(normed_BTD, *compute.residual_axes)
        return rules.constrain(normed_BTD, "batch", "seq", None)

    def _add(
        self, x_BTD: Array, out_BTD: Array, bias: Any, noise: dropout.Noise | None, compute: Compute
    ) -> Array:
        # Both constraints here too: with the second alone, and `context` in use, the partitioner
        # gathers the whole sequence before the product.
        out_BTD = rules.constrain(out_BTD, "batch", "seq", None)
        out_BTD = rules.constrain(out_BTD, *compute.residual_axes)
        out_BTD += bias[...].astype(compute.dtype)
        x_BTD += dropout.apply(out_BTD, self.dropout_rate, noise)
        return rules.constrain(x_BTD, *compute.residual_axes)


Take = Callable[[Any, Any], tuple[Block, Any]]  # (what stands for a block, sums) -> block, sums
Carry = tuple[Array, Any]  # the residual stream, sums


class GPT(nnx.Module):
    """The whole network, up to the final hidden states; the head is its embedding table."""

    def __init__(self, model: schema.Model, key: Any, virtual_stages: int = 1):
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
        """Return final hidden states `[B, T, D]`; with `noise` dropout acts (training)."""
        x_BTD = self.embed(tokens_BT, positions_BT, noise, compute)
        numbers_L = jnp.arange(self.model.n_layers)
        x_BTD, _ = self.run_layers(self.blocks, numbers_L, x_BTD, segments_BT, noise, compute)
        return self.final_norm(x_BTD, compute)

    def embed(
        self, tokens_BT: Array, positions_BT: Array, noise: dropout.Noise | None, compute: Compute
    ) -> Array:
        """Return what enters the first layer, `[B, T, D]`."""
        out_axes = compute.residual_axes[:2]
        # In fp32, because the gradient of a lookup adds up all places of a token, thousands for a
        # frequent one.
        x_BTD = lookup.rows(("vocab", "embed"), out_axes, self.embedding_VD[...], tokens_BT)
        x_BTD += lookup.rows((None, "embed"), out_axes, self.positions_TD[...], positions_BT)
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
        blocks: Any,
        numbers_L: Array,
        x_BTD: Array,
        segments_BT: Array | None,
        noise: dropout.Noise | None,
        compute: Compute,
        take: Take | None = None,
        sums: Any = None,
    ) -> Carry:
        """Return the residual stream after stacked blocks (leaves `[L, ...]`) with these numbers.

        They are consecutive layers, the first of which begins a period of `layer_windows`. With
        `take`, `blocks` is something else stacked, of which it makes the blocks; what it hands on
        from layer to layer, `sums`, is returned too.
        """
        windows = layer_windows(self.model)
        # Layers repeat in periods of `len(windows)`; a last, shorter period may be left over.
        n_layers = numbers_L.size
        n_whole = n_layers // len(windows) * len(windows)
        for first, stop in ((0, n_whole), (n_whole, n_layers)):
            if first < stop:
                part = jax.tree.map(lambda leaf, s=slice(first, stop): leaf[s], (blocks, numbers_L))
                period = windows[: stop - first]
                carry = self._scan((x_BTD, sums), part, period, segments_BT, noise, compute, take)
                x_BTD, sums = carry
        return x_BTD, sums

    def _scan(
        self,
        carry: Carry,
        part: tuple[Any, Array],
        windows: tuple[int | None, ...],
        segments_BT: Array | None,
        noise: dropout.Noise | None,
        compute: Compute,
        take: Take | None,
    ) -> Carry:
        """Run the layers of `part`, stacked blocks and numbers: a whole number of periods."""

        def layer(block: Any, own: dropout.Noise | None, carry: Carry, window: int | None) -> Carry:
            x_BTD, sums = carry
            if take is not None:
                block, sums = take(block, sums)
            return block(x_BTD, segments_BT, own, window, compute), sums

        policy = remat.POLICIES[remat.in_effect(self.model.remat, take is not None)]
        if policy is not None:
            layer = jax.checkpoint(layer, policy=policy, prevent_cse=False, static_argnums=3)

        def period(carry: Carry, part: tuple[Any, Array]) -> tuple[Carry, None]:
            blocks, numbers = part
            for i, window in enumerate(windows):
                block = jax.tree.map(lambda leaf, i=i: leaf[i], blocks)
                layer_noise = None if noise is None else noise.fold(numbers[i])
                carry = layer(block, layer_noise, carry, window)
            return carry, None

        def grouped(leaf: Array) -> Array:
            return leaf.reshape(-1, len(windows), *leaf.shape[1:])

        return jax.lax.scan(period, carry, jax.tree.map(grouped, part))[0]


def output_std(model: schema.Model) -> float:
    """Std of projections into the residual stream, scaled by its 2 L summands (GPT-2, 2.3)."""
    return model.init_std / math.sqrt(2 * model.n_layers)


def layer_windows(model: schema.Model) -> tuple[int | None, ...]:
    """Return what the layers of one period see: earlier positions, or None for all of them."""
    return (None,) if model.attention.pattern == "dense" else (model.attention.band, None)
