"""How the `context` axis cuts the sequence: the zig-zag order, and gathers of keys and values.

Of 2 C chunks of the sequence, shard c of C holds chunks c and 2 C - 1 - c, an early and a late
one. So every shard has the same work under a causal mask.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from gpt3jax.sharding import rules

Tree = TypeVar("Tree")
_HEADS = ("heads", "head_dim")


def context_size() -> int:
    """Return into how many shards the sequence is cut; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else int(mesh.shape["context"])


def chunk_starts(n_positions: int) -> np.ndarray:
    """Return `[C, R]`: the first position of each of the R chunks that each shard holds.

    Without context parallelism there is one chunk, which starts at 0.
    """
    c = context_size()
    if c == 1:
        return np.zeros((1, 1), np.int32)
    early = np.arange(c, dtype=np.int32)
    return np.stack([early, 2 * c - 1 - early], axis=1) * np.int32(n_positions // (2 * c))


def sequence_order(n_positions: int) -> jax.Array:
    """Return `[T]`: the place in the sequence of each position of a sharded array `[B, T, ...]`."""
    starts_CR = chunk_starts(n_positions)
    chunk_T = jnp.arange(n_positions // starts_CR.size)
    return (jnp.asarray(starts_CR)[..., None] + chunk_T).ravel()


def shard_sequence(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Return a batch with its arrays `[M, B, T]` in `sequence_order`, sharded over `context`."""
    if context_size() == 1:
        return batch

    def shard(x: jax.Array) -> jax.Array:
        return rules.constrain(_in_shard_order(x), None, "batch", "seq")

    return {name: shard(x) if x.ndim == 3 else x for name, x in batch.items()}


def _in_shard_order(x: jax.Array) -> jax.Array:
    """Return an array `[..., T]` in `sequence_order`."""
    chunks = x.reshape(*x.shape[:-1], 2 * context_size(), -1)
    early, late = jnp.split(chunks, 2, axis=-2)
    return jnp.stack([early, late[..., ::-1, :]], axis=-2).reshape(x.shape)


def stretch_starts(n_positions: int, n_before: int) -> np.ndarray:
    """Return `[C, R]`: the first position of each stretch, `n_before` positions before its chunk.

    All stretches have the same length. Near the start of the sequence they reach further on.
    """
    starts_CR = chunk_starts(n_positions)
    n = min(n_positions, n_positions // starts_CR.size + n_before)
    return np.clip(starts_CR - n_before, 0, n_positions - n)


def split_sequence(tree: Tree) -> Tree:
    """Give arrays `[B, T, ...]` a dimension for the shards of their sequence: `[B, C, T / C, ...]`.

    Work on one shard of that dimension is done by the devices that hold it.
    """
    n_shards = context_size()

    def split(x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0], n_shards, -1, *x.shape[2:])
        return rules.constrain(x, "batch", "seq", None, *_HEADS[: x.ndim - 3])

    return jax.tree.map(split, tree)


def gather_sequence(tree: Tree) -> Tree:
    """Give each shard whole arrays `[B, T, ...]` in their true order: `[B, C, T, ...]`.

    Because of the copies the gradient is summed over the shards once, at the end.
    """
    n_shards = context_size()

    def gather(x: jax.Array) -> jax.Array:
        copies = jnp.broadcast_to(x[:, None], (x.shape[0], n_shards, *x.shape[1:]))
        copies = rules.constrain(copies, "batch", "seq", None, *_HEADS[: x.ndim - 2])
        return _in_true_order(copies.reshape(-1, *x.shape[1:])).reshape(copies.shape)

    return jax.tree.map(gather, tree)


def gather_stretches(tree: Tree, n_before: int) -> Tree:
    """Give each chunk of arrays `[B, T, ...]` the positions before it too: `[B, C, R, S, ...]`."""

    def gather(x: jax.Array) -> jax.Array:
        starts_CR = stretch_starts(x.shape[1], n_before)
        n = x.shape[1] - int(starts_CR.max())
        x = _in_true_order(rules.constrain(x, "batch", None, *_HEADS[: x.ndim - 2]))
        stretches = jnp.stack([x[:, i : i + n] for i in starts_CR.ravel().tolist()], axis=1)
        # Whole on each device at first: one gather, and each keeps its own part.
        stretches = rules.constrain(stretches, "batch", None, None, *_HEADS[: x.ndim - 2])
        stretches = stretches.reshape(x.shape[0], *starts_CR.shape, *stretches.shape[2:])
        return rules.constrain(stretches, "batch", "seq", None, None, *_HEADS[: x.ndim - 2])

    return jax.tree.map(gather, tree)


def _in_true_order(x: jax.Array) -> jax.Array:
    """Undo `sequence_order` on an array `[B, T, ...]`."""
    chunks = x.reshape(x.shape[0], context_size(), 2, -1, *x.shape[2:])
    halves = chunks[:, :, 0], chunks[:, ::-1, 1]
    return jnp.concatenate(halves, axis=1).reshape(x.shape)
