"""The search for the best layout of a config on N GPUs.

A layout is a mesh, a microbatch size, what is recomputed and whether the optimizer is sharded.
Closed forms rank the layouts that fit; the best few are compiled, and their schedules decide.
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Literal, get_args

from gpt3jax import errors
from gpt3jax.config import batch_schedule, ranges, schema
from gpt3jax.hardware import gpus
from gpt3jax.plan import memory_model, placement, time_model
from gpt3jax.sharding import meshes

Remat = Literal["none", "dots", "mlp", "residual", "full"]
REMATS: tuple[Remat, ...] = get_args(Remat)
VIRTUAL_STAGES = (1, 2, 3, 4, 6)  # with more the bubble hardly shrinks
LARGEST_MICROBATCH = 16
PER_MESH = 2  # layouts of one mesh that are compiled: they differ little


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layout that fits, by closed forms."""

    cfg: schema.Config
    """The recipe, changed by `overrides`."""
    layout: placement.Layout
    peak_bytes: float
    seconds: float
    overrides: tuple[str, ...]
    """Options that make the recipe this layout."""
    drops_schedule: bool
    """The recipe's growing batch is left out: its small batches do not divide over the ranks."""


def candidates(
    cfg: schema.Config, n_gpus: int, gpu: gpus.Gpu, network: gpus.Network
) -> list[Candidate]:
    """Return the layouts that fit, fastest first, with the recipe's context axis (-1 counts as 1).

    Raises:
        UserError: no layout fits, or none is possible: the batch does not divide, its schedule is
            wrong, or nodes are not whole.
    """
    batch_schedule.from_config(cfg.batch, cfg.model.seq_len)
    placement.check_nodes(n_gpus, network.gpus_per_node)
    possible = list(_possible(cfg, n_gpus, network.gpus_per_node))
    if not possible:
        raise errors.UserError(
            f"no mesh of --gpus={n_gpus} divides batch.global_batch_size="
            f"{cfg.batch.global_batch_size}, model.n_heads={cfg.model.n_heads} and "
            f"model.n_layers={cfg.model.n_layers}: change the number of GPUs or the batch",
            page="parallelism.md#which-sizes-are-possible",
        )
    fitting = [
        candidate
        for variant, layout in possible
        if (candidate := _candidate(variant, layout, cfg, gpu, network))
    ]
    if not fitting:
        raise errors.UserError(
            f"no layout of this model fits --gpus={n_gpus} {gpu.name}: use more GPUs or others",
            page="plan.md#layouts",
        )
    return sorted(fitting, key=lambda candidate: candidate.seconds)


class Queue:
    """The layouts to compile: fastest first, and only the fastest few of each mesh.

    The compiled peak of a layout corrects the closed forms of all that recompute alike.
    """

    def __init__(self, candidates: list[Candidate], gpu: gpus.Gpu) -> None:
        """Start with nothing compiled."""
        self._left, self._gpu = list(candidates), gpu
        self._per_mesh: collections.Counter[str] = collections.Counter()
        self._corrections: dict[tuple[str, str], float] = {}

    def next(self) -> Candidate | None:
        """Return the next layout; None when no other may fit."""
        while self._left:
            candidate = self._left.pop(0)
            budget, headroom = memory_model.budget(candidate.cfg, candidate.layout, self._gpu)
            peak_bytes = candidate.peak_bytes * self._corrections.get(_kind(candidate), 1.0)
            if peak_bytes + headroom > budget:
                continue
            mesh = str(candidate.layout.sizes)
            self._per_mesh[mesh] += 1
            if self._per_mesh[mesh] <= PER_MESH:
                return candidate
        return None

    def note(self, candidate: Candidate, peak_bytes: float) -> None:
        """Correct the closed forms by the compiled peak of a layout (bytes)."""
        kind, correction = _kind(candidate), peak_bytes / candidate.peak_bytes
        self._corrections[kind] = max(self._corrections.get(kind, 1.0), correction)


def _kind(candidate: Candidate) -> tuple[str, str]:
    return candidate.cfg.model.remat, candidate.layout.attention


def _possible(
    cfg: schema.Config, n_gpus: int, gpus_per_node: int
) -> Iterator[tuple[schema.Config, placement.Layout]]:
    """Yield the variants of a recipe whose sizes divide, with their layouts."""
    for variant in _variants(cfg, n_gpus, gpus_per_node):
        try:
            yield variant, placement.lay_out(variant, n_gpus, gpus_per_node)
        except errors.UserError:  # a size does not divide
            continue


def _candidate(
    variant: schema.Config,
    layout: placement.Layout,
    recipe: schema.Config,
    gpu: gpus.Gpu,
    network: gpus.Network,
) -> Candidate | None:
    """Return a variant as a candidate, without a schedule that does not divide; None: no fit."""
    drops_schedule = bool(layout.problems)
    if drops_schedule:
        layout = dataclasses.replace(layout, problems=())
        batch = dataclasses.replace(variant.batch, schedule="", ramp=())
        variant = dataclasses.replace(variant, batch=batch)
    peak = sum(memory_model.memory(variant, layout).values())
    budget, headroom = memory_model.budget(variant, layout, gpu)
    if peak + headroom > budget:
        return None
    return Candidate(
        cfg=variant,
        layout=layout,
        peak_bytes=peak,
        seconds=time_model.estimate(variant, layout, gpu, network, "expected").parts.seconds,
        overrides=_overrides(variant, recipe),
        drops_schedule=drops_schedule,
    )


def _variants(cfg: schema.Config, n_gpus: int, gpus_per_node: int) -> Iterator[schema.Config]:
    """Yield the recipe with every mesh, microbatch size and remat that is worth a look.

    Tensor parallelism stays inside a node, and comes with sequence parallelism.
    """
    for tensor, stage in itertools.product(
        ranges.divisors_of(min(gpus_per_node, n_gpus)), ranges.divisors_of(cfg.model.n_layers)
    ):
        ranks, rest = divmod(n_gpus, tensor * stage * max(cfg.mesh.context, 1))
        rows, left = divmod(cfg.batch.global_batch_size, max(ranks, 1))
        if rest or left or not ranks or cfg.model.n_heads % tensor:
            continue
        sizes = [n for n in ranges.divisors_of(rows) if n <= LARGEST_MICROBATCH]
        rounds = VIRTUAL_STAGES if stage > 1 else (1,)
        remats = REMATS[1:] if stage > 1 else REMATS  # with stages the first two are the same
        for fsdp, size, remat, virtual_stages in itertools.product(
            ranges.divisors_of(ranks), sizes, remats, rounds
        ):
            for mesh in _meshes(cfg.mesh, ranks, fsdp, stage, tensor):
                yield dataclasses.replace(
                    cfg,
                    mesh=dataclasses.replace(mesh, virtual_stages=virtual_stages),
                    model=dataclasses.replace(cfg.model, remat=remat),
                    batch=dataclasses.replace(cfg.batch, microbatch_size=size),
                )


def _meshes(
    mesh: schema.Mesh, ranks: int, fsdp: int, stage: int, tensor: int
) -> Iterator[schema.Mesh]:
    """Yield a mesh of these sizes, and over replicas the same with a sharded optimizer."""
    for shard_optimizer in (False, True) if fsdp < ranks else (False,):
        yield dataclasses.replace(
            mesh,
            data=ranks // fsdp,
            stage=stage,
            fsdp=fsdp,
            context=max(mesh.context, 1),
            tensor=tensor,
            shard_optimizer=shard_optimizer,
            sequence_parallel=tensor > 1,
        )


def _overrides(variant: schema.Config, recipe: schema.Config) -> tuple[str, ...]:
    mesh = variant.mesh
    overrides = [f"--mesh.{axis}={getattr(mesh, axis)}" for axis in meshes.AXES]
    overrides += [
        f"--mesh.virtual-stages={mesh.virtual_stages}",
        f"--mesh.{'' if mesh.shard_optimizer else 'no-'}shard-optimizer",
        f"--mesh.{'' if mesh.sequence_parallel else 'no-'}sequence-parallel",
        f"--batch.microbatch-size={variant.batch.microbatch_size}",
        f"--model.remat={variant.model.remat}",
    ]
    if variant.batch.schedule != recipe.batch.schedule:
        overrides.append("--batch.schedule=")
    if variant.batch.ramp != recipe.batch.ramp:
        overrides.append("--batch.ramp")  # without values: an empty ramp
    return tuple(overrides)
