"""Closed forms of the memory that a GPU needs for a step of a layout.

States and the batch are exact. Values that live only during a step are estimates: their
coefficients are fitted to steps compiled for H100s (docs/plan.md says how far they are off).
Touches no device.
"""

import functools
import math

from gpt3jax.config import schema
from gpt3jax.hardware import gpus, xla_flags
from gpt3jax.model import attention, remat
from gpt3jax.plan import placement
from gpt3jax.sharding import rules

# Values in the compute format that a layer saves for the backward pass, per token and unit of
# d_model, by `model.remat`: the layer's input, and the values that the policy names. "none" saves
# the inputs of norms (2), of products (QKV, projection, both of the MLP: 1, 1, 1, 4) and of GELU
# (4), and queries, keys and values (3).
SAVED = {"full": 1, "residual": 2, "mlp": 6, "dots": 10, "none": 16}


Dims = list[tuple[int, str | None]]
"""Size and logical axis (`rules.RULES`) of each dimension."""


def parameters(cfg: schema.Config, sizes: dict[str, int], *, over_data: bool) -> int:
    """Return how many parameters a GPU holds; `over_data`: cut as `mesh.shard_optimizer` does.

    The sizes of its axes cut each tensor. The data axis cuts the largest dimension that no other
    axis cuts and that it divides (`sharding.layouts.data_dim`).
    """
    return _counts(cfg, sizes)[over_data]


def end_parameters(cfg: schema.Config, sizes: dict[str, int]) -> int:
    """Return how many parameters outside the layers a GPU holds, not cut over data."""
    return _counts(cfg, sizes)[2]


def end_microbatches(cfg: schema.Config, layout: placement.Layout) -> int:
    """Return for how many microbatches a GPU runs embedding and head: a stage runs its share."""
    return -(-layout.n_microbatches // layout.sizes["stage"])


def _counts(cfg: schema.Config, sizes: dict[str, int]) -> tuple[int, int, int]:
    model = cfg.model
    shape = (
        model.n_layers, model.d_model, model.n_heads, model.seq_len, model.padded_vocab_size,
    )  # fmt: skip
    return _count(shape, cfg.mesh.virtual_stages, tuple(sizes.items()))


@functools.cache  # a search asks for each mesh some hundred times
def _count(
    shape: tuple[int, int, int, int, int], virtual_stages: int, axes: tuple[tuple[str, int], ...]
) -> tuple[int, int, int]:
    """Return a GPU's parameters: not cut over data, cut over it, outside layers not cut.

    `shape` are a model's layers, width, heads, positions and padded vocabulary.
    """
    n_layers, d_model, n_heads, seq_len, n_vocab = shape
    model = schema.Model(
        n_layers=n_layers, d_model=d_model, n_heads=n_heads, seq_len=seq_len, vocab_size=n_vocab,
        vocab_multiple=1,
    )  # fmt: skip
    sizes = dict(axes)
    stack: Dims = [(virtual_stages, None)] if virtual_stages > 1 else []
    stack.append((n_layers // virtual_stages, "layers"))
    ends = _ends(model)
    tensors = [*([*stack, *tensor] for tensor in _tensors(model)), *ends]
    return (
        sum(_local_size(dims, sizes, over_data=False) for dims in tensors),
        sum(_local_size(dims, sizes, over_data=True) for dims in tensors),
        sum(_local_size(dims, sizes, over_data=False) for dims in ends),
    )


def _tensors(model: schema.Model) -> list[Dims]:
    """Return the dimensions of a layer's parameters."""
    d, f, k = (model.d_model, None), (model.d_ff, "mlp"), (model.d_head, None)
    h, embed, three = (model.n_heads, "heads"), (model.d_model, "embed"), (3, None)
    # Two LayerNorms, and the biases of both branches' outputs.
    norms_and_biases: list[Dims] = [[d]] * 6
    return [
        *norms_and_biases, [embed, three, h, k], [three, h, k], [h, k, embed], [embed, f], [f],
        [f, embed],
    ]  # fmt: skip


def _ends(model: schema.Model) -> list[Dims]:
    """Return the dimensions of parameters outside the layers: table, positions, last LayerNorm."""
    embed = (model.d_model, "embed")
    table: Dims = [(model.padded_vocab_size, "vocab"), embed]
    return [table, [(model.seq_len, None), embed], [(model.d_model, None)], [(model.d_model, None)]]


def _local_size(dims: Dims, sizes: dict[str, int], *, over_data: bool) -> int:
    n_cuts = [math.prod(sizes[a] for a in rules.RULES[axis]) for _, axis in dims]
    local = math.prod(size // n for (size, _), n in zip(dims, n_cuts, strict=True))
    n_data = sizes["data"]
    free = any(n == 1 and size % n_data == 0 for (size, _), n in zip(dims, n_cuts, strict=True))
    return local // n_data if over_data and free else local


def activation_bytes(cfg: schema.Config, layout: placement.Layout) -> float:
    """Return the bytes of a GPU's part of one microbatch's residual stream (compute format)."""
    tokens = cfg.batch.microbatch_size * cfg.model.seq_len / layout.sizes["context"]
    ways = layout.sizes["tensor"] if cfg.mesh.sequence_parallel else 1
    return tokens * cfg.model.d_model * width(cfg) / ways


def memory(cfg: schema.Config, layout: placement.Layout) -> dict[str, float]:
    """Return a GPU's bytes at the peak of a step, by purpose; their sum is the peak.

    The peak is in the head, with its logits, or in the backward pass of layers.
    - parameters, optimizer (fp32, two moments) and batch are exact.
    - gradients: fp32 sums, and in the backward pass the microbatch's own.
    - activations: values saved for the backward pass.
    - logits: those of one chunk.
    - temporaries: the working memory of a layer or of the head, and weights that are cast once.
    """
    sizes, zero = layout.sizes, cfg.mesh.shard_optimizer
    n_state = parameters(cfg, sizes, over_data=zero)
    n_whole = parameters(cfg, sizes, over_data=False)
    own = 0.0 if sizes["stage"] > 1 else 4.0 * n_whole  # stages add to the sums layer by layer
    logits, head, layer = (
        _logits_bytes(cfg, layout),
        _head_bytes(cfg, layout),
        _layer_bytes(cfg, layout),
    )
    in_head = logits + head > own + layer
    cast = n_whole * width(cfg) if zero or sizes["stage"] > 1 else 0.0
    return {
        "parameters": 4.0 * n_state,
        "optimizer": 8.0 * n_state,
        "batch": _batch_bytes(cfg, layout),
        "gradients": 4.0 * n_whole * _gradient_sums(cfg, layout) + (0.0 if in_head else own),
        "activations": _saved_bytes(cfg, layout),
        "logits": logits if in_head else 0.0,
        "temporaries": cast + (head if in_head else layer),
    }


def width(cfg: schema.Config) -> int:
    """Return the bytes of a number in the compute format."""
    return 4 if cfg.precision.compute_dtype == "float32" else 2


def gathers_8_bits(cfg: schema.Config, layout: placement.Layout) -> bool:
    """Return whether layers' matrices are gathered in 8 bits: ahead of their use, over fsdp."""
    is_ahead = layout.sizes["fsdp"] > 1 and layout.sizes["stage"] == 1
    return is_ahead and cfg.precision.matmul_dtype == "float8"


def _batch_bytes(cfg: schema.Config, layout: placement.Layout) -> float:
    """Return the batch: four arrays of 4 bytes a token, cut over data and fsdp alone."""
    arrays = 5 if cfg.data.reset_attention_mask else 4
    rows = layout.n_microbatches * cfg.batch.microbatch_size
    return 4.0 * rows * (arrays * cfg.model.seq_len + 1)


def _gradient_sums(cfg: schema.Config, layout: placement.Layout) -> float:
    """Return how many sums of gradients a GPU holds, in parameters that it holds (fitted).

    They are the running sum, unless the only microbatch's gradient is all, and over replicas that
    keep the whole optimizer the sum's result too.
    """
    if layout.sizes["stage"] > 1:
        return 1.0
    if layout.sizes["data"] > 1 and not cfg.mesh.shard_optimizer:
        return 2.25
    return 1.0 if layout.n_microbatches > 1 else 0.0


def scores(cfg: schema.Config, layout: placement.Layout) -> float:
    """Return how many scores XLA's attention computes: the mean layer, one microbatch, one GPU.

    It computes bands over a split sequence too, where other layers use cuDNN.
    """
    model, context = cfg.model, layout.sizes["context"]
    is_dense = model.attention.pattern == "dense"
    if layout.attention == "triton" or (layout.attention == "cudnn" and (is_dense or context == 1)):
        return 0.0
    dense = _scores_of_head(model.seq_len, None) if layout.attention == "xla" else 0
    banded = dense if is_dense else _scores_of_head(model.seq_len, model.attention.band)
    heads = cfg.batch.microbatch_size * model.n_heads
    return heads * (dense + banded) / 2 / (layout.sizes["tensor"] * context)


_scores_of_head = functools.cache(attention.n_scores)


def _saved_bytes(cfg: schema.Config, layout: placement.Layout) -> float:
    """Return the bytes that layers save; with stages, in every tick (docs/parallelism.md)."""
    model, stages = cfg.model, layout.sizes["stage"]
    a = activation_bytes(cfg, layout)
    per_layer = a * SAVED[remat.in_effect(model.remat, stages > 1)]
    if stages > 1:
        n_layers = model.n_layers // (stages * cfg.mesh.virtual_stages)
        in_ticks = placement.schedule(cfg, layout).n_ticks * n_layers * per_layer
        return in_ticks + 4 * end_microbatches(cfg, layout) * a
    if model.remat == "none" and model.dropout:
        per_layer += 2 * a / width(cfg)  # masks of a byte
    return model.n_layers * per_layer


def _layer_bytes(cfg: schema.Config, layout: placement.Layout) -> float:
    """Return the bytes that a layer works on in the backward pass (fitted).

    They are 2.8 times its weights in the compute format: two layers', gathered, and a gradient
    before it is scattered (1.8 times where they are gathered in 8 bits; with stages 1.8 times what
    is gathered); about 10 values that are whole along the sequence, and 6.5 of a GPU's part of it.
    Layers of a period are worked on together. Parts of the table wait.
    XLA's attention works on all blocks of queries at once, 19 bytes a score.
    """
    model, sizes = cfg.model, layout.sizes
    weights = 12 * model.d_model**2 / sizes["tensor"] * width(cfg)
    a = activation_bytes(cfg, layout)
    gathered = sizes["tensor"] if cfg.mesh.sequence_parallel else 1
    if sizes["context"] > 1:  # keys, values and their gradients
        gathered *= 1 + sizes["context"]
    of_scores = 19.0 * scores(cfg, layout)
    if sizes["stage"] > 1:
        return 1.8 * weights * (1 - 1 / sizes["fsdp"]) + 10 * gathered * a + of_scores
    period = 1 if model.attention.pattern == "dense" else 2
    of_weights = 1.8 if gathers_8_bits(cfg, layout) else 2.8
    layers = period * (of_weights * weights + (6.5 + 10 * gathered) * a) + of_scores
    return layers + (6.0 if layout.n_microbatches > 1 else 3.0) * _table(cfg, layout)


def _logits_bytes(cfg: schema.Config, layout: placement.Layout) -> float:
    """Return one chunk of logits in fp32, and its gradient in the compute format."""
    model = cfg.model
    tokens = cfg.batch.microbatch_size * model.seq_len / layout.sizes["context"]
    tokens /= model.n_loss_chunks
    return tokens * model.padded_vocab_size / layout.sizes["tensor"] * (4 + width(cfg))


def _head_bytes(cfg: schema.Config, layout: placement.Layout) -> float:
    """Return the bytes of the vocabulary's table in the head.

    It is a copy in the compute format and the gradient so far, and for further microbatches the one
    in fp32 of the lookup.
    """
    copies = 4 + width(cfg) + 4 if layout.n_microbatches > 1 else 4
    return _table(cfg, layout) * copies


def _table(cfg: schema.Config, layout: placement.Layout) -> float:
    return cfg.model.padded_vocab_size * cfg.model.d_model / layout.sizes["tensor"]


def budget(cfg: schema.Config, layout: placement.Layout, gpu: gpus.Gpu) -> tuple[float, float]:
    """Return the budget of a step, and the headroom in it that the compiler cannot see (bytes).

    The budget is the memory that JAX's allocator gets (`xla_flags.MEMORY_FRACTION`).
    """
    return pool(gpu), headroom(cfg, layout, pool(gpu))


def pool(gpu: gpus.Gpu) -> float:
    """Return the bytes of a GPU that JAX's allocator gets."""
    return xla_flags.MEMORY_FRACTION * gpu.memory_bytes


def headroom(cfg: schema.Config, layout: placement.Layout, pool_bytes: float) -> float:
    """Return the bytes of a pool that neither the compiler nor `memory` counts.

    They are cuDNN's workspace, batch x heads x positions x d_head x 4 bytes, and 3% of the pool for
    fragmentation (assumed).
    """
    workspace = 0.0
    if layout.attention == "cudnn":
        shards = layout.sizes["tensor"] * layout.sizes["context"]
        tokens = cfg.batch.microbatch_size * cfg.model.seq_len
        workspace = 4.0 * tokens * cfg.model.d_model / shards
    return 0.03 * pool_bytes + workspace
