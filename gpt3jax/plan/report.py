"""The report of a plan: a small tree of records, and the JSON that `--json` writes of it.

The names of the fields are the keys of the JSON, which other programs read: do not rename them.
"""

import dataclasses
from typing import Literal

from gpt3jax.config import batch_schedule, schema
from gpt3jax.hardware import flops, gpus
from gpt3jax.model import remat
from gpt3jax.plan import (
    buffer_assignment,
    compiler,
    hlo_checks,
    memory_model,
    placement,
    time_model,
)

Network = gpus.Network  # Report has a field of the name `gpus`
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
class Run:
    """The length and the cost of the whole run."""

    run_steps: int
    run_tokens: int
    run_days: float
    gpu_hours: float
    cost: float | None
    """None where no price was given."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledStep:
    """Facts that only a compiled step shows; fields as in `compiler.Compiled`."""

    argument_bytes: int
    temp_bytes: int
    host_bytes: int
    largest_buffers: list[buffer_assignment.Buffer]
    cudnn: dict[str, bool]
    cached: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """The kind of GPU, and where its figures are from."""

    name: str
    source: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """The settings, besides the mesh's sizes, that decide a step's memory and time."""

    global_batch_size: int
    microbatch_size: int
    seq_len: int
    compute_dtype: str
    remat: str
    """The policy in effect, which with stages may differ from the config's."""
    shard_optimizer: bool
    sequence_parallel: bool
    virtual_stages: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchedLayout:
    """One layout of a search; figures are None where it did not compile."""

    overrides: list[str]
    """Options that make the recipe this layout."""
    drops_schedule: bool
    """The options leave out the recipe's growing batch."""
    failed: str = ""
    """Why it did not compile; "" where it did."""
    fits: bool = False
    peak_bytes_per_gpu: int | None = None
    step_seconds: float | None = None
    step_seconds_closed_form: float
    mfu: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """All that a plan says."""

    peak: Peak
    time: Time
    work: Work
    run: Run
    compile_seconds: float | None
    compiled: CompiledStep | None
    problems: list[str]
    """Reasons why `gpt3jax.main` would refuse the run although its step exists."""
    gpus: int
    gpu: Gpu
    network: Network
    mesh: dict[str, int]
    n_microbatches: int
    attention: str
    step: Step
    assumed: dict[str, time_model.Range]
    versions: dict[str, str]
    search: list[SearchedLayout] = dataclasses.field(default_factory=list)
    """The layouts of a search, best first: the first is this report's. Empty without a search."""


_AT_THE_TOP = ("peak", "time", "work", "run")  # records whose fields the JSON has at its top


def as_json(plan: Report) -> dict[str, object]:
    """Return the object that the JSON file holds."""
    content: dict[str, object] = {}
    for name, value in dataclasses.asdict(plan).items():
        content |= value if name in _AT_THE_TOP else {name: value}
    return content


def build(
    cfg: schema.Config,
    layout: placement.Layout,
    target: Target,
    compiled: compiler.Compiled | None,
) -> Report:
    """Return the plan of a layout; without `compiled`, memory and collectives are estimates.

    Raises:
        UserError: the compiled program cannot be read.
    """
    time = _time(cfg, layout, target, compiled)
    return Report(
        peak=_peak(cfg, layout, target.gpu, compiled),
        time=time,
        work=_work(cfg, layout),
        run=_run(cfg, layout, target.price, time.step_seconds.expected),
        compile_seconds=compiled.compile_seconds if compiled else None,
        compiled=_compiled_step(compiled) if compiled else None,
        problems=list(layout.problems),
        gpus=layout.n_gpus,
        gpu=Gpu(name=target.gpu.name, source=target.gpu.source),
        network=target.network,
        mesh=layout.sizes,
        n_microbatches=layout.n_microbatches,
        attention=layout.attention,
        step=_step(cfg, layout),
        assumed=time_model.assumptions(layout, compiled=compiled is not None),
        versions=compiler.versions(),
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
    model_flops = time_model.work(cfg, layout).model_flops
    tokens_per_second = cfg.batch.global_batch_size * cfg.model.seq_len / seconds
    return Time(
        step_seconds=StepSeconds(**{case: time.parts.seconds for case, time in times.items()}),
        step_parts_expected=expected.parts,
        exposed_communication_seconds=expected.parts.exposed,
        mfu=model_flops / seconds / time_model.peak_flops(cfg, target.gpu),
        tokens_per_second_per_gpu=tokens_per_second / layout.n_gpus,
        bubble=placement.schedule(cfg, layout).bubble,
        collectives=expected.traffic,
        collectives_are="compiled" if compiled else "estimated",
    )


def _work(cfg: schema.Config, layout: placement.Layout) -> Work:
    work = time_model.work(cfg, layout)
    return Work(
        parameters=flops.n_params(cfg.model),
        model_flops_per_step=work.model_flops * layout.n_gpus,
        recomputed_share=work.recomputed_flops / work.model_flops,
    )


def _run(cfg: schema.Config, layout: placement.Layout, price: float, seconds: float) -> Run:
    """Return the run's length, as if steps of a growing batch were as efficient as full ones."""
    schedule = batch_schedule.from_config(cfg.batch, cfg.model.seq_len)
    n_steps, n_samples = schedule.end(cfg.train, cfg.model.seq_len)
    hours = n_samples / cfg.batch.global_batch_size * seconds / 3600
    return Run(
        run_steps=n_steps,
        run_tokens=n_samples * cfg.model.seq_len,
        run_days=hours / 24,
        gpu_hours=hours * layout.n_gpus,
        cost=hours * layout.n_gpus * price if price else None,
    )


def _compiled_step(compiled: compiler.Compiled) -> CompiledStep:
    return CompiledStep(
        argument_bytes=compiled.argument_bytes,
        temp_bytes=compiled.temp_bytes,
        host_bytes=compiled.host_bytes,
        largest_buffers=compiled.largest_buffers,
        cudnn=compiled.cudnn,
        cached=compiled.cached,
    )


def _step(cfg: schema.Config, layout: placement.Layout) -> Step:
    return Step(
        global_batch_size=cfg.batch.global_batch_size,
        microbatch_size=cfg.batch.microbatch_size,
        seq_len=cfg.model.seq_len,
        compute_dtype=cfg.precision.compute_dtype,
        remat=remat.in_effect(cfg.model.remat, layout.sizes["stage"] > 1),
        shard_optimizer=cfg.mesh.shard_optimizer,
        sequence_parallel=cfg.mesh.sequence_parallel,
        virtual_stages=cfg.mesh.virtual_stages,
    )
