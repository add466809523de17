"""The report of a plan: a small tree of records, and the JSON that `--json` writes of it.

The names of the fields are the keys of the JSON, which other programs read: do not rename them.
"""

import dataclasses
from collections.abc import Sequence

from gpt3jax.config import schema
from gpt3jax.hardware import flops, gpus
from gpt3jax.model import remat
from gpt3jax.plan import (
    buffer_assignment,
    compiler,
    placement,
    ranking,
    step_report,
    time_model,
    whole_run,
)

Network = gpus.Network  # Report has a field of the name `gpus`


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledStep:
    """Facts that only a compiled step shows; fields as in `compiler.Compiled`."""

    argument_bytes: int
    temp_bytes: int
    host_bytes: int
    largest_buffers: list[buffer_assignment.Buffer]
    fused_attention: dict[str, bool]
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
    matmul_dtype: str
    """Format of the layers' products."""
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
    batch_size: int
    layout: whole_run.Fields
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

    peak: step_report.Peak
    """This and all that follows, but for `run`, `gpus`, `batches` and `search`: of full batches."""
    time: step_report.Time
    work: step_report.Work
    run: whole_run.Run
    compile_seconds: float | None
    compiled: CompiledStep | None
    problems: list[str]
    """Reasons why `gpt3jax.main` would refuse the run although its step exists."""
    notes: list[str]
    """What else is to be known, such as GPUs that idle."""
    gpus: int
    """All GPUs, those that idle included."""
    gpus_idle: int
    gpu: Gpu
    network: Network
    mesh: dict[str, int]
    n_microbatches: int
    attention: str
    step: Step
    assumed: dict[str, time_model.Range]
    versions: dict[str, str]
    layouts_are: str
    """Where the layouts are from: found, given, or a file."""
    batches: list[whole_run.Batch]
    """Smallest first; the last is the full batch."""
    search: list[SearchedLayout] = dataclasses.field(default_factory=list)
    """The layouts of a search, best first within a batch size. Empty without a search."""


_AT_THE_TOP = ("peak", "time", "work", "run")  # records whose fields the JSON has at its top


def as_json(plan: Report) -> dict[str, object]:
    """Return the object that the JSON file holds."""
    content: dict[str, object] = {}
    for name, value in dataclasses.asdict(plan).items():
        content |= value if name in _AT_THE_TOP else {name: value}
    return content


def build(
    cfg: schema.Config,
    chosen: ranking.Ranking,
    steps: whole_run.Steps,
    target: step_report.Target,
    notes: Sequence[str] = (),
) -> Report:
    """Return the plan of a run whose batch sizes have these steps, by their layouts."""
    full = steps[cfg.batch.global_batch_size]
    assert not isinstance(full, str), "a run whose full batch is refused has no plan"
    rows = whole_run.batches(cfg, steps)
    return Report(
        peak=full.peak,
        time=full.time,
        work=full.work,
        run=whole_run.run(rows, chosen.n_devices, target.price),
        compile_seconds=full.compiled.compile_seconds if full.compiled else None,
        compiled=_compiled_step(full.compiled) if full.compiled else None,
        problems=[step for step in steps.values() if isinstance(step, str)],
        notes=list(notes),
        gpus=chosen.n_devices,
        gpus_idle=chosen.n_devices - chosen.n_used,
        gpu=Gpu(name=target.gpu.name, source=target.gpu.source),
        network=target.network,
        mesh=full.layout.sizes,
        n_microbatches=full.layout.n_microbatches,
        attention=full.layout.attention,
        step=_step(full.cfg, full.layout),
        assumed=time_model.assumptions(
            full.cfg, full.layout, target.gpu, compiled=full.compiled is not None
        ),
        versions=compiler.versions(),
        layouts_are=chosen.origin,
        batches=rows,
    )


def _compiled_step(compiled: compiler.Compiled) -> CompiledStep:
    return CompiledStep(
        argument_bytes=compiled.argument_bytes,
        temp_bytes=compiled.temp_bytes,
        host_bytes=compiled.host_bytes,
        largest_buffers=compiled.largest_buffers,
        fused_attention=compiled.fused_attention,
        cached=compiled.cached,
    )


def _step(cfg: schema.Config, layout: placement.Layout) -> Step:
    return Step(
        global_batch_size=cfg.batch.global_batch_size,
        microbatch_size=cfg.batch.microbatch_size,
        seq_len=cfg.model.seq_len,
        compute_dtype=cfg.precision.compute_dtype,
        matmul_dtype=flops.product_dtype(cfg.precision),
        remat=remat.in_effect(cfg.model.remat, layout.sizes["stage"] > 1),
        shard_optimizer=cfg.mesh.shard_optimizer,
        sequence_parallel=cfg.mesh.sequence_parallel,
        virtual_stages=cfg.mesh.virtual_stages,
    )
