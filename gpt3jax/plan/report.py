"""What a plan says, as one dict: the JSON contract."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from gpt3jax.config import batch_schedule, schema
from gpt3jax.hardware import flops, gpus
from gpt3jax.model import remat
from gpt3jax.plan import compiler, legible, memory_model, time_model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """What is planned for."""

    gpu: gpus.Gpu
    network: gpus.Network
    price: float
    """Of a GPU-hour, in any currency; 0: unknown."""


def build(
    cfg: schema.Config,
    layout: memory_model.Layout,
    target: Target,
    compiled: compiler.Compiled | None,
) -> dict[str, Any]:
    """Return all that a plan says; without `compiled` memory and collectives are estimates.

    Raises:
        UserError: the compiled program cannot be read.
    """
    program = compiled.program if compiled else None
    times = {
        case: time_model.estimate(cfg, layout, target.gpu, target.network, case, program)
        for case in time_model.CASES
    }
    if compiled:
        least = time_model.estimate(cfg, layout, target.gpu, target.network, "expected")
        legible.check(cfg, layout, compiled, times["expected"], least)
    parts = dataclasses.asdict(times["expected"])
    memory = memory_model.memory(cfg, layout)
    estimated_peak = sum(memory.values())
    if compiled:
        memory = _with_peak(memory, compiled.peak_bytes)
    peak = sum(memory.values())
    pool, headroom = memory_model.budget(cfg, layout, target.gpu)
    tokens_a_second = cfg.batch.global_batch_size * cfg.model.seq_len / times["expected"].seconds
    return {
        "fits": peak + headroom <= pool,
        "peak_bytes_per_gpu": round(peak),
        "peak_is": "compiled" if compiled else "estimated",
        "estimated_peak_bytes_per_gpu": round(estimated_peak),
        "headroom_bytes": round(headroom),
        "budget_bytes": round(pool),
        "memory": {name: round(n) for name, n in memory.items()},
        "step_seconds": {case: time.seconds for case, time in times.items()},
        "step_parts_expected": parts,
        "exposed_communication_seconds": times["expected"].exposed,
        "mfu": _mfu(cfg, layout, target, times["expected"].seconds),
        "tokens_per_second_per_gpu": tokens_a_second / layout.n_gpus,
        "bubble": time_model.schedule(cfg, layout).bubble,
        "collectives": parts.pop("traffic"),
        "collectives_are": "compiled" if compiled else "estimated",
        **_work(cfg, layout),
        **_run(cfg, layout, target, times["expected"].seconds),
        **_compiled_part(compiled),
        "problems": list(layout.problems),
        "gpus": layout.n_gpus,
        "gpu": {"name": target.gpu.name, "source": target.gpu.source},
        "network": dataclasses.asdict(target.network),
        "mesh": layout.sizes,
        "n_microbatches": layout.n_microbatches,
        "attention": layout.attention,
        "step": _step(cfg, layout),
        "assumed": {
            name: dataclasses.asdict(of)
            for name, of in time_model.in_effect(layout, compiled is not None).items()
        },
        "versions": compiler.versions(),
    }


def _step(cfg: schema.Config, layout: memory_model.Layout) -> dict[str, Any]:
    """Return what of the config, besides the mesh's sizes, decides a step's memory and time."""
    return {
        "global_batch_size": cfg.batch.global_batch_size,
        "microbatch_size": cfg.batch.microbatch_size,
        "seq_len": cfg.model.seq_len,
        "compute_dtype": cfg.precision.compute_dtype,
        "remat": remat.in_effect(cfg.model.remat, layout.sizes["stage"] > 1),
        "shard_optimizer": cfg.mesh.shard_optimizer,
        "sequence_parallel": cfg.mesh.sequence_parallel,
        "virtual_stages": cfg.mesh.virtual_stages,
    }


def _with_peak(memory: Mapping[str, float], peak: float) -> dict[str, float]:
    """Return an estimated split whose sum is the compiler's peak.

    What is exact stays; temporaries take the difference, and where they would be negative, logits,
    activations and gradients give way.
    """
    split = dict(memory)
    difference = peak - sum(split.values())
    for name in ("temporaries", "logits", "activations", "gradients"):
        new = max(0.0, split[name] + difference)
        difference -= new - split[name]
        split[name] = new
    return split


def _mfu(cfg: schema.Config, layout: memory_model.Layout, target: Target, seconds: float) -> float:
    done = time_model.work(cfg, layout).model_flops
    return done / seconds / time_model.peak_flops(cfg, target.gpu)


def _work(cfg: schema.Config, layout: memory_model.Layout) -> dict[str, Any]:
    done = time_model.work(cfg, layout)
    return {
        "parameters": flops.n_params(cfg.model),
        "model_flops_per_step": done.model_flops * layout.n_gpus,
        "recomputed_share": done.recomputed_flops / done.model_flops,
    }


def _run(
    cfg: schema.Config, layout: memory_model.Layout, target: Target, seconds: float
) -> dict[str, Any]:
    """Return the run's length; steps of a growing batch are taken to be as efficient as full."""
    schedule = batch_schedule.from_config(cfg.batch, cfg.model.seq_len)
    n_steps, samples = schedule.end(cfg.train, cfg.model.seq_len)
    hours = samples / cfg.batch.global_batch_size * seconds / 3600
    return {
        "run_steps": n_steps,
        "run_tokens": samples * cfg.model.seq_len,
        "run_days": hours / 24,
        "gpu_hours": hours * layout.n_gpus,
        "cost": hours * layout.n_gpus * target.price if target.price else None,
    }


def _compiled_part(compiled: compiler.Compiled | None) -> dict[str, Any]:
    if compiled is None:
        return {"compile_seconds": None, "compiled": None}
    return {
        "compile_seconds": compiled.compile_seconds,
        "compiled": {
            "argument_bytes": compiled.argument_bytes,
            "temp_bytes": compiled.temp_bytes,
            "host_bytes": compiled.host_bytes,
            "largest_buffers": compiled.largest_buffers,
            "cudnn": compiled.cudnn,
            "cached": compiled.cached,
        },
    }
