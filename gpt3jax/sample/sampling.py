"""Choosing the next token from logits: greedily, or at random by temperature, top-k and top-p.

What is drawn for a row is a function of its seed, its number in the request and the token's
position, so it depends neither on the mesh nor on the other rows of the batch.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gpt3jax.config import schema
from gpt3jax.sample import text_options

Mode = Literal["greedy", "random", "filtered"]
N_LIKELIEST = 5  # tokens that a score names


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Choice:
    """The options of each row as arrays `[B]`; `key_B` is of the seed and the row's number."""

    temperature_B: Any
    top_k_B: Any
    top_p_B: Any
    key_B: Any


def make_choice(options: list[text_options.Options], rows: list[int]) -> tuple[Choice, Mode]:
    """Return the arrays of rows with these numbers in their requests, and what they ask for."""
    seeds_B = np.asarray([o.seed for o in options], np.uint32)
    random = [o for o in options if o.temperature > 0]
    filtered = any(o.top_k > 0 or o.top_p < 1 for o in random)
    choice = Choice(
        temperature_B=np.asarray([o.temperature for o in options], np.float32),
        top_k_B=np.asarray([o.top_k for o in options], np.int32),
        top_p_B=np.asarray([o.top_p for o in options], np.float32),
        key_B=_keys(seeds_B, np.asarray(rows, np.uint32)),
    )
    return choice, "filtered" if filtered else "random" if random else "greedy"


@jax.jit
def _keys(seeds_B: Any, rows_B: Any) -> Any:
    return jax.vmap(lambda seed, row: jax.random.fold_in(jax.random.key(seed), row))(
        seeds_B, rows_B
    )


def choose(logits_BV: Array, positions_B: Array, choice: Choice, mode: Mode) -> Array:
    """Return the next token of each row, which will stand at its position.

    Logits are fp32, and -inf where a token cannot be. `mode` leaves out what no row asks for.
    """
    greedy_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    if mode == "greedy":
        return greedy_B
    temperature_B1 = choice.temperature_B[:, None]
    # Less their largest, so that no temperature makes two of them infinite.
    scaled_BV = logits_BV - logits_BV.max(-1, keepdims=True)
    scaled_BV /= jnp.where(temperature_B1 > 0, temperature_B1, 1)

    def draw(key: Any, position: Array) -> Array:
        return jax.random.gumbel(jax.random.fold_in(key, position), logits_BV.shape[1:])

    noise_BV = jax.vmap(draw)(choice.key_B, positions_B)
    if mode == "filtered":
        scaled_BV = jnp.where(
            allowed(scaled_BV, choice.top_k_B, choice.top_p_B), scaled_BV, -jnp.inf
        )
    drawn_B = jnp.argmax(scaled_BV + noise_BV, axis=-1).astype(jnp.int32)
    return jnp.where(choice.temperature_B > 0, drawn_B, greedy_B)


def allowed(logits_BV: Array, top_k_B: Array, top_p_B: Array) -> Array:
    """Return the bools `[B, V]` of the tokens that top-k, and then top-p among them, leave.

    Of equal logits the lower id counts as likelier. The token that reaches top_p is still in.
    """
    order_BV = jnp.argsort(-logits_BV, axis=-1, stable=True)
    sorted_BV = jnp.take_along_axis(logits_BV, order_BV, axis=-1)
    ids_V = jnp.arange(logits_BV.shape[1])
    kept_BV = (top_k_B[:, None] == 0) | (ids_V < top_k_B[:, None])
    probs_BV = jax.nn.softmax(jnp.where(kept_BV, sorted_BV, -jnp.inf), axis=-1)
    before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
    kept_BV &= (before_BV < top_p_B[:, None]) | (top_p_B[:, None] >= 1)
    # What is kept comes first in the order, so its last tells it all.
    last_B1 = kept_BV.sum(-1, keepdims=True) - 1
    least_B1, id_B1 = (jnp.take_along_axis(x, last_B1, axis=-1) for x in (sorted_BV, order_BV))
    return (logits_BV > least_B1) | ((logits_BV == least_B1) & (ids_V <= id_B1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scores:
    """Log-probabilities of tokens, and of the likeliest N in their places, arrays `[...]`."""

    logprob: Any
    likeliest_N: Any  # [..., N] ids, the likeliest first
    logprobs_N: Any


def score(logits_V: Array, token: Array, model: schema.Model) -> Scores:
    """Return the scores of tokens `[...]` under the softmax of training, from logits `[..., V]`.

    Temperature and the like change nothing. The likeliest are of the true vocabulary.
    """
    ids_V = jnp.arange(logits_V.shape[-1])
    total = jax.nn.logsumexp(jnp.where(ids_V < model.softmax_size, logits_V, -jnp.inf), axis=-1)
    own = jnp.take_along_axis(logits_V, token[..., None], axis=-1)[..., 0]
    true_V = jnp.where(ids_V < model.vocab_size, logits_V, -jnp.inf)
    largest_N, likeliest_N = jax.lax.top_k(true_V, N_LIKELIEST)
    return Scores(own - total, likeliest_N, largest_N - total[..., None])


def no_scores(shape: tuple[int, ...]) -> Scores:
    """Return the scores of places without tokens."""
    n_shape = (*shape, N_LIKELIEST)
    return Scores(jnp.zeros(shape), jnp.zeros(n_shape, jnp.int32), jnp.zeros(n_shape))
