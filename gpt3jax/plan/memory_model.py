"""How a config is cut over N GPUs, and the closed forms of what each then holds.

States and the batch are exact. What lives only during a step is an estimate: its coefficients are
fitted to steps compiled for H100s (docs/plan.md says how far they are off). Touches no device.
"""

import dataclasses
import math

from gpt3jax import errors
from gpt3jax.config import batch_schedule, ranges, schema, validation
from gpt3jax.hardware import gpus, xla_flags
from gpt3jax.model import attention, remat
from gpt3jax.sharding import meshes, rules

# Values of the compute format that the backward pass finds saved of a layer, per token and unit of
# d_model, by `model.remat`: the layer's input, and what the policy names. "none": the inputs
# of norms (2), of products (QKV, projection, both of the MLP: 1, 1, 1, 4) and of GELU (4), and
# queries, keys and values (3).
_SAVED = {"full": 1, "residual": 2, "mlp": 6, "dots": 10, "none": 16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """A config's cut over GPUs, at full batch size."""

    sizes: dict[str, int]
    """Of the mesh's axes, slowest first."""
    n_microbatches: int
    """Of a step and data-parallel rank."""
    attention: str
    """cudnn or xla."""
    problems: tuple[str, ...]
    """Why `gpt3jax.main` would refuse the run although its step exists."""

    @property
    def n_gpus(self) -> int:
        """All GPUs."""
        return math.prod(self.sizes.values())

    def stride(self, axis: str) -> int:
        """Return how many GPUs lie between neighbours on an axis."""
        after = meshes.AXES[meshes.AXES.index(axis) + 1 :]
        return math.prod(self.sizes[a] for a in after)

    def in_node(self, axis: str, gpus_per_node: int) -> int:
        """Return how many of an axis's GPUs share a node."""
        size, stride = self.sizes[axis], self.stride(axis)
        return size if size * stride <= gpus_per_node else max(1, gpus_per_node // stride)


def lay_out(cfg: schema.Config, n_gpus: int, gpus_per_node: int) -> Layout:
    """Return the layout of a config on this many GPUs, -1 resolved.

    Raises:
        UserError: mesh, model, batch and number of GPUs do not go together, or the batch's
            schedule cannot be read.
    """
    check_nodes(n_gpus, gpus_per_node)
    schedule = batch_schedule.from_config(cfg.batch, cfg.model.seq_len)
    sizes = _resolve(cfg.mesh, n_gpus)
    _check(cfg, sizes)
    rows = cfg.batch.microbatch_size * sizes["data"] * sizes["fsdp"]
    full = batch_schedule.BatchSchedule(((0, cfg.batch.global_batch_size),))
    ranks = cfg.batch.microbatch_size, sizes["data"] * sizes["fsdp"], sizes["stage"]
    batch_schedule.check(full, *ranks)
    problems = []
    try:
        batch_schedule.check(schedule, *ranks)
    except errors.UserError as error:
        problems.append(str(error))
    return Layout(
        sizes=sizes,
        n_microbatches=cfg.batch.global_batch_size // rows,
        attention=attention.choose(cfg.model, cfg.precision.compute_dtype, "gpu"),
        problems=tuple(problems),
    )


def check_nodes(n_gpus: int, gpus_per_node: int) -> None:
    """Check that so many GPUs are whole nodes, or a part of one.

    Raises:
        UserError: they are not.
    """
    if n_gpus < 1:
        raise errors.UserError(f"--gpus={n_gpus} must be at least 1")
    if n_gpus > gpus_per_node and n_gpus % gpus_per_node:
        raise errors.UserError(
            f"--gpus={n_gpus} is not a multiple of --gpus-per-node={gpus_per_node}: use whole nodes"
        )


def _resolve(mesh: schema.Mesh, n_gpus: int) -> dict[str, int]:
    sizes = meshes.axis_sizes(mesh, n_gpus)
    if sizes is None:
        told = " x ".join(f"{axis} {getattr(mesh, axis)}" for axis in meshes.AXES)
        fixed = math.prod(n for axis in meshes.AXES if (n := getattr(mesh, axis)) != -1)
        free = "" if n_gpus % fixed else f", for instance --mesh.data={n_gpus // fixed * mesh.data}"
        raise errors.UserError(
            f"mesh: {told} does not fit --gpus={n_gpus}: the axes' product must be {n_gpus}; "
            f"change one{free if mesh.data > 0 else ''}"
            f"{'' if -1 in vars(mesh).values() else ', or give -1 to one'}"
        )
    return sizes


def _check(cfg: schema.Config, sizes: dict[str, int]) -> None:
    model = cfg.model
    validation.check_pipeline(model, sizes["stage"], cfg.mesh.virtual_stages)
    validation.check_sequence(model, cfg.mesh, sizes["context"], sizes["tensor"])
    for axis, field, size in (
        ("tensor", "n_heads", model.n_heads),
        ("tensor", "padded_vocab_size", model.padded_vocab_size),
        ("fsdp", "d_model", model.d_model),
    ):
        if size % sizes[axis]:
            raise errors.UserError(
                f"mesh.{axis}={sizes[axis]} does not divide model.{field}={size}: "
                f"use one of {ranges.divisors(size)}"
            )


def parameters(cfg: schema.Config, sizes: dict[str, int], over_data: bool) -> int:
    """Return how many parameters a GPU holds; `over_data`: as `mesh.shard_optimizer` cuts them.

    Each tensor is cut by its axes' sizes; over `data`, on its largest dimension that no other axis
    cuts and that divides (`sharding.data_dim`).
    """
    layers = cfg.model.n_layers // cfg.mesh.virtual_stages
    stack: Dims = [(cfg.mesh.virtual_stages, None)] if cfg.mesh.virtual_stages > 1 else []
    stack.append((layers, "layers"))
    total = 0
    for tensor in _tensors(cfg.model):
        total += _local_size([*stack, *tensor], sizes, over_data)
    for tensor in _ends(cfg.model):
        total += _local_size(tensor, sizes, over_data)
    return total


Dims = list[tuple[int, str | None]]
"""Size and logical axis (`sharding.RULES`) of each dimension."""


def _tensors(model: schema.Model) -> list[Dims]:
    """Return the parameters of a layer as dimensions and their logical axes."""
    d, f, k = (model.d_model, None), (model.d_ff, "mlp"), (model.d_head, None)
    h, embed, three = (model.n_heads, "heads"), (model.d_model, "embed"), (3, None)
    norms_and_biases: list[Dims] = [
        [d]
    ] * 6  # two LayerNorms, and the biases of both branches' outputs
    return [
        *norms_and_biases, [embed, three, h, k], [three, h, k], [h, k, embed], [embed, f], [f],
        [f, embed],
    ]  # fmt: skip


def _ends(model: schema.Model) -> list[Dims]:
    """Return the parameters outside of layers: table, positions, the last LayerNorm."""
    embed = (model.d_model, "embed")
    table: Dims = [(model.padded_vocab_size, "vocab"), embed]
    return [table, [(model.seq_len, None), embed], [(model.d_model, None)], [(model.d_model, None)]]


def _local_size(dims: Dims, sizes: dict[str, int], over_data: bool) -> int:
    ways = [math.prod(sizes[a] for a in rules.RULES[axis]) for _, axis in dims]
    local = math.prod(size // w for (size, _), w in zip(dims, ways, strict=True))
    n_data = sizes["data"]
    free = any(w == 1 and size % n_data == 0 for (size, _), w in zip(dims, ways, strict=True))
    return local // n_data if over_data and free else local


def activation_bytes(cfg: schema.Config, layout: Layout) -> float:
    """Return a GPU's part of one microbatch's residual stream in the compute format: `a`."""
    tokens = cfg.batch.microbatch_size * cfg.model.seq_len / layout.sizes["context"]
    ways = layout.sizes["tensor"] if cfg.mesh.sequence_parallel else 1
    return tokens * cfg.model.d_model * width(cfg) / ways


def memory(cfg: schema.Config, layout: Layout) -> dict[str, float]:
    """Return a GPU's bytes at the peak of a step, by what they are for; their sum is the peak.

    parameters and optimizer (fp32, two moments) are exact, so is the batch. gradients: fp32 sums
    and what waits to be added. activations: what the backward pass finds saved. logits: of one
    chunk. temporaries: the larger of what a layer and what the head works on.
    """
    sizes, zero = layout.sizes, cfg.mesh.shard_optimizer
    n_state = parameters(cfg, sizes, zero)
    n_whole = parameters(cfg, sizes, False)
    logits = _logits_bytes(cfg, layout)
    working = max(_layer_bytes(cfg, layout), _head_bytes(cfg, layout) + logits)
    cast = 0.0
    if zero or sizes["stage"] > 1:  # once a step, see step.params_to_use
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


def _batch_bytes(cfg: schema.Config, layout: Layout) -> float:
    """Four arrays of 4 bytes a token; the batch is cut over data and fsdp alone."""
    arrays = 5 if cfg.data.reset_attention_mask else 4
    rows = layout.n_microbatches * cfg.batch.microbatch_size
    return 4.0 * rows * (arrays * cfg.model.seq_len + 1)


def _gradient_copies(cfg: schema.Config, sizes: dict[str, int]) -> float:
    """The running sum and the microbatch's own; over replicas also the sum's result (fitted)."""
    if sizes["stage"] > 1:  # a microbatch's own are added layer by layer
        return 1.0
    return 2.0 if cfg.mesh.shard_optimizer or sizes["data"] == 1 else 3.25


def scores(cfg: schema.Config, layout: Layout) -> float:
    """Return how many scores a layer of XLA's attention works out of a microbatch on a GPU."""
    if layout.attention != "xla":
        return 0.0
    model = cfg.model
    windows = [None] if model.attention.pattern == "dense" else [model.attention.band, None]
    of_head = sum(attention.n_scores(model.seq_len, window) for window in windows) / len(windows)
    heads = cfg.batch.microbatch_size * model.n_heads
    return heads * of_head / (layout.sizes["tensor"] * layout.sizes["context"])


def _saved_bytes(cfg: schema.Config, layout: Layout) -> float:
    """Layers' saved values; with stages those of every tick (docs/parallelism.md has the forms)."""
    model, stages, rounds = cfg.model, layout.sizes["stage"], cfg.mesh.virtual_stages
    a, m = activation_bytes(cfg, layout), layout.n_microbatches
    of_layer = a * _SAVED[remat.in_effect(model.remat, stages > 1)]
    if stages > 1:
        layers = (m * rounds + stages - 1) * model.n_layers / (stages * rounds)
        return layers * of_layer + 4 * m / stages * a
    if model.remat == "none" and model.dropout:
        of_layer += 2 * a / width(cfg)  # masks of a byte
    return model.n_layers * of_layer


def _layer_bytes(cfg: schema.Config, layout: Layout) -> float:
    """Two layers' weights gathered, a gradient before it is scattered, values in flight (fitted).

    Values: some 10 that are whole along the sequence, and 6.5 of a GPU's part of it. XLA's
    attention works on all blocks of queries at once, 31 bytes a score.
    """
    model, tensor = cfg.model, layout.sizes["tensor"]
    weights = 12 * model.d_model**2 / tensor * width(cfg)
    a = activation_bytes(cfg, layout)
    gathered = tensor if cfg.mesh.sequence_parallel else 1
    if layout.sizes["context"] > 1:  # keys, values and their gradients
        gathered *= 1 + layout.sizes["context"]
    return 2.8 * weights + (6.5 + 10 * gathered) * a + 31.0 * scores(cfg, layout)


def _logits_bytes(cfg: schema.Config, layout: Layout) -> float:
    """One chunk of logits in fp32, and its gradient in the compute format."""
    model = cfg.model
    tokens = cfg.batch.microbatch_size * model.seq_len / layout.sizes["context"]
    if layout.sizes["stage"] > 1:  # a stage joins its microbatches, see pipeline._joined
        tokens *= layout.n_microbatches / layout.sizes["stage"]
    tokens /= model.n_loss_chunks
    return tokens * model.padded_vocab_size / layout.sizes["tensor"] * (4 + width(cfg))


def _head_bytes(cfg: schema.Config, layout: Layout) -> float:
    """The vocabulary's table: fp32 for the lookup, a copy for the head, and its gradient."""
    table = cfg.model.padded_vocab_size * cfg.model.d_model / layout.sizes["tensor"]
    return table * (4 + width(cfg) + 4)


def budget(cfg: schema.Config, layout: Layout, gpu: gpus.Gpu) -> tuple[float, float]:
    """Return (bytes that a step may take, headroom in them that the compiler cannot see).

    The budget is what JAX's allocator is given (`xla_flags.MEMORY_FRACTION`).
    """
    pool = xla_flags.MEMORY_FRACTION * gpu.memory_bytes
    return pool, headroom(cfg, layout, pool)


def headroom(cfg: schema.Config, layout: Layout, pool: float) -> float:
    """Return what neither the compiler nor `memory` sees of a pool of so many bytes.

    cuDNN's workspace, batch x heads x positions x d_head x 4 bytes, and 3% for fragmentation
    (assumed).
    """
    workspace = 0.0
    if layout.attention == "cudnn":
        shards = layout.sizes["tensor"] * layout.sizes["context"]
        tokens = cfg.batch.microbatch_size * cfg.model.seq_len
        workspace = 4.0 * tokens * cfg.model.d_model / shards
    return 0.03 * pool + workspace
