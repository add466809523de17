"""The report of one step in one layout: memory, time and work, compiled or by closed forms.

The names of the fields are keys of the plan's JSON, which other programs read: do not rename them.
"""

import dataclasses
from typing import Literal

from gpt3jax.config import schema
from gpt3jax.hardware import flops, gpus
from gpt3jax.plan import compiler, hlo_checks, memory_model, placement, time_model

Origin = Literal["compiled", "estimated"]
"""Whether figures are the compiler's, or come from closed forms."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """The GPUs and the network that a plan is for."""

    gpu: gpus.Gpu
    network: gpus.Network
    price: float
    """Price of a GPU-hour, in any currency; 0: unknown."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peak:
    """A GPU's memory at the peak of a step."""

    fits: bool
    """Whether peak and headroom are within the budget."""
    peak_bytes_per_gpu: int
    peak_is: Origin
    estimated_peak_bytes_per_gpu: int
    """The peak by closed forms."""
    headroom_bytes: int
    """Memory that the compiler cannot see: cuDNN's workspace, fragmentation."""
    budget_bytes: int
    """Memory that JAX's allocator gets."""
    memory: dict[str, int]
    """Bytes by purpose, as `memory_model.memory` names them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepSeconds:
    """The time of a step by case (`time_model.CASES`)."""

    low: float
    expected: float
    high: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Time:
    """The time of a step, and its parts in the expected case."""

    step_seconds: StepSeconds
    step_parts_expected: time_model.StepParts
    exposed_communication_seconds: float
    mfu: float
    """Of the peak in the format of the layers' products, which may be 8 bits. GPUs that compute the
    same as others (`mesh.copies`) do not add to it."""
    mfu_in_compute_dtype: float
    """The same of the peak in `precision.compute_dtype`, as it is published for bfloat16."""
    tokens_per_second_per_gpu: float
    bubble: float
    """The share of idle ticks in a pipeline's schedule."""
    collectives: list[time_model.Traffic]
    collectives_are: Origin


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """The model's size, and its arithmetic in a step on all GPUs together."""

    parameters: int
    model_flops_per_step: float
    recomputed_share: float
    """FLOPs that the backward pass computes again, as a share of the model's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepReport:
    """A step of one batch size in one layout."""

    cfg: schema.Config
    """The recipe at this batch size, with the layout's fields."""
    layout: placement.Layout
    compiled: compiler.Compiled | None
    peak: Peak
    time: Time
    work: Work


def build(
    cfg: schema.Config,
    layout: placement.Layout,
    target: Target,
    compiled: compiler.Compiled | None,
) -> StepReport:
    """Return the report of a step; without `compiled`, memory and collectives are estimates.

    Raises:
        UserError: the compiled program cannot be read.
    """
    return StepReport(
        cfg=cfg,
        layout=layout,
        compiled=compiled,
        peak=_peak(cfg, layout, target.gpu, compiled),
        time=_time(cfg, layout, target, compiled),
        work=_work(cfg, layout),
    )


def _peak(
    cfg: schema.Config,
    layout: placement.Layout,
    gpu: gpus.Gpu,
    compiled: compiler.Compiled | None,
) -> Peak:
    memory = memory_model.memory(cfg, layout)
    estimated_peak = sum(memory.values())
    if compiled:
        memory = _with_peak(memory, compiled.peak_bytes)
    peak = sum(memory.values())
    budget, headroom = memory_model.budget(cfg, layout, gpu)
    return Peak(
        fits=peak + headroom <= budget,
        peak_bytes_per_gpu=round(peak),
        peak_is="compiled" if compiled else "estimated",
        estimated_peak_bytes_per_gpu=round(estimated_peak),
        headroom_bytes=round(headroom),
        budget_bytes=round(budget),
        memory={name: round(n_bytes) for name, n_bytes in memory.items()},
    )


def _with_peak(memory: dict[str, float], peak: float) -> dict[str, float]:
    """Return an estimated split changed so that its sum is the compiler's peak.

    Exact parts stay. Temporaries take the difference; where they would become negative, logits,
    activations and gradients shrink too.
    """
    split = dict(memory)
    difference = peak - sum(split.values())
    for name in ("temporaries", "logits", "activations", "gradients"):
        new = max(0.0, split[name] + difference)
        difference -= new - split[name]
        split[name] = new
    return split


def _time(
    cfg: schema.Config,
    layout: placement.Layout,
    target: Target,
    compiled: compiler.Compiled | None,
) -> Time:
    """Return the time of a step.

    Raises:
        UserError: the compiled program cannot be read.
    """
    program = compiled.program if compiled else None
    times = {
        case: time_model.estimate(cfg, layout, target.gpu, target.network, case, program)
        for case in time_model.CASES
    }
    expected = times["expected"]
    if compiled:
        least = time_model.estimate(cfg, layout, target.gpu, target.network, "expected")
        hlo_checks.check(cfg, layout, compiled, expected, least)
    seconds = expected.parts.seconds
    model_flops = time_model.work(cfg, layout).model_flops / layout.sizes["copies"]
    tokens_per_second = cfg.batch.global_batch_size * cfg.model.seq_len / seconds
    return Time(
        step_seconds=StepSeconds(**{case: time.parts.seconds for case, time in times.items()}),
        step_parts_expected=expected.parts,
        exposed_communication_seconds=expected.parts.exposed,
        mfu=model_flops / seconds / time_model.layer_peak_flops(cfg, target.gpu),
        mfu_in_compute_dtype=model_flops / seconds / time_model.peak_flops(cfg, target.gpu),
        tokens_per_second_per_gpu=tokens_per_second / layout.n_gpus,
        bubble=placement.schedule(cfg, layout).bubble,
        collectives=expected.traffic,
        collectives_are="compiled" if compiled else "estimated",
    )


def _work(cfg: schema.Config, layout: placement.Layout) -> Work:
    work = time_model.work(cfg, layout)
    return Work(
        parameters=flops.n_params(cfg.model),
        model_flops_per_step=work.model_flops * layout.n_gpus / layout.sizes["copies"],
        recomputed_share=work.recomputed_flops / work.model_flops,
    )
