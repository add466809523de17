"""How a config is placed on N GPUs: the mesh's sizes, microbatches, the pipeline's schedule."""

import dataclasses
import math

from gpt3jax import errors
from gpt3jax.config import batch_schedule, ranges, schema, validation
from gpt3jax.gradient import pipeline
from gpt3jax.model import attention
from gpt3jax.sharding import meshes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How a config is cut over GPUs, at full batch size."""

    sizes: dict[str, int]
    """Sizes of the mesh's axes, slowest first."""
    n_microbatches: int
    """Microbatches that a data-parallel rank has in a step."""
    attention: str
    """The implementation of attention: cudnn, triton or xla."""
    problems: tuple[str, ...]
    """Reasons why `gpt3jax.main` would refuse the run although its step exists."""

    @property
    def n_gpus(self) -> int:
        """Number of all GPUs."""
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
    """Return the layout of a config on this many GPUs, with its sizes of -1 resolved.

    Raises:
        UserError: mesh, model, batch and number of GPUs do not fit together, or the batch's
            schedule cannot be read.
    """
    if n_gpus != in_whole_nodes(n_gpus, gpus_per_node):
        raise errors.UserError(
            f"a layout of {n_gpus} GPUs fills no whole nodes of {gpus_per_node}: use a multiple",
            page="plan.md",
        )
    schedule = batch_schedule.from_config(cfg.batch, cfg.model.seq_len)
    sizes = _resolve(cfg.mesh, n_gpus)
    _check(cfg, sizes)
    rows = cfg.batch.microbatch_size * sizes["data"] * sizes["fsdp"]
    full = batch_schedule.BatchSchedule(((0, cfg.batch.global_batch_size),))
    divisors = cfg.batch.microbatch_size, sizes["data"] * sizes["fsdp"]
    batch_schedule.check(full, *divisors)
    problems = []
    try:
        batch_schedule.check(schedule, *divisors)
    except errors.UserError as error:
        problems.append(str(error))
    return Layout(
        sizes=sizes,
        n_microbatches=cfg.batch.global_batch_size // rows,
        attention=attention.choose(cfg.model, cfg.precision.compute_dtype, "gpu", sizes["context"]),
        problems=tuple(problems),
    )


def in_whole_nodes(n_gpus: int, gpus_per_node: int) -> int:
    """Return how many of the GPUs fill whole nodes, or are a part of one: the others idle."""
    return n_gpus if n_gpus < gpus_per_node else n_gpus - n_gpus % gpus_per_node


def schedule(cfg: schema.Config, layout: Layout) -> pipeline.Schedule:
    """Return the pipeline's schedule; with one stage it has no bubble."""
    return pipeline.Schedule(
        n_stages=layout.sizes["stage"],
        virtual_stages=cfg.mesh.virtual_stages,
        n_microbatches=layout.n_microbatches,
    )


def _resolve(mesh: schema.Mesh, n_gpus: int) -> dict[str, int]:
    sizes = meshes.axis_sizes(mesh, n_gpus)
    if sizes is None:
        axes = " x ".join(f"{axis} {getattr(mesh, axis)}" for axis in meshes.AXES)
        fixed = math.prod(n for axis in meshes.AXES if (n := getattr(mesh, axis)) != -1)
        free = "" if n_gpus % fixed else f", for instance --mesh.data={n_gpus // fixed * mesh.data}"
        raise errors.UserError(
            f"mesh: {axes} does not fit {n_gpus} GPUs: the axes' product must be {n_gpus}; "
            f"change one{free if mesh.data > 0 else ''}"
            f"{'' if -1 in vars(mesh).values() else ', or give -1 to one'}",
            page="parallelism.md#which-sizes-are-possible",
        )
    return sizes


def _check(cfg: schema.Config, sizes: dict[str, int]) -> None:
    model = cfg.model
    validation.check_pipeline(model, sizes["stage"], cfg.mesh.virtual_stages)
    validation.check_end_layers(cfg.precision, sizes["stage"])
    validation.check_sequence(model, cfg.mesh, sizes["context"], sizes["tensor"])
    for axis, field, size in (
        ("tensor", "n_heads", model.n_heads),
        ("tensor", "padded_vocab_size", model.padded_vocab_size),
        ("fsdp", "d_model", model.d_model),
    ):
        if size % sizes[axis]:
            raise errors.UserError(
                f"mesh.{axis}={sizes[axis]} does not divide model.{field}={size}: "
                f"use one of {ranges.divisors(size)}",
                page="parallelism.md#which-sizes-are-possible",
            )
