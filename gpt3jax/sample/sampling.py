"""Choosing the next token from logits: greedily, or at random by temperature, top-k and top-p.

A random choice is a function of the row's seed, its number in the request and the token's
position, so it depends neither on the mesh nor on the other rows of the batch.
"""

import dataclasses
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gpt3jax.config import schema
from gpt3jax.sample import sampling_options

N_LIKELIEST = 5  # tokens that a score names

RowArray: TypeAlias = Array | np.ndarray  # NumPy's on the way into jit, JAX's inside


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OptionArrays:
    """The sampling options of each row of a batch, as arrays `[B]`.

    Attributes:
        key_B: made from the seed and the row's number.
        mode: what at least one row needs; the rest of the program is left out.
    """

    temperature_B: RowArray
    top_k_B: RowArray
    top_p_B: RowArray
    key_B: Array
    mode: Literal["greedy", "random", "filtered"] = dataclasses.field(metadata={"static": True})


def option_arrays(options: list[sampling_options.Options], numbers: list[int]) -> OptionArrays:
    """Return the options of rows that have these numbers in their requests."""
    seeds_B = np.asarray([o.seed for o in options], np.uint32)
    random = [o for o in options if o.temperature > 0]
    filtered = any(o.top_k > 0 or o.top_p < 1 for o in random)
    return OptionArrays(
        temperature_B=np.asarray([o.temperature for o in options], np.float32),
        top_k_B=np.asarray([o.top_k for o in options], np.int32),
        top_p_B=np.asarray([o.top_p for o in options], np.float32),
        key_B=_keys(seeds_B, np.asarray(numbers, np.uint32)),
        mode="filtered" if filtered else "random" if random else "greedy",
    )


@jax.jit
def _keys(seeds_B: RowArray, numbers_B: RowArray) -> Array:
    return jax.vmap(lambda seed, number: jax.random.fold_in(jax.random.key(seed), number))(
        seeds_B, numbers_B
    )


def choose(logits_BV: Array, positions_B: Array, options: OptionArrays) -> Array:
    """Return the next token of each row, which will have this position.

    Logits are fp32, and -inf where a token must not be chosen.
    """
    greedy_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    if options.mode == "greedy":
        return greedy_B
    temperature_B1 = options.temperature_B[:, None]
    # Less their largest, so that no temperature makes two of them infinite.
    scaled_BV = logits_BV - logits_BV.max(-1, keepdims=True)
    scaled_BV /= jnp.where(temperature_B1 > 0, temperature_B1, 1)

    def draw(key: Array, position: Array) -> Array:
        return jax.random.gumbel(jax.random.fold_in(key, position), logits_BV.shape[1:])

    noise_BV = jax.vmap(draw)(options.key_B, positions_B)
    if options.mode == "filtered":
        allowed_BV = allowed(scaled_BV, options.top_k_B, options.top_p_B)
        scaled_BV = jnp.where(allowed_BV, scaled_BV, -jnp.inf)
    drawn_B = jnp.argmax(scaled_BV + noise_BV, axis=-1).astype(jnp.int32)
    return jnp.where(options.temperature_B > 0, drawn_B, greedy_B)


def allowed(logits_BV: Array, top_k_B: RowArray, top_p_B: RowArray) -> Array:
    """Return a mask `[B, V]` of the tokens that top-k, and then top-p among them, allow.

    Of equal logits the lower id counts as likelier. The token that reaches top_p is allowed.
    """
    order_BV = jnp.argsort(-logits_BV, axis=-1, stable=True)
    sorted_BV = jnp.take_along_axis(logits_BV, order_BV, axis=-1)
    ids_V = jnp.arange(logits_BV.shape[1])
    kept_BV = (top_k_B[:, None] == 0) | (ids_V < top_k_B[:, None])
    probs_BV = jax.nn.softmax(jnp.where(kept_BV, sorted_BV, -jnp.inf), axis=-1)
    before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
    kept_BV &= (before_BV < top_p_B[:, None]) | (top_p_B[:, None] >= 1)
    # The kept tokens come first in this order, so the last of them decides for all.
    last_B1 = kept_BV.sum(-1, keepdims=True) - 1
    least_B1, id_B1 = (jnp.take_along_axis(x, last_B1, axis=-1) for x in (sorted_BV, order_BV))
    return (logits_BV > least_B1) | ((logits_BV == least_B1) & (ids_V <= id_B1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scores:
    """Log-probabilities of tokens `[...]`, and of the N likeliest tokens at their positions.

    Attributes:
        logprob: `[...]`.
        likeliest_N: ids `[..., N]`, the likeliest first.
        logprobs_N: theirs, `[..., N]`.
    """

    logprob: Array
    likeliest_N: Array
    logprobs_N: Array


def score(logits_V: Array, token: Array, model: schema.Model) -> Scores:
    """Return the scores of tokens `[...]` under the softmax of training, from logits `[..., V]`.

    Sampling options change nothing here. The likeliest tokens exclude the vocabulary's padding.
    """
    ids_V = jnp.arange(logits_V.shape[-1])
    total = jax.nn.logsumexp(jnp.where(ids_V < model.softmax_size, logits_V, -jnp.inf), axis=-1)
    own = jnp.take_along_axis(logits_V, token[..., None], axis=-1)[..., 0]
    true_V = jnp.where(ids_V < model.vocab_size, logits_V, -jnp.inf)
    largest_N, likeliest_N = jax.lax.top_k(true_V, N_LIKELIEST)
    return Scores(own - total, likeliest_N, largest_N - total[..., None])


def no_scores(shape: tuple[int, ...]) -> Scores:
    """Return scores of this shape for a loop to fill in."""
    n_shape = (*shape, N_LIKELIEST)
    return Scores(jnp.zeros(shape), jnp.zeros(n_shape, jnp.int32), jnp.zeros(n_shape))
