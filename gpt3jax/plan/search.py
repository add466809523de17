"""Every sensible layout of a config on N GPUs, the best few of them compiled.

A layout is a mesh, a microbatch size, what is recomputed and whether the optimizer is sharded.
Closed forms rank those that fit; the compiler and its schedule have the last word.
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from gpt3jax import errors
from gpt3jax.config import batch_schedule, ranges, schema
from gpt3jax.hardware import gpus
from gpt3jax.plan import memory_model, time_model
from gpt3jax.sharding import meshes

REMATS: tuple[Any, ...] = ("none", "dots", "mlp", "residual", "full")
VIRTUAL_STAGES = (1, 2, 3, 4, 6)  # with more the bubble hardly shrinks
LARGEST_MICROBATCH = 16
PER_MESH = 2  # of those that are compiled: neighbours of one mesh differ little


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layout that fits, by closed forms."""

    cfg: schema.Config
    """What the recipe becomes by `overrides`."""
    layout: memory_model.Layout
    peak_bytes: float
    seconds: float
    overrides: tuple[str, ...]
    """Options that make the recipe this layout."""
    drops_schedule: bool
    """Without the recipe's growing batch, whose small ones do not divide over so many ranks."""


def candidates(
    cfg: schema.Config, n_gpus: int, gpu: gpus.Gpu, network: gpus.Network
) -> list[Candidate]:
    """Return the layouts that fit, fastest first. The context axis stays the recipe's, -1 is 1.

    Raises:
        UserError: none fits, or no layout could: the batch does not divide, its schedule is wrong,
            or nodes are not whole.
    """
    batch_schedule.from_config(cfg.batch, cfg.model.seq_len)
    memory_model.check_nodes(n_gpus, network.gpus_per_node)
    found, divides = [], False
    for one in _variants(cfg, n_gpus, network.gpus_per_node):
        try:
            layout = memory_model.lay_out(one, n_gpus, network.gpus_per_node)
        except errors.UserError:  # it does not divide
            continue
        divides, drops = True, bool(layout.problems)
        if drops:
            layout = dataclasses.replace(layout, problems=())
            batch = dataclasses.replace(one.batch, schedule="", ramp=())
            one = dataclasses.replace(one, batch=batch)
        peak = sum(memory_model.memory(one, layout).values())
        pool, headroom = memory_model.budget(one, layout, gpu)
        if peak + headroom > pool:
            continue
        seconds = time_model.estimate(one, layout, gpu, network, "expected").seconds
        found.append(
            Candidate(
                cfg=one,
                layout=layout,
                peak_bytes=peak,
                seconds=seconds,
                overrides=_overrides(one, cfg),
                drops_schedule=drops,
            )
        )
    if not divides:
        raise errors.UserError(
            f"no mesh of --gpus={n_gpus} divides batch.global_batch_size="
            f"{cfg.batch.global_batch_size}, model.n_heads={cfg.model.n_heads} and "
            f"model.n_layers={cfg.model.n_layers}: change the number of GPUs or the batch"
        )
    if not found:
        raise errors.UserError(
            f"no layout of this model fits --gpus={n_gpus} {gpu.name}: use more GPUs or others"
        )
    return sorted(found, key=lambda one: one.seconds)


class Queue:
    """The layouts to compile, fastest first, of each mesh only the fastest few.

    What a layout takes once compiled corrects the closed forms of all that recompute alike.
    """

    def __init__(self, found: list[Candidate], gpu: gpus.Gpu) -> None:
        """Nothing is compiled yet."""
        self._left, self._gpu = list(found), gpu
        self._of_mesh: collections.Counter[str] = collections.Counter()
        self._off: dict[tuple[str, str], float] = {}

    def next(self) -> Candidate | None:
        """Return the next layout; None when there is no other that may fit."""
        while self._left:
            one = self._left.pop(0)
            pool, headroom = memory_model.budget(one.cfg, one.layout, self._gpu)
            if one.peak_bytes * self._off.get(_kind(one), 1.0) + headroom > pool:
                continue
            self._of_mesh[str(one.layout.sizes)] += 1
            if self._of_mesh[str(one.layout.sizes)] <= PER_MESH:
                return one
        return None

    def note(self, one: Candidate, peak_bytes: float) -> None:
        """Take the compiled peak of a layout (bytes) into account."""
        self._off[_kind(one)] = max(self._off.get(_kind(one), 1.0), peak_bytes / one.peak_bytes)


def _kind(one: Candidate) -> tuple[str, str]:
    return one.cfg.model.remat, one.layout.attention


def _variants(cfg: schema.Config, n_gpus: int, gpus_per_node: int) -> Iterator[schema.Config]:
    """Yield the recipe with every mesh, microbatch size and remat that is worth a look.

    Tensor parallelism stays inside a node, and comes with sequence parallelism.
    """
    context = max(cfg.mesh.context, 1)
    for tensor, stage in itertools.product(
        ranges.divisors_of(min(gpus_per_node, n_gpus)), ranges.divisors_of(cfg.model.n_layers)
    ):
        ranks, rest = divmod(n_gpus, tensor * stage * context)
        rows, left = divmod(cfg.batch.global_batch_size, max(ranks, 1))
        if rest or left or not ranks or cfg.model.n_heads % tensor:
            continue
        sizes = [n for n in ranges.divisors_of(rows) if n <= LARGEST_MICROBATCH]
        rounds = VIRTUAL_STAGES if stage > 1 else (1,)
        remats = REMATS[1:] if stage > 1 else REMATS  # with stages the first two are one
        for fsdp, size, remat, virtual in itertools.product(
            ranges.divisors_of(ranks), sizes, remats, rounds
        ):
            for zero in (False, True) if fsdp < ranks else (False,):
                mesh = dataclasses.replace(
                    cfg.mesh,
                    data=ranks // fsdp,
                    stage=stage,
                    fsdp=fsdp,
                    context=context,
                    tensor=tensor,
                    virtual_stages=virtual,
                    shard_optimizer=zero,
                    sequence_parallel=tensor > 1,
                )
                yield dataclasses.replace(
                    cfg,
                    mesh=mesh,
                    model=dataclasses.replace(cfg.model, remat=remat),
                    batch=dataclasses.replace(cfg.batch, microbatch_size=size),
                )


def _overrides(cfg: schema.Config, given: schema.Config) -> tuple[str, ...]:
    mesh = cfg.mesh
    told = [f"--mesh.{axis}={getattr(mesh, axis)}" for axis in meshes.AXES]
    told += [
        f"--mesh.virtual-stages={mesh.virtual_stages}",
        f"--mesh.{'' if mesh.shard_optimizer else 'no-'}shard-optimizer",
        f"--mesh.{'' if mesh.sequence_parallel else 'no-'}sequence-parallel",
        f"--batch.microbatch-size={cfg.batch.microbatch_size}",
        f"--model.remat={cfg.model.remat}",
    ]
    if cfg.batch.schedule != given.batch.schedule:
        told.append("--batch.schedule=")
    if cfg.batch.ramp != given.batch.ramp:
        told.append("--batch.ramp")  # of no number
    return tuple(told)
