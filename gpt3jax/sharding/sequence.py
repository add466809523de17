"""How the sequence is cut over `context`: the zig-zag order, and gathers of keys."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt3jax.sharding import rules

_HEADS = ("heads", "head_dim")


def context_size() -> int:
    """Return how many ways the sequence is split; 1 where no mesh is set."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else int(mesh.shape["context"])


def chunk_starts(n_positions: int) -> np.ndarray:
    """Return `[C, R]`: where the R chunks of consecutive positions start that each shard holds.

    Of 2 C chunks shard c holds c and 2 C - 1 - c, an early and a late one: so each has as much
    to do under a causal mask. Without context parallelism it is one chunk that starts at 0.
    """
    c = context_size()
    if c == 1:
        return np.zeros((1, 1), np.int32)
    early = np.arange(c, dtype=np.int32)
    return np.stack([early, 2 * c - 1 - early], axis=1) * np.int32(n_positions // (2 * c))


def sequence_order(n_positions: int) -> Any:
    """Return which place of the sequence stands at each position of an array `[B, T, ...]`."""
    starts_CR = chunk_starts(n_positions)
    chunk_T = jnp.arange(n_positions // starts_CR.size)
    return (jnp.asarray(starts_CR)[..., None] + chunk_T).ravel()


def shard_sequence(batch: dict[str, Any]) -> dict[str, Any]:
    """Return a batch whose arrays `[M, B, T]` are in `sequence_order`, sharded over `context`."""
    if context_size() == 1:
        return batch

    def one(x: Any) -> Any:
        return rules.constrain(_in_shard_order(x), None, "batch", "seq")

    return {name: one(x) if x.ndim == 3 else x for name, x in batch.items()}


def _in_shard_order(x: Any) -> Any:
    """Return an array `[..., T]` in `sequence_order`."""
    chunks = x.reshape(*x.shape[:-1], 2 * context_size(), -1)
    early, late = jnp.split(chunks, 2, axis=-2)
    return jnp.stack([early, late[..., ::-1, :]], axis=-2).reshape(x.shape)


def stretch_starts(n_positions: int, n_before: int) -> np.ndarray:
    """Return `[C, R]`: where `gather_stretches` starts, `n_before` positions before each chunk.

    All stretches have one length: near the start of the sequence they reach further instead.
    """
    starts_CR = chunk_starts(n_positions)
    n = min(n_positions, n_positions // starts_CR.size + n_before)
    return np.clip(starts_CR - n_before, 0, n_positions - n)


def split_sequence(tree: Any) -> Any:
    """Give arrays `[B, T, ...]` a dimension for the shards of their sequence: `[B, C, T / C, ...]`.

    What is done for each shard of that dimension is done by the devices that hold it.
    """
    n_shards = context_size()

    def one(x: Any) -> Any:
        x = x.reshape(x.shape[0], n_shards, -1, *x.shape[2:])
        return rules.constrain(x, "batch", "seq", None, *_HEADS[: x.ndim - 3])

    return jax.tree.map(one, tree)


def gather_sequence(tree: Any) -> Any:
    """Give each shard arrays `[B, T, ...]` whole, in their true order: `[B, C, T, ...]`.

    The copies make the gradient's sum over shards one sum, at the end.
    """
    n_shards = context_size()

    def one(x: Any) -> Any:
        copies = jnp.broadcast_to(x[:, None], (x.shape[0], n_shards, *x.shape[1:]))
        copies = rules.constrain(copies, "batch", "seq", None, *_HEADS[: x.ndim - 2])
        return _in_true_order(copies.reshape(-1, *x.shape[1:])).reshape(copies.shape)

    return jax.tree.map(one, tree)


def gather_stretches(tree: Any, n_before: int) -> Any:
    """Give each chunk of arrays `[B, T, ...]` what leads up to it as well: `[B, C, R, S, ...]`."""

    def one(x: Any) -> Any:
        starts_CR = stretch_starts(x.shape[1], n_before)
        n = x.shape[1] - int(starts_CR.max())
        x = _in_true_order(rules.constrain(x, "batch", None, *_HEADS[: x.ndim - 2]))
        stretches = jnp.stack([x[:, i : i + n] for i in starts_CR.ravel().tolist()], axis=1)
        # Whole on each device at first: one gather, and each keeps its own part.
        stretches = rules.constrain(stretches, "batch", None, None, *_HEADS[: x.ndim - 2])
        stretches = stretches.reshape(x.shape[0], *starts_CR.shape, *stretches.shape[2:])
        return rules.constrain(stretches, "batch", "seq", None, None, *_HEADS[: x.ndim - 2])

    return jax.tree.map(one, tree)


def _in_true_order(x: Any) -> Any:
    """Undo `sequence_order` on an array `[B, T, ...]`."""
    chunks = x.reshape(x.shape[0], context_size(), 2, -1, *x.shape[2:])
    halves = chunks[:, :, 0], chunks[:, ::-1, 1]
    return jnp.concatenate(halves, axis=1).reshape(x.shape)
