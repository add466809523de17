"""Closed forms of the bytes that elementwise work reads from memory and writes to it in a step.

Coefficients are fitted to the kernels of steps compiled for H100s, by XLA's cost model.
"""

from gpt3jax.config import schema
from gpt3jax.model import remat
from gpt3jax.plan import memory_model, placement


def in_step(cfg: schema.Config, layout: placement.Layout) -> float:
    """Return the bytes that elementwise work moves on a GPU, idle ticks of a pipeline included."""
    n_passes = placement.schedule(cfg, layout).n_ticks / cfg.mesh.virtual_stages
    n_layers = cfg.model.n_layers / layout.sizes["stage"]
    layer = in_layer(cfg, layout) + of_scores(cfg, layout)
    return n_passes * n_layers * layer + _outside_layers(cfg, layout)


def in_layer(cfg: schema.Config, layout: placement.Layout) -> float:
    """Return the bytes of a layer on one microbatch, without attention's scores."""
    return _values(cfg, layout) + _weights(cfg, layout) + _of_8_bits(cfg, layout)


def _values(cfg: schema.Config, layout: placement.Layout) -> float:
    """Return the bytes of a layer's values, forward and backward, in one microbatch.

    Values of the compute format for each token and unit of d_model: 108, 25 more where the MLP's
    first product runs again, 16 with dropout, and 3 for each value that is saved (to fill the
    stack, to write to it, to read from it). Microbatches of several rows that are gathered along
    the sequence over `tensor` are transposed: 19 values of the whole sequence.
    """
    model, tensor = cfg.model, layout.sizes["tensor"]
    policy = remat.in_effect(model.remat, layout.sizes["stage"] > 1)
    again = 25 if "hidden" not in remat.SAVED[policy] else 0
    values = 108 + again + (16 if model.dropout else 0) + 3 * memory_model.SAVED[policy]
    transposed = tensor > 1 and cfg.mesh.sequence_parallel and cfg.batch.microbatch_size > 1
    whole = 19 if transposed else 0
    tokens = cfg.batch.microbatch_size * model.seq_len / layout.sizes["context"]
    return tokens * model.d_model * memory_model.width(cfg) * (values / tensor + whole)


def _weights(cfg: schema.Config, layout: placement.Layout) -> float:
    """Return the bytes that a layer's weights and their gradients add in one microbatch.

    With stages a weight is copied out of its stack, forward and backward, 2 + 2 bytes each, and its
    gradient added to a sum in fp32. Otherwise weights and gradients are cast.
    """
    model, sizes = cfg.model, layout.sizes
    weights = 12 * model.d_model**2 / sizes["tensor"]
    if sizes["stage"] > 1:
        return 19.4 * weights / sizes["fsdp"]
    return 1.1 * memory_model.width(cfg) * weights


def _of_8_bits(cfg: schema.Config, layout: placement.Layout) -> float:
    """Return the bytes that 8-bit operands add in a layer and microbatch: scaled, rounded, turned.

    For each token and unit of d_model 140, 62 where nothing runs again, and 8 of what is whole over
    `tensor`; for each weight 14, or 2.7 where it is gathered in 8 bits.
    """
    if cfg.precision.matmul_dtype != "float8":
        return 0.0
    model, sizes = cfg.model, layout.sizes
    policy = remat.in_effect(model.remat, sizes["stage"] > 1)
    tokens = cfg.batch.microbatch_size * model.seq_len / sizes["context"]
    values = (62 if policy == "none" else 140) / sizes["tensor"] + 8
    weights = 12 * model.d_model**2 / sizes["tensor"]
    of_weights = 2.7 if memory_model.gathers_8_bits(cfg, layout) else 14
    in_8_bits = 1 - 2 * cfg.precision.end_layers / model.n_layers
    return in_8_bits * (tokens * model.d_model * values + of_weights * weights)


def of_scores(cfg: schema.Config, layout: placement.Layout) -> float:
    """Return the bytes of XLA's attention in a layer and microbatch, beside its products.

    50 a score, 37 with dropout, 12 more where no weights are gathered ahead: scores are then
    written once more. A third more where the forward pass runs again.
    """
    each = 37 if cfg.model.attention_dropout else 50
    each += 12 if layout.sizes["fsdp"] == 1 or layout.sizes["stage"] > 1 else 0
    again = 1 / 3 if cfg.model.remat in ("full", "residual") else 0
    return each * (1 + again) * memory_model.scores(cfg, layout)


def _outside_layers(cfg: schema.Config, layout: placement.Layout) -> float:
    """Return the bytes of logits, of sums of gradients, and of the optimizer.

    24 a logit, 40 a parameter of the optimizer's. Gradients are added up for each microbatch, 16 a
    parameter; with stages layers have done that, and 6 are left. Where the optimizer is sharded,
    gathered weights and gradients before they are scattered are copied: 11.
    """
    model, sizes = cfg.model, layout.sizes
    tokens = cfg.batch.microbatch_size * model.seq_len / sizes["context"]
    logits = tokens * model.padded_vocab_size / sizes["tensor"]
    held = memory_model.parameters(cfg, sizes, over_data=False)
    stored = memory_model.parameters(cfg, sizes, over_data=cfg.mesh.shard_optimizer)
    sums = 6 if sizes["stage"] > 1 else 16 * layout.n_microbatches + 11 * cfg.mesh.shard_optimizer
    return 24 * logits * memory_model.end_microbatches(cfg, layout) + sums * held + 40 * stored
