"""The network with a KV cache: it reads prompts at once, then one token of each row at a time.

The weights are those of `decoder_weights`; what these do not touch is `model`'s own. Prompts are
padded on the left, so that all rows write the same slot of the cache; the position of a row's
token is its slot less the row's padding.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import Array

from gpt3jax.config import schema
from gpt3jax.model import attention, embedding_lookup, gpt
from gpt3jax.sample import decoder_weights
from gpt3jax.sharding import rules

_CACHE_AXES = ("batch", "heads", None, "head_dim")

KeysValues: TypeAlias = tuple[Array, Array]  # of one layer: k_BHSK, v_BHSK
# From q, k and v, `[B, T, H, K]`, of a layer: the output, and the keys and values to keep.
_Core: TypeAlias = Callable[[Array, Array, Array], tuple[Array, KeysValues]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Cache:
    """The keys and values of each row's tokens.

    Attributes:
        slot: the slot of each row's last token.
        padding_B: slots before a row's first token.
    """

    layers: tuple[KeysValues, ...]
    slot: Array
    padding_B: Array

    def append(self, new: tuple[KeysValues, ...], slot: Array) -> "Cache":
        """Return the cache with the last token's keys and values, `[B, H, 1, K]`, in a slot.

        The token that comes next is then the last one, and has the slot after this one.
        """
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=slot, axis=2)
        layers = jax.tree.map(put, self.layers, new)
        return dataclasses.replace(self, layers=layers, slot=self.slot + 1)


def prompt_logits(
    weights: decoder_weights.Weights, tokens_BT: Array, padding_B: Array, n_slots: int
) -> tuple[Array, Cache]:
    """Return the logits after each prompt, `[B, V]`, and a cache of `n_slots` that holds it."""
    x_BTD, cache = read_prompts(weights, tokens_BT, padding_B, n_slots)
    return logits(weights, x_BTD[:, -1]), cache


def next_logits(
    weights: decoder_weights.Weights, cache: Cache, token_B: Array
) -> tuple[Array, tuple[KeysValues, ...]]:
    """Return the logits after each row's last token, `[B, V]`, and its keys and values.

    The cache does not hold these yet.
    """
    slot, padding_B = cache.slot, cache.padding_B
    s_S = jnp.arange(cache.layers[0][0].shape[2])
    earlier_BS = (s_S >= padding_B[:, None]) & (s_S < slot)

    def attend(i: int, window: int | None, *qkv: Array) -> tuple[Array, KeysValues]:
        q_BHK, k_BHK, v_BHK = (x_BTHK[:, 0] for x_BTHK in qkv)
        k_BHSK, v_BHSK = cache.layers[i]
        visible_BS = earlier_BS if window is None else earlier_BS & (slot - s_S <= window)
        out_BHK = _attend_one(q_BHK, k_BHK, v_BHK, k_BHSK, v_BHSK, visible_BS)
        return out_BHK[:, None], (k_BHK[:, :, None], v_BHK[:, :, None])

    positions_B1 = (slot - padding_B)[:, None]
    x_BTD, new = _run_layers(weights, token_B[:, None], positions_B1, attend)
    return logits(weights, x_BTD[:, -1]), new


def read_prompts(
    weights: decoder_weights.Weights, tokens_BT: Array, padding_B: Array, n_slots: int
) -> tuple[Array, Cache]:
    """Return the last layer's output for prompts, `[B, T, D]`, and a cache that holds them."""
    n_empty = n_slots - tokens_BT.shape[1]
    positions_BT = jnp.arange(tokens_BT.shape[1]) - padding_B[:, None]
    segments_BT = (positions_BT >= 0).astype(jnp.int32)  # keeps the padding apart

    def attend(i: int, window: int | None, *qkv: Array) -> tuple[Array, KeysValues]:
        out_BTHK = attention.attend(
            *qkv,
            options=attention.Options(implementation=weights.compute.attention, window=window),
            segments_BT=segments_BT,
        )
        k_BHSK, v_BHSK = (
            jnp.pad(x_BTHK.swapaxes(1, 2), ((0, 0), (0, 0), (0, n_empty), (0, 0)))
            for x_BTHK in qkv[1:]
        )
        return out_BTHK, (k_BHSK, v_BHSK)

    x_BTD, layers = _run_layers(weights, tokens_BT, positions_BT, attend)
    last_slot = jnp.int32(tokens_BT.shape[1] - 1)
    return x_BTD, Cache(layers=layers, slot=last_slot, padding_B=padding_B)


def logits(weights: decoder_weights.Weights, x_BD: Array) -> Array:
    """Return the logits, fp32 `[..., V]`, from the last layer's output, `[..., D]`.

    Entries that take no part in training's softmax have -inf.
    """
    x_BD = weights.norm(x_BD, weights.compute.dtype)
    logits_VB = jax.lax.dot_general(
        weights.head_VD,
        x_BD,
        (((1,), (x_BD.ndim - 1,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    logits_BV = jnp.moveaxis(logits_VB, 0, -1)
    counted_V = jnp.arange(logits_BV.shape[-1]) < weights.cfg.softmax_size
    axes = ("batch", *[None] * (x_BD.ndim - 1))
    return rules.constrain(jnp.where(counted_V, logits_BV, -jnp.inf), *axes)


def _run_layers(
    weights: decoder_weights.Weights,
    tokens_BT: Array,
    positions_BT: Array,
    attend: Callable[..., tuple[Array, KeysValues]],
) -> tuple[Array, tuple[KeysValues, ...]]:
    """Return the last layer's output, `[B, T, D]`, and each layer's keys and values.

    `attend(i, window, q, k, v)` is the attention of layer i, as `_Core`.
    """
    dtype, keys_values = weights.compute.dtype, []
    windows = gpt.layer_windows(weights.cfg)
    positions_BT = jnp.maximum(positions_BT, 0)
    x_BTD = embedding_lookup.rows(
        ("vocab", "embed"), ("batch", None), weights.embedding_VD, tokens_BT
    )
    x_BTD += embedding_lookup.rows(
        (None, "embed"), ("batch", None), weights.positions_TD, positions_BT
    )
    x_BTD = rules.constrain(x_BTD.astype(dtype), "batch", None, None)
    for i, layer in enumerate(weights.layers):
        core = functools.partial(attend, i, windows[i % len(windows)])
        out_BTD, (k_BHSK, v_BHSK) = _attention(layer, layer.norm_1(x_BTD, dtype), core)
        x_BTD = rules.constrain(x_BTD + out_BTD, "batch", None, None)
        out_BTD = _mlp(layer, layer.norm_2(x_BTD, dtype), weights.cfg)
        x_BTD = rules.constrain(x_BTD + out_BTD, "batch", None, None)
        k_BHSK = rules.constrain(k_BHSK, *_CACHE_AXES)
        v_BHSK = rules.constrain(v_BHSK, *_CACHE_AXES)
        keys_values.append((k_BHSK, v_BHSK))
    return x_BTD, tuple(keys_values)


def _attention(layer: decoder_weights.Layer, x_BTD: Array, core: _Core) -> tuple[Array, KeysValues]:
    qkv_3HKBT = _product(layer.w_qkv_3HKD, x_BTD, 1)
    qkv_3BTHK = jnp.einsum("chkbt->cbthk", qkv_3HKBT) + layer.b_qkv_3HK[:, None, None]
    qkv_3BTHK = rules.constrain(qkv_3BTHK, None, "batch", None, "heads", "head_dim")
    out_BTHK, keys_values = core(*qkv_3BTHK)
    out_BTD = jnp.einsum("dbt->btd", _product(layer.w_out_DHK, out_BTHK, 2))
    return out_BTD + layer.b_out_D, keys_values


def _attend_one(
    q_BHK: Array, k_BHK: Array, v_BHK: Array, k_BHSK: Array, v_BHSK: Array, visible_BS: Array
) -> Array:
    """Return attention's output `[B, H, K]` for one token of each row, softmax in fp32.

    The token sees itself, and what is visible in the cache, which does not hold it yet.
    """
    f32, dtype = jnp.float32, v_BHSK.dtype
    q_BHK = q_BHK * q_BHK.shape[-1] ** -0.5
    own_BH = jnp.einsum("bhk,bhk->bh", q_BHK, k_BHK, preferred_element_type=f32)
    scores_BHS = jnp.einsum("bhk,bhsk->bhs", q_BHK, k_BHSK, preferred_element_type=f32)
    scores_BHS = jnp.where(visible_BS[:, None], scores_BHS, attention.HIDDEN)
    max_BH = jnp.maximum(own_BH, scores_BHS.max(-1))
    exp_BHS, own_BH1 = jnp.exp(scores_BHS - max_BH[..., None]), jnp.exp(own_BH - max_BH)[..., None]
    out_BHK = jnp.einsum("bhs,bhsk->bhk", exp_BHS.astype(dtype), v_BHSK, preferred_element_type=f32)
    out_BHK += own_BH1.astype(dtype) * v_BHK.astype(f32)
    return (out_BHK / (exp_BHS.sum(-1, keepdims=True) + own_BH1)).astype(dtype)


def _mlp(layer: decoder_weights.Layer, x_BTD: Array, model: schema.Model) -> Array:
    hidden_BTF = jnp.einsum("fbt->btf", _product(layer.w_in_FD, x_BTD, 1)) + layer.b_in_F
    hidden_BTF = rules.constrain(hidden_BTF, "batch", None, "mlp")
    hidden_BTF = jax.nn.gelu(hidden_BTF, approximate=model.gelu == "tanh")
    return jnp.einsum("dbt->btd", _product(layer.w_down_DF, hidden_BTF, 1)) + layer.b_down_D


def _product(w: Array, x: Array, n_summed: int) -> Array:
    """Sum over the last dimensions of both; the result has the weight's others first.

    XLA's CPU products of few rows are up to 4 times as fast with the weight on the left and the
    sum along its rows.
    """
    w_dims, x_dims = (tuple(range(a.ndim - n_summed, a.ndim)) for a in (w, x))
    return jax.lax.dot_general(w, x, ((w_dims, x_dims), ((), ())))
