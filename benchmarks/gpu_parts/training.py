"""Training steps of a recipe: memory, speed and MFU, beside what the plan says of them."""

import math
import time

import jax

from gpt3jax.config import layout
from gpt3jax.hardware import devices, flops, gpus
from gpt3jax.model import triton_attention
from gpt3jax.plan import placement, step_report

import train_step
from gpu_parts import sizes

N_STEPS, MOST_SECONDS = 8, 10.0  # of the steps that are timed


def measure(task):
    """Yield the layout, the compiled step's memory, the steps' figures, and the plan's."""
    if "--model.attention.implementation=triton" in task.args:
        reason = "it needs a GPU" if task.tiny else triton_attention.missing()
        if reason:
            yield {"skipped": reason}
            return
    laid, batch = train_step.prepare(sizes.recipe_args(task, *task.args))
    cfg, program = laid.cfg, laid.program
    yield {"layout": layout.in_words(layout.of(cfg)), "attention": program.compute.attention}
    begin = time.perf_counter()
    state = program.init()
    compiled_bytes = program.train.compile(state, batch)
    yield {
        "compiled GiB": compiled_bytes / 2**30,
        "seconds to start": time.perf_counter() - begin,
        **plan(cfg),
    }
    losses, seconds = take_steps(program, state, batch)
    rate = batch["tokens"].size / seconds
    device = jax.devices()[0]
    peak = flops.peak_flops(device.device_kind, cfg.precision.compute_dtype)
    stats = device.memory_stats() or {}
    guess = math.log(cfg.model.vocab_size)  # what an untrained network knows: nothing
    yield {
        "GiB": stats["peak_bytes_in_use"] / 2**30 if stats else None,
        "tokens/s": rate,
        "step seconds": seconds,
        "MFU": rate * flops.flops_per_token(cfg.model) / peak if peak else None,
        "first loss": {"error": abs(losses[0] - guess), "limit": 0.5, "loss": losses[0]},
        "last loss": {"error": abs(losses[-1] - losses[0]), "limit": 0.5, "loss": losses[-1]},
    }


def take_steps(program, state, batch):
    """Return the losses, and the seconds of a step; as in a run, read one step behind."""
    state, metrics = program.train(state, batch)
    losses, begin, n_timed = [metrics["loss"].item()], time.perf_counter(), 0
    before = None
    while n_timed < N_STEPS and time.perf_counter() - begin < MOST_SECONDS:
        state, metrics = program.train(state, batch)
        n_timed += 1
        if before is not None:
            losses.append(before["loss"].item())
        before = metrics
    losses.append(before["loss"].item())
    return losses, (time.perf_counter() - begin) / n_timed


def plan(cfg):
    """Return what the plan's closed forms say of the step on this GPU; without one, on an H200."""
    device = jax.devices()[0]
    capability = devices.compute_capability(device)
    gpu = gpus.like(device.device_kind, capability) if capability else gpus.GPUS["h200"]
    target = step_report.Target(gpu=gpu, network=gpus.network_of(gpu), price=0.0)
    planned = step_report.build(cfg, placement.lay_out(cfg, 1, 8), target, None)
    n_tokens, seconds = cfg.batch.global_batch_size * cfg.model.seq_len, planned.time.step_seconds
    return {
        "planned for": gpu.name,
        "plan GiB": planned.peak.peak_bytes_per_gpu / 2**30,
        "plan tokens/s": [n_tokens / s for s in (seconds.high, seconds.expected, seconds.low)],
        "plan MFU": planned.time.mfu,
        "plan's attention": planned.layout.attention,
    }
