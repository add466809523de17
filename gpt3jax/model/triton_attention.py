"""Attention by our own kernels, in Triton: with dropout, a window, documents, a split sequence.

The kernels (`model.triton_kernels`) keep no score in memory and draw dropout's mask where they need
it, from two random words for each query and head, so that the mask is the same on every mesh. They
need the extra `triton`; this module is imported without it. Shape suffixes of this file: C shards
of the sequence, R the chunks of consecutive positions that a shard holds.
"""

import dataclasses
import functools
import importlib.util
import inspect
import os
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.interpreters import partial_eval

from gpt3jax.model import cudnn_attention, dropout
from gpt3jax.sharding import rules, sequence

# Queries, keys, values, where chunks start, random words, the segments of queries and of keys.
_Arrays: TypeAlias = tuple[Array, Array, Array, Array, Array | None, Array | None, Array | None]
# The arrays, the output, the logs of the softmax's sums.
_Residuals: TypeAlias = tuple[_Arrays, Array, Array]
# Of the arrays: only the first three have one.
_Gradients: TypeAlias = tuple[Array, Array, Array, None, None, None, None]

_LITTLE_SHARED_MEMORY = (86, 89, 120, 121)  # capabilities with 100 KB: GeForce, RTX, L40

_capability: int | None = None  # of the GPU to compile for, as 90; None: of the one that is here


@dataclasses.dataclass(frozen=True)
class Tile:
    """The size of a kernel's blocks, and how a program works on them."""

    queries: int
    keys: int
    n_warps: int
    n_stages: int  # how many blocks are on their way from memory at once


@dataclasses.dataclass(frozen=True)
class _Options:
    window: int | None
    threshold: int  # of 65,536 values of a probability's random bits, how many drop it


def missing() -> str:
    """Return why the kernels cannot be used and how to install them, "" if they can."""
    if all(importlib.util.find_spec(name) for name in ("jax_triton", "triton")):
        return ""
    return "it needs the extra triton: pip install 'gpt3jax[triton]'"


def refusal(n_positions_per_chunk: int, d_head: int, dtype: str) -> str:
    """Return why the kernels do not serve these sizes and this format, "" if they do."""
    if dtype not in ("float16", "bfloat16"):
        return f"it computes in float16 or bfloat16, not in {dtype}"
    if d_head % 8 or not 16 <= d_head <= 128:
        return f"d_head={d_head} must be a multiple of 8 from 16 to 128"
    if d_head > 64 and _compute_capability() in _LITTLE_SHARED_MEMORY:
        return f"d_head={d_head} needs more shared memory than this kind of GPU has: up to 64"
    if n_positions_per_chunk % 16:
        return f"{n_positions_per_chunk} consecutive positions on a GPU must be a multiple of 16"
    return ""


def _compute_capability() -> int:
    """Return that of the GPUs to compile for, as 90; 0 if they are none of NVIDIA's."""
    if _capability:
        return _capability
    digits = str(getattr(jax.devices()[0], "compute_capability", "")).replace(".", "")
    return int(digits) if digits.isdigit() else 0


def assume_gpu(capability: tuple[int, int]) -> None:
    """Plan and compile for GPUs of this compute capability, whatever is here."""
    global _capability
    _capability = 10 * capability[0] + capability[1]


def attend(
    q_BTHK: Array, k_BSHK: Array, v_BSHK: Array, *, window: int | None = None,
    segments_BT: Array | None = None, words_BTH2: Array | None = None, rate: float = 0.0,
) -> Array:  # fmt: skip
    """Return attention's output `[B, T, H, K]` in the dtype of v.

    `words_BTH2` are uint32, two random words for each query and head: without them there is no
    dropout. Where the sequence is split over `context`, all arrays are in `sequence_order`.
    """
    dropped = 0 if words_BTH2 is None else dropout.threshold(rate)
    starts_CR = jnp.asarray(sequence.chunk_starts(q_BTHK.shape[1]))
    own = sequence.split_sequence((q_BTHK, words_BTH2 if dropped else None))
    own_segments = sequence.split_sequence(segments_BT)
    whole, whole_segments = _gather((k_BSHK, v_BSHK)), _gather(segments_BT)
    by_head, by_row = ("batch", "seq", None, "heads", None), ("batch", "seq", None)
    local = rules.map_shards(
        functools.partial(_attend_shard, _Options(window, dropped)),
        [("seq", None), by_head, by_head, by_row, by_row],
        by_head,
    )
    out_BCTHK = local(starts_CR, own, whole, own_segments, whole_segments)
    return out_BCTHK.reshape(q_BTHK.shape)


def _gather(tree: Any) -> Any:
    if sequence.context_size() > 1:
        return sequence.gather_sequence(tree)
    return jax.tree.map(lambda x: x[:, None], tree)


def _attend_shard(
    options: _Options, starts_1R: Array, own: tuple[Array, Array | None],
    whole: tuple[Array, Array], q_segments_B1T: Array | None, k_segments_B1S: Array | None,
) -> Array:  # fmt: skip
    """Return the attention of one shard's queries to the keys of the whole sequence."""
    q_BTHK, words_BTH2, k_BSHK, v_BSHK, q_segments_BT, k_segments_BS = jax.tree.map(
        lambda x: x[:, 0], (*own, *whole, q_segments_B1T, k_segments_B1S)
    )
    words_BHT2 = None if words_BTH2 is None else jnp.moveaxis(words_BTH2, 2, 1)
    arrays = q_BTHK, k_BSHK, v_BSHK, starts_1R[0], words_BHT2, q_segments_BT, k_segments_BS
    return attend_shard(options, arrays)[:, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend_shard(options: _Options, arrays: _Arrays) -> Array:
    """Return the output `[B, T, H, K]` of the kernels.

    The arrays are queries `[B, T, H, K]` (R chunks of consecutive positions), keys and values
    `[B, S, H, K]` (the whole sequence, in order), the chunks' first positions `[R]`, and optionally
    random words `[B, H, T, 2]` and the document numbers of queries and keys `[B, T]`, `[B, S]`.
    """
    return _forward(options, arrays)[0]


def _forward(options: _Options, arrays: _Arrays) -> tuple[Array, _Residuals]:
    q_BTHK, v_BSHK = arrays[0], arrays[2]
    batch, length, heads, _ = q_BTHK.shape
    tile = tiles(*_sizes(arrays))[0]
    out_BTHK, log_sum_BHT = _run(
        "forward", options, tile, arrays, (),
        [
            jax.ShapeDtypeStruct(q_BTHK.shape, v_BSHK.dtype),
            jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        ],
        (length // tile.queries, heads, batch),
    )  # fmt: skip
    out_BTHK = checkpoint_name(out_BTHK, cudnn_attention.SAVED)
    log_sum_BHT = checkpoint_name(log_sum_BHT, cudnn_attention.SAVED)
    return out_BTHK, (arrays, out_BTHK, log_sum_BHT)


def _backward(options: _Options, residuals: _Residuals, d_out_BTHK: Array) -> tuple[_Gradients]:
    """Return the gradients of queries, keys and values, as FlashAttention computes them.

    Source: Dao et al. 2022, appendix B.
    """
    arrays, out_BTHK, log_sum_BHT = residuals
    q_BTHK, k_BSHK = arrays[:2]
    mean_BHT = jnp.einsum(
        "bthk,bthk->bht", out_BTHK, d_out_BTHK, preferred_element_type=jnp.float32
    )
    others = d_out_BTHK, log_sum_BHT, mean_BHT
    batch, _, heads, _ = q_BTHK.shape
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays[:3]]
    _, tile, keys_tile = tiles(*_sizes(arrays))
    (d_q_BTHK,) = _run(
        "backward_queries", options, tile, arrays, others, shapes[:1],
        (q_BTHK.shape[1] // tile.queries, heads, batch),
    )  # fmt: skip
    d_k_BSHK, d_v_BSHK = _run(
        "backward_keys", options, keys_tile, arrays, others, shapes[1:],
        (k_BSHK.shape[1] // keys_tile.keys, heads, batch),
    )  # fmt: skip
    return ((d_q_BTHK, d_k_BSHK, d_v_BSHK, None, None, None, None),)


attend_shard.defvjp(_forward, _backward)


def _sizes(arrays: _Arrays) -> tuple[int, int]:
    """Return the length of a chunk and the size of a head."""
    return arrays[0].shape[1] // arrays[3].shape[0], arrays[0].shape[3]


def tiles(n_positions_per_chunk: int, d_head: int) -> tuple[Tile, Tile, Tile]:
    """Return the tiles of the forward kernel and of the backward ones, for queries and for keys.

    The largest of which ptxas keeps all accumulators in registers. A block divides the chunk.
    """
    if d_head <= 64:
        wanted = Tile(128, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)
    else:
        wanted = Tile(128, 64, 8, 3), Tile(64, 64, 4, 2), Tile(64, 64, 8, 2)
    largest = n_positions_per_chunk & -n_positions_per_chunk  # power of 2 that divides it

    def cut(tile: Tile) -> Tile:
        sizes = {"queries": min(tile.queries, largest), "keys": min(tile.keys, largest)}
        return dataclasses.replace(tile, **sizes)

    forward, for_queries, for_keys = (cut(tile) for tile in wanted)
    return forward, for_queries, for_keys


def _run(
    kernel: str, options: _Options, tile: Tile, arrays: _Arrays, others: tuple[Array, ...],
    out_shapes: list[jax.ShapeDtypeStruct], grid: tuple[int, ...],
) -> list[Array]:  # fmt: skip
    """Run a kernel on the arrays that all have and the others of its own."""
    q_BTHK, k_BSHK, _, starts_R, _, q_segments_BT, _ = arrays
    _, length, heads, d_head = q_BTHK.shape
    constants = {
        "N_QUERIES": length,
        "N_KEYS": k_BSHK.shape[1],
        "N_HEADS": heads,
        "D_HEAD": d_head,
        "CHUNK": length // starts_R.shape[0],
        "WINDOW": -1 if options.window is None else options.window,
        "SEGMENTS": q_segments_BT is not None,
        "THRESHOLD": options.threshold,
        "SCALE": d_head**-0.5,
        "BLOCK_T": tile.queries,
        "BLOCK_S": tile.keys,
        "BLOCK_K": 1 << (d_head - 1).bit_length(),
    }
    # A kernel does not read what is absent, but has an argument for it.
    given = [starts_R if x is None else x for x in arrays]
    return _call(kernel, [*given, *others], out_shapes, grid, tile, constants)


def _call(
    kernel: str, arrays: list[Array], out_shapes: list[jax.ShapeDtypeStruct],
    grid: tuple[int, ...], tile: Tile, constants: dict[str, Any],
) -> list[Array]:  # fmt: skip
    """Call the Triton kernel of this name; its pointers are the arrays and then the outputs."""
    from gpt3jax.model import triton_kernels

    jax_triton = _jax_triton()
    # jax-triton 0.4 has another name for it.
    parameters = inspect.signature(jax_triton.triton_call).parameters
    shapes = "out_type" if "out_type" in parameters else "out_shape"
    window = "" if constants["WINDOW"] < 0 else f"_window_{constants['WINDOW']}"
    with jax.named_scope(f"triton_{kernel}{window}"):  # the plan reads it
        outputs: list[Array] = jax_triton.triton_call(
            *arrays, kernel=getattr(triton_kernels, kernel), name=kernel, grid=grid,
            num_warps=tile.n_warps, num_stages=tile.n_stages, compute_capability=_capability,
            **{shapes: out_shapes}, **constants,
        )  # fmt: skip
    return outputs


@functools.cache
def _jax_triton() -> Any:
    """Return the package jax_triton, mended where it does not fit the versions beside it."""
    # Fused multiply-adds, as on any GPU; where it is not said Triton 3.9 warns of a change to come.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    # No lines of the source, with its path, in the compiled kernels: they are the same elsewhere.
    os.environ.setdefault("TRITON_DISABLE_LINE_INFO", "1")
    import jax_triton
    import triton

    # Triton writes the PTX of one of its own assemblers, but XLA's must read it. The newer of the
    # two, which Triton takes from Hopper on, asks for CUDA 13.4; the other one for 12.9.
    os.environ.setdefault("TRITON_PTXAS_BLACKWELL_PATH", triton.knobs.nvidia.ptxas.path)
    # Its rule for unused results takes two arguments up to 0.4.1, and three are given since jax
    # 0.12. It says that all of them are used; without it JAX drops a call if none is.
    partial_eval.dce_rules.pop(jax_triton.triton_lib.triton_kernel_call_p, None)
    return jax_triton
