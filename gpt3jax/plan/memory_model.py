"""Closed forms of the memory that a GPU needs for a step of a layout.

States and the batch are exact. Values that live only during a step are estimates: their
coefficients are fitted to steps compiled for H100s (docs/plan.md says how far they are off).
Touches no device.
"""

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
_SAVED = {"full": 1, "residual": 2, "mlp": 6, "dots": 10, "none": 16}


Dims = list[tuple[int, str | None]]
"""Size and logical axis (`rules.RULES`) of each dimension."""


def parameters(cfg: schema.Config, sizes: dict[str, int], *, over_data: bool) -> int:
    """Return how many parameters a GPU holds; `over_data`: cut as `mesh.shard_optimizer` does.

    The sizes of its axes cut each tensor. The data axis cuts the largest dimension that no other
    axis cuts and that it divides (`sharding.layouts.data_dim`).
    """
    layers = cfg.model.n_layers // cfg.mesh.virtual_stages
    stack: Dims = [(cfg.mesh.virtual_stages, None)] if cfg.mesh.virtual_stages > 1 else []
    stack.append((layers, "layers"))
    total = 0
    for tensor in _tensors(cfg.model):
        total += _local_size([*stack, *tensor], sizes, over_data=over_data)
    for tensor in _ends(cfg.model):
        total += _local_size(tensor, sizes, over_data=over_data)
    return total


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

    - parameters, optimizer (fp32, two moments) and batch are exact.
    - gradients: fp32 sums, and gradients that wait to be added to them.
    - activations: values saved for the backward pass.
    - logits: those of one chunk.
    - temporaries: the working memory of a layer or of the head, whichever is larger.
    """
    sizes, zero = layout.sizes, cfg.mesh.shard_optimizer
    n_state = parameters(cfg, sizes, over_data=zero)
    n_whole = parameters(cfg, sizes, over_data=False)
    logits = _logits_bytes(cfg, layout)
    working = max(_layer_bytes(cfg, layout), _head_bytes(cfg, layout) + logits)
    cast = 0.0
    if zero or sizes["stage"] > 1:  # weights are cast once a step
        cast = n_whole * width(cfg)
    return {
        "parameters": 4.0 * n_state,
        "optimizer": 8.0 * n_state,
        "batch": _batch_bytes(cfg, layout),
        "gradients": 4.0 * n_whole * _gradient_copies(cfg, sizes),
        "activations": _saved_bytes(cfg, layout),
        "logits": logits,
        "temporaries": cast + working - logits,
    }


def width(cfg: schema.Config) -> int:
    """Return the bytes of a number in the compute format."""
    return 4 if cfg.precision.compute_dtype == "float32" else 2


def _batch_bytes(cfg: schema.Config, layout: placement.Layout) -> float:
    """Return the batch: four arrays of 4 bytes a token, cut over data and fsdp alone."""
    arrays = 5 if cfg.data.reset_attention_mask else 4
    rows = layout.n_microbatches * cfg.batch.microbatch_size
    return 4.0 * rows * (arrays * cfg.model.seq_len + 1)


def _gradient_copies(cfg: schema.Config, sizes: dict[str, int]) -> float:
    """Return how many copies of its gradients a GPU holds (fitted).

    They are the running sum, the microbatch's own, and over replicas the sum's result too.
    """
    if sizes["stage"] > 1:  # a microbatch's own gradients are added layer by layer
        return 1.0
    return 2.0 if cfg.mesh.shard_optimizer or sizes["data"] == 1 else 3.25


def scores(cfg: schema.Config, layout: placement.Layout) -> float:
    """Return how many scores XLA's attention computes: one layer, one microbatch, one GPU."""
    if layout.attention != "xla":
        return 0.0
    model = cfg.model
    windows = [None] if model.attention.pattern == "dense" else [model.attention.band, None]
    per_head = sum(attention.n_scores(model.seq_len, window) for window in windows) / len(windows)
    heads = cfg.batch.microbatch_size * model.n_heads
    return heads * per_head / (layout.sizes["tensor"] * layout.sizes["context"])


def _saved_bytes(cfg: schema.Config, layout: placement.Layout) -> float:
    """Return the bytes that layers save; with stages, in every tick (docs/parallelism.md)."""
    model, stages, rounds = cfg.model, layout.sizes["stage"], cfg.mesh.virtual_stages
    a, m = activation_bytes(cfg, layout), layout.n_microbatches
    per_layer = a * _SAVED[remat.in_effect(model.remat, stages > 1)]
    if stages > 1:
        layers = (m * rounds + stages - 1) * model.n_layers / (stages * rounds)
        return layers * per_layer + 4 * m / stages * a
    if model.remat == "none" and model.dropout:
        per_layer += 2 * a / width(cfg)  # masks of a byte
    return model.n_layers * per_layer


def _layer_bytes(cfg: schema.Config, layout: placement.Layout) -> float:
    """Return the bytes that a layer works on (fitted).

    They are two layers' gathered weights, a gradient before it is scattered, and values: about 10
    that are whole along the sequence, and 6.5 of a GPU's part of it. XLA's attention works on all
    blocks of queries at once, 31 bytes a score.
    """
    model, tensor = cfg.model, layout.sizes["tensor"]
    weights = 12 * model.d_model**2 / tensor * width(cfg)
    a = activation_bytes(cfg, layout)
    gathered = tensor if cfg.mesh.sequence_parallel else 1
    if layout.sizes["context"] > 1:  # keys, values and their gradients
        gathered *= 1 + layout.sizes["context"]
    return 2.8 * weights + (6.5 + 10 * gathered) * a + 31.0 * scores(cfg, layout)


def _logits_bytes(cfg: schema.Config, layout: placement.Layout) -> float:
    """Return one chunk of logits in fp32, and its gradient in the compute format."""
    model = cfg.model
    tokens = cfg.batch.microbatch_size * model.seq_len / layout.sizes["context"]
    if layout.sizes["stage"] > 1:  # a stage joins its microbatches
        tokens *= layout.n_microbatches / layout.sizes["stage"]
    tokens /= model.n_loss_chunks
    return tokens * model.padded_vocab_size / layout.sizes["tensor"] * (4 + width(cfg))


def _head_bytes(cfg: schema.Config, layout: placement.Layout) -> float:
    """Return the vocabulary's table: fp32 for the lookup, a copy for the head, its gradient."""
    table = cfg.model.padded_vocab_size * cfg.model.d_model / layout.sizes["tensor"]
    return table * (4 + width(cfg) + 4)


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
