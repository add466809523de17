"""The network token by token: a prefill that reads prompts into a KV cache, a loop that decodes.

Decoding reads every weight once a token, so it keeps them as it reads them best: layer by layer,
cast once, with the dimension last that a product sums over (`Weights`); the parts that this does
not touch are `model`'s and `attention`'s own. Prompts are padded on the left: all rows write the
same slot of the cache, and a row's position is the slot less its padding.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gpt3jax.config import schema
from gpt3jax.model import attention, gpt, lookup
from gpt3jax.sample import sampling
from gpt3jax.sharding import layouts, rules

CHUNK = 8  # tokens that one call decodes: amortises its start, and paces what is streamed
_LOGITS_AT_ONCE = 64  # positions of each prompt whose logits are held
_CACHE_AXES = ("batch", "heads", None, "head_dim")

Cache = tuple[tuple[Any, Any], ...]  # of each layer: k_BHSK, v_BHSK


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """A block's weights."""

    norm_1: gpt.LayerNorm
    w_qkv_3HKD: Any
    b_qkv_3HK: Any
    w_out_DHK: Any
    b_out_D: Any
    norm_2: gpt.LayerNorm
    w_in_FD: Any
    b_in_F: Any
    w_down_DF: Any
    b_down_D: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """What decoding reads, in the compute format but for norms and the tables of the lookup."""

    embedding_VD: Any
    positions_TD: Any
    layers: tuple[Layer, ...]
    norm: gpt.LayerNorm
    head_VD: Any
    cfg: schema.Model = dataclasses.field(metadata={"static": True})
    compute: gpt.Compute = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """What a token changes."""

    cache: Cache
    slot: Any  # of the cache, the next to fill
    padding_B: Any  # slots before a row's first token
    token_B: Any  # the row's last, which is not in the cache yet
    left_B: Any  # tokens that the row may still get; 0 when it is done
    eod_B: Any  # the token that ends a row, -1 for none


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class New:
    """Tokens that rows get, `[...]`, -1 for none; and their scores, where these are asked for."""

    token: Any
    scores: sampling.Scores | None


def prepare(params: gpt.GPT, compute: gpt.Compute) -> Weights:
    """Return the weights for decoding, on the mesh that is set; the blocks' own arrays are freed.

    One parameter of all layers at a time is held twice.
    """
    core, mlp = params.blocks.attention, params.blocks.mlp
    parts = {
        "norm_1": _unstack(params.blocks.norm_1, "float32"),
        "w_qkv_3HKD": _unstack(core.w_qkv_D3HK, compute.dtype, (1, 2, 3, 0)),
        "b_qkv_3HK": _unstack(core.b_qkv_3HK, compute.dtype),
        "w_out_DHK": _unstack(core.w_out_HKD, compute.dtype, (2, 0, 1)),
        "b_out_D": _unstack(core.b_out_D, compute.dtype),
        "norm_2": _unstack(params.blocks.norm_2, "float32"),
        "w_in_FD": _unstack(mlp.w_in_DF, compute.dtype, (1, 0)),
        "b_in_F": _unstack(mlp.b_in_F, compute.dtype),
        "w_down_DF": _unstack(mlp.w_down_FD, compute.dtype, (1, 0)),
        "b_down_D": _unstack(mlp.b_down_D, compute.dtype),
    }
    layers = [
        Layer(**{name: part[i] for name, part in parts.items()})
        for i in range(params.model.n_layers)
    ]
    return Weights(
        embedding_VD=params.embedding_VD[...],
        positions_TD=params.positions_TD[...],
        layers=tuple(layers),
        norm=params.norm,
        head_VD=params.embedding_VD[...].astype(compute.dtype),
        cfg=params.model,
        compute=compute,
    )


def _unstack(stacked: Any, dtype: str, order: tuple[int, ...] | None = None) -> list[Any]:
    """Return each layer's part of a parameter, with its dimensions in this order, or of a norm."""

    def split(stacked: Any) -> list[Any]:
        n_layers = jax.tree.leaves(stacked)[0].shape[0]
        return [jax.tree.map(lambda x, i=i: one(x[i]), stacked) for i in range(n_layers)]

    def one(x: Array) -> Array:
        if order is None:
            return x.astype(dtype)
        axes = layouts.variable_axes(stacked)[1:]
        return rules.constrain(x.astype(dtype).transpose(order), *(axes[i] for i in order))

    parts = jax.block_until_ready(jax.jit(split)(stacked))
    for leaf in jax.tree.leaves(stacked):
        leaf.delete()
    return [part[...] if layouts.is_variable(part) else part for part in parts]


def prefill(
    weights: Weights,
    tokens_BT: Array,
    padding_B: Array,
    left_B: Array,
    eod_B: Array,
    choice: sampling.Choice,
    *,
    n_slots: int,
    mode: sampling.Mode,
    scored: bool,
) -> tuple[Progress, New]:
    """Read prompts, padded on the left; return the progress and the first new tokens `[B]`.

    The cache gets `n_slots`.
    """
    logits_BV, cache = prompt_logits(weights, tokens_BT, padding_B, n_slots)
    progress = Progress(
        cache=cache,
        slot=jnp.int32(tokens_BT.shape[1] - 1),
        padding_B=padding_B,
        token_B=tokens_BT[:, -1],
        left_B=left_B,
        eod_B=eod_B,
    )
    progress, new = _take(weights.cfg, progress, logits_BV, choice, mode, scored)
    return dataclasses.replace(progress, slot=progress.slot + 1), new


def decode(
    weights: Weights,
    progress: Progress,
    choice: sampling.Choice,
    *,
    mode: sampling.Mode,
    scored: bool,
) -> tuple[Progress, New]:
    """Decode up to CHUNK tokens; return the progress and the new tokens `[B, N]`."""

    def unfinished(carry: tuple[Array, Progress, New]) -> Array:
        return (carry[0] < CHUNK) & (carry[1].left_B > 0).any()

    def one(carry: tuple[Array, Progress, New]) -> tuple[Array, Progress, New]:
        n, progress, news = carry
        logits_BV, cache = next_logits(weights, progress)
        taken, new = _take(weights.cfg, progress, logits_BV, choice, mode, scored)
        # Never true, but it makes the write wait for all reads of the cache: else XLA's CPU
        # compiler copies the whole cache for every token.
        slot = progress.slot + (new.token.min() < -1)
        news = jax.tree.map(lambda all_news, x: all_news.at[:, n].set(x), news, new)
        return n + 1, extend(taken, cache, slot), news

    token_BN = jnp.full((progress.token_B.size, CHUNK), -1, jnp.int32)
    scores = sampling.no_scores(token_BN.shape) if scored else None
    carry = jnp.int32(0), progress, New(token_BN, scores)
    _, progress, news = jax.lax.while_loop(unfinished, one, carry)
    return progress, news


def prompt_scores(weights: Weights, tokens_BT: Array, padding_B: Array) -> sampling.Scores:
    """Return the scores `[B, T - 1]` of prompts' tokens but the first; padded on the left."""
    x_BTD, _ = _read(weights, tokens_BT, padding_B, tokens_BT.shape[1])
    n_shared = math.gcd(tokens_BT.shape[1], _LOGITS_AT_ONCE)
    x_CBTD, targets_CBT = (
        jnp.moveaxis(x.reshape(x.shape[0], -1, n_shared, *x.shape[2:]), 1, 0)
        for x in (x_BTD, jnp.roll(tokens_BT, -1, axis=1))
    )

    def chunk(part: tuple[Array, Array]) -> sampling.Scores:
        return sampling.score(_logits(weights, part[0]), part[1], weights.cfg)

    def joined(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :-1]

    return jax.tree.map(joined, jax.lax.map(chunk, (x_CBTD, targets_CBT)))


def prompt_logits(
    weights: Weights, tokens_BT: Array, padding_B: Array, n_slots: int
) -> tuple[Array, Cache]:
    """Return the logits after each prompt, `[B, V]`, and a cache of `n_slots` that holds it."""
    x_BTD, cache = _read(weights, tokens_BT, padding_B, n_slots)
    return _logits(weights, x_BTD[:, -1]), cache


def _read(
    weights: Weights, tokens_BT: Array, padding_B: Array, n_slots: int
) -> tuple[Array, Cache]:
    """Return what `_logits` takes of each prompt's tokens, `[B, T, D]`, and their cache."""
    n_empty = n_slots - tokens_BT.shape[1]
    places_BT = jnp.arange(tokens_BT.shape[1]) - padding_B[:, None]
    segments_BT = (places_BT >= 0).astype(jnp.int32)  # keeps what is padding apart

    def attend(i: int, window: int | None, *qkv: Array) -> tuple[Array, tuple[Array, Array]]:
        options = attention.Options(implementation=weights.compute.attention, window=window)
        out_BTHK = attention.attend(*qkv, options=options, segments_BT=segments_BT)
        k_BHSK, v_BHSK = (
            jnp.pad(x_BTHK.swapaxes(1, 2), ((0, 0), (0, 0), (0, n_empty), (0, 0)))
            for x_BTHK in qkv[1:]
        )
        return out_BTHK, (k_BHSK, v_BHSK)

    return _network(weights, tokens_BT, places_BT, attend)


def next_logits(weights: Weights, progress: Progress) -> tuple[Array, Cache]:
    """Return the logits after each row's last token, `[B, V]`, and its keys and values."""
    slot, padding_B = progress.slot, progress.padding_B
    s_S = jnp.arange(progress.cache[0][0].shape[2])
    earlier_BS = (s_S >= padding_B[:, None]) & (s_S < slot)

    def attend(i: int, window: int | None, *qkv: Array) -> tuple[Array, tuple[Array, Array]]:
        q_BHK, k_BHK, v_BHK = (x_BTHK[:, 0] for x_BTHK in qkv)
        k_BHSK, v_BHSK = progress.cache[i]
        visible_BS = earlier_BS if window is None else earlier_BS & (slot - s_S <= window)
        out_BHK = _attend_one(q_BHK, k_BHK, v_BHK, k_BHSK, v_BHSK, visible_BS)
        return out_BHK[:, None], (k_BHK[:, :, None], v_BHK[:, :, None])

    places_B1 = (slot - padding_B)[:, None]
    x_BTD, cache = _network(weights, progress.token_B[:, None], places_B1, attend)
    return _logits(weights, x_BTD[:, -1]), cache


def extend(progress: Progress, new: Cache, slot: Array) -> Progress:
    """Return the progress with a token's keys and values, `[B, H, 1, K]`, in a slot."""
    put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=slot, axis=2)
    cache = jax.tree.map(put, progress.cache, new)
    return dataclasses.replace(progress, cache=cache, slot=progress.slot + 1)


def _attend_one(
    q_BHK: Array, k_BHK: Array, v_BHK: Array, k_BHSK: Array, v_BHSK: Array, visible_BS: Array
) -> Array:
    """Return attention's output `[B, H, K]` for one token a row, softmax in fp32.

    It sees itself, and what is visible in the cache, which does not have it yet.
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


def _network(
    weights: Weights, tokens_BT: Array, places_BT: Array, attend: Any
) -> tuple[Array, Cache]:
    """Return the output of the last layer, `[B, T, D]`, and what `attend` gives to cache."""
    dtype, cache = weights.compute.dtype, []
    windows = gpt.layer_windows(weights.cfg)
    places_BT = jnp.maximum(places_BT, 0)
    x_BTD = lookup.rows(("vocab", "embed"), ("batch", None), weights.embedding_VD, tokens_BT)
    x_BTD += lookup.rows((None, "embed"), ("batch", None), weights.positions_TD, places_BT)
    x_BTD = rules.constrain(x_BTD.astype(dtype), "batch", None, None)
    for i, layer in enumerate(weights.layers):
        core = functools.partial(attend, i, windows[i % len(windows)])
        out_BTD, kv = _attention(layer, layer.norm_1(x_BTD, dtype), core)
        x_BTD = rules.constrain(x_BTD + out_BTD, "batch", None, None)
        out_BTD = _mlp(layer, layer.norm_2(x_BTD, dtype), weights.cfg)
        x_BTD = rules.constrain(x_BTD + out_BTD, "batch", None, None)
        cache.append(tuple(rules.constrain(x_BHSK, *_CACHE_AXES) for x_BHSK in kv))
    return x_BTD, tuple(cache)


def _logits(weights: Weights, x_BD: Array) -> Array:
    """Return the logits, fp32 `[..., V]`, of outputs of the last layer, `[..., D]`.

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


def _attention(layer: Layer, x_BTD: Array, core: Any) -> tuple[Array, Any]:
    qkv_3HKBT = _product(layer.w_qkv_3HKD, x_BTD, 1)
    qkv_3BTHK = jnp.einsum("chkbt->cbthk", qkv_3HKBT) + layer.b_qkv_3HK[:, None, None]
    qkv_3BTHK = rules.constrain(qkv_3BTHK, None, "batch", None, "heads", "head_dim")
    out_BTHK, kv = core(*qkv_3BTHK)
    out_BTD = jnp.einsum("dbt->btd", _product(layer.w_out_DHK, out_BTHK, 2))
    return out_BTD + layer.b_out_D, kv


def _mlp(layer: Layer, x_BTD: Array, model: schema.Model) -> Array:
    hidden_BTF = jnp.einsum("fbt->btf", _product(layer.w_in_FD, x_BTD, 1)) + layer.b_in_F
    hidden_BTF = rules.constrain(hidden_BTF, "batch", None, "mlp")
    hidden_BTF = jax.nn.gelu(hidden_BTF, approximate=model.gelu == "tanh")
    return jnp.einsum("dbt->btd", _product(layer.w_down_DF, hidden_BTF, 1)) + layer.b_down_D


def _product(w: Array, x: Array, n_summed: int) -> Array:
    """Sum over the last dimensions of both; the result has the weight's others first.

    XLA's CPU products of few rows are up to 4 times as fast with the weight on the left and the
    sum along its rows.
    """
    of_w, of_x = (tuple(range(a.ndim - n_summed, a.ndim)) for a in (w, x))
    return jax.lax.dot_general(w, x, ((of_w, of_x), ((), ())))


def _take(
    model: schema.Model,
    progress: Progress,
    logits_BV: Array,
    choice: sampling.Choice,
    mode: sampling.Mode,
    scored: bool,
) -> tuple[Progress, New]:
    """Choose the token after `slot` of each row that is not done."""
    places_B = progress.slot + 1 - progress.padding_B
    true_V = jnp.arange(logits_BV.shape[1]) < model.vocab_size
    token_B = sampling.choose(jnp.where(true_V, logits_BV, -jnp.inf), places_B, choice, mode)
    scores = sampling.score(logits_BV, token_B, model) if scored else None
    active_B = progress.left_B > 0
    ended_B = token_B == progress.eod_B
    progress = dataclasses.replace(
        progress,
        token_B=jnp.where(active_B, token_B, progress.token_B),
        left_B=jnp.where(active_B & ~ended_B, progress.left_B - 1, 0),
    )
    return progress, New(jnp.where(active_B, token_B, -1), scores)
