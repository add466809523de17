"""The jitted programs of generation: read prompts, then decode tokens in a loop; score prompts."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import Array

from gpt3jax.config import schema
from gpt3jax.sample import cached_network, decoder_weights, sampling

CHUNK = 8  # tokens that one call decodes: amortises its start, and paces what is streamed
_LOGITS_AT_ONCE = 64  # positions of each prompt whose logits are held


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompts:
    """Prompts to continue, padded on the left, and where each continuation ends.

    Attributes:
        padding_B: slots before a row's first token.
        n_left_B: new tokens that the row may get.
        eod_B: the token that ends a row, -1 for none.
    """

    tokens_BT: sampling.RowArray
    padding_B: sampling.RowArray
    n_left_B: sampling.RowArray
    eod_B: sampling.RowArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """What each new token changes.

    Attributes:
        token_B: the row's last token; its keys and values are not in the cache yet.
        n_left_B: tokens that the row may still get; 0 when it is done.
        eod_B: the token that ends a row, -1 for none.
    """

    cache: cached_network.Cache
    token_B: Array
    n_left_B: Array
    eod_B: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NewTokens:
    """Tokens that rows get, `[...]`, -1 for none; and their scores, where these are wanted."""

    tokens: Array
    scores: sampling.Scores | None


def prefill(
    weights: decoder_weights.Weights,
    prompts: Prompts,
    options: sampling.OptionArrays,
    *,
    n_slots: int,
    scored: bool,
) -> tuple[Progress, NewTokens]:
    """Read prompts into a cache of `n_slots`; return the progress and the first tokens `[B]`."""
    tokens_BT, padding_B = jnp.asarray(prompts.tokens_BT), jnp.asarray(prompts.padding_B)
    logits_BV, cache = cached_network.prompt_logits(weights, tokens_BT, padding_B, n_slots)
    progress = Progress(
        cache=cache,
        token_B=tokens_BT[:, -1],
        n_left_B=jnp.asarray(prompts.n_left_B),
        eod_B=jnp.asarray(prompts.eod_B),
    )
    progress, new = _choose_next(weights.cfg, progress, logits_BV, options, scored=scored)
    cache = dataclasses.replace(cache, slot=cache.slot + 1)
    return dataclasses.replace(progress, cache=cache), new


def decode(
    weights: decoder_weights.Weights,
    progress: Progress,
    options: sampling.OptionArrays,
    *,
    scored: bool,
) -> tuple[Progress, NewTokens]:
    """Decode up to CHUNK tokens; return the progress and the new tokens `[B, N]`."""

    def is_unfinished(carry: tuple[Array, Progress, NewTokens]) -> Array:
        return (carry[0] < CHUNK) & (carry[1].n_left_B > 0).any()

    def decode_one(carry: tuple[Array, Progress, NewTokens]) -> tuple[Array, Progress, NewTokens]:
        n, progress, all_new = carry
        cache = progress.cache
        logits_BV, keys_values = cached_network.next_logits(weights, cache, progress.token_B)
        progress, new = _choose_next(weights.cfg, progress, logits_BV, options, scored=scored)
        # Never true, but it makes the write wait for all reads of the cache: else XLA's CPU
        # compiler copies the whole cache for every token.
        slot = cache.slot + (new.tokens.min() < -1)
        all_new = jax.tree.map(lambda column_BN, x: column_BN.at[:, n].set(x), all_new, new)
        return n + 1, dataclasses.replace(progress, cache=cache.append(keys_values, slot)), all_new

    tokens_BN = jnp.full((progress.token_B.size, CHUNK), -1, jnp.int32)
    scores = sampling.no_scores(tokens_BN.shape) if scored else None
    carry = jnp.int32(0), progress, NewTokens(tokens_BN, scores)
    _, progress, all_new = jax.lax.while_loop(is_unfinished, decode_one, carry)
    return progress, all_new


def _choose_next(
    model: schema.Model,
    progress: Progress,
    logits_BV: Array,
    options: sampling.OptionArrays,
    *,
    scored: bool,
) -> tuple[Progress, NewTokens]:
    """Choose the token after the last one of each row that is not done."""
    positions_B = progress.cache.slot + 1 - progress.cache.padding_B
    true_V = jnp.arange(logits_BV.shape[1]) < model.vocab_size
    token_B = sampling.choose(jnp.where(true_V, logits_BV, -jnp.inf), positions_B, options)
    scores = sampling.score(logits_BV, token_B, model) if scored else None
    active_B = progress.n_left_B > 0
    ended_B = token_B == progress.eod_B
    progress = dataclasses.replace(
        progress,
        token_B=jnp.where(active_B, token_B, progress.token_B),
        n_left_B=jnp.where(active_B & ~ended_B, progress.n_left_B - 1, 0),
    )
    return progress, NewTokens(jnp.where(active_B, token_B, -1), scores)


def prompt_scores(
    weights: decoder_weights.Weights, tokens_BT: Array, padding_B: Array
) -> sampling.Scores:
    """Return the scores `[B, T - 1]` of prompts' tokens but the first; padded on the left."""
    x_BTD, _ = cached_network.read_prompts(weights, tokens_BT, padding_B, tokens_BT.shape[1])
    n_shared = math.gcd(tokens_BT.shape[1], _LOGITS_AT_ONCE)
    x_CBTD, targets_CBT = (
        jnp.moveaxis(x.reshape(x.shape[0], -1, n_shared, *x.shape[2:]), 1, 0)
        for x in (x_BTD, jnp.roll(tokens_BT, -1, axis=1))
    )

    def score_chunk(chunk: tuple[Array, Array]) -> sampling.Scores:
        x_BTD, targets_BT = chunk
        return sampling.score(cached_network.logits(weights, x_BTD), targets_BT, weights.cfg)

    def join(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :-1]

    return jax.tree.map(join, jax.lax.map(score_chunk, (x_CBTD, targets_CBT)))
