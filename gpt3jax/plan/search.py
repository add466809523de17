"""Every sensible layout of a config on N GPUs, the best few of them compiled.

A layout is a mesh, a microbatch size, what is recomputed and whether the optimizer is sharded.
Closed forms rank those that fit; the compiler and its schedule have the last word.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from gpt3jax import config, gpus
from gpt3jax.plan import memory_model, time_model

REMATS: tuple[Any, ...] = ("none", "attention", "dots", "mlp", "residual", "full")
VIRTUAL_STAGES = (1, 2, 3, 4, 6)
LARGEST_MICROBATCH = 16
PER_MESH = 2  # of those that are compiled: neighbours of one mesh differ little


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layout that fits, by closed forms."""

    cfg: config.Config
    layout: memory_model.Layout
    peak_bytes: float
    seconds: float
    overrides: tuple[str, ...]
    """Options that make the recipe this layout."""


def candidates(
    cfg: config.Config, n_gpus: int, gpu: gpus.Gpu, network: gpus.Network
) -> list[Candidate]:
    """Return the layouts that fit, fastest first. The context axis stays the recipe's.

    Raises:
        UserError: none fits.
    """
    found = []
    for one in _variants(cfg, n_gpus, network.gpus_per_node):
        try:
            layout = memory_model.lay_out(one, n_gpus, network.gpus_per_node)
        except config.UserError:  # it does not divide
            continue
        peak = sum(memory_model.memory(one, layout).values())
        pool, headroom = memory_model.budget(one, layout, gpu)
        if peak + headroom > pool:
            continue
        seconds = time_model.estimate(one, layout, gpu, network, "expected").seconds
        overrides = _overrides(one, layout)
        found.append(
            Candidate(cfg=one, layout=layout, peak_bytes=peak, seconds=seconds, overrides=overrides)
        )
    if not found:
        raise config.UserError(
            f"no layout of this model fits --gpus={n_gpus} {gpu.name}: use more GPUs or others"
        )
    return sorted(found, key=lambda one: one.seconds)


def to_compile(found: list[Candidate], n: int) -> list[Candidate]:
    """Return the n fastest, of each mesh only the fastest few."""
    of_mesh: dict[str, int] = {}
    chosen = []
    for one in found:
        mesh = str(one.layout.sizes)
        of_mesh[mesh] = of_mesh.get(mesh, 0) + 1
        if of_mesh[mesh] <= PER_MESH:
            chosen.append(one)
    return chosen[:n]


def _variants(cfg: config.Config, n_gpus: int, gpus_per_node: int) -> Iterator[config.Config]:
    """Yield the recipe with every mesh, microbatch size and remat that is worth a look.

    Tensor parallelism stays inside a node, and comes with sequence parallelism.
    """
    context = max(cfg.mesh.context, 1)
    for tensor, stage in itertools.product(
        _divisors(min(gpus_per_node, n_gpus)), _divisors(cfg.model.n_layers)
    ):
        ranks, rest = divmod(n_gpus, tensor * stage * context)
        rows, left = divmod(cfg.batch.global_batch_size, max(ranks, 1))
        if rest or left or not ranks or cfg.model.n_heads % tensor:
            continue
        sizes = [n for n in _divisors(rows) if n <= LARGEST_MICROBATCH]
        rounds = VIRTUAL_STAGES if stage > 1 else (1,)
        for fsdp, size, remat, virtual in itertools.product(
            _divisors(ranks), sizes, REMATS, rounds
        ):
            for zero in (False, True) if fsdp < ranks else (False,):
                mesh = dataclasses.replace(
                    cfg.mesh,
                    data=ranks // fsdp,
                    stage=stage,
                    fsdp=fsdp,
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


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _overrides(cfg: config.Config, layout: memory_model.Layout) -> tuple[str, ...]:
    mesh = cfg.mesh
    told = [f"--mesh.{axis}={size}" for axis, size in layout.sizes.items()]
    told += [
        f"--mesh.virtual-stages={mesh.virtual_stages}",
        f"--mesh.{'' if mesh.shard_optimizer else 'no-'}shard-optimizer",
        f"--mesh.{'' if mesh.sequence_parallel else 'no-'}sequence-parallel",
        f"--batch.microbatch-size={cfg.batch.microbatch_size}",
        f"--model.remat={cfg.model.remat}",
    ]
    if layout.problems:  # its schedule's smaller batches do not divide over so many ranks
        told.append("--batch.schedule=")
    return tuple(told)
