"""A run: what stays the same from its first step to its last, built new or from a checkpoint."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from gpt3jax import optimizer, step
from gpt3jax.checkpoint import choosing, metadata, resume, storage
from gpt3jax.config import batch_schedule, schema, validation
from gpt3jax.data import skipping, splits, text
from gpt3jax.gradient import pipeline
from gpt3jax.hardware import flops
from gpt3jax.model import remat
from gpt3jax.plan import memory_model, placement
from gpt3jax.run import corruption, faults, step_log
from gpt3jax.sharding import layouts, meshes, rules
from gpt3jax.watch import phases


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What stays the same from the first step to the last."""

    cfg: schema.Config
    mesh: jax.sharding.Mesh
    schedule: batch_schedule.BatchSchedule
    end: step_log.Position
    n_samples: int
    """The run's length that decides schedules and the samples' order, skipped ones included."""
    splits: splits.Splits
    program: step.Program
    store: storage.Checkpoints | None
    faults: faults.Faults
    """What was seen of faulty steps; it and `replicas` alone change."""
    replicas: corruption.Replicas
    history: tuple[dict[str, Any], ...] = ()
    """What starts from checkpoints changed so far, this one included: `resume.history_entry`."""


def start_or_resume(
    cfg: schema.Config, clock: phases.Phases, lost: Callable[[], str] = lambda: ""
) -> tuple[Run, Any, step_log.Position, list[str]]:
    """Return the run, the state and position to start from, and lines that say where from.

    `lost` returns why checkpoint.dir may not be written any more, "" while it may.
    """
    mesh = meshes.make_mesh(cfg.mesh)
    schedule = schedule_of(cfg, mesh)
    text.ensure_corpus(cfg.data, cfg.model)
    store = _open_store(cfg, lost)
    source = choosing.choose_source(store, cfg.checkpoint.load)
    run_from = functools.cache(functools.partial(prepare, cfg, mesh, schedule, store))
    if source is None:
        start = step_log.Position(0, 0)
        run = run_from(start)
        seed = f"starting from random weights (train.seed={cfg.train.seed})"
        return run, run.program.init(), start, [seed]

    only_params = cfg.checkpoint.only_params and source is not store

    def position(meta: metadata.Meta) -> step_log.Position:
        return step_log.Position(*(0, 0) if only_params else (meta.step, meta.consumed_samples))

    def expect(meta: metadata.Meta) -> tuple[Any, dict[str, Any]]:
        run = run_from(position(meta))
        if not only_params:
            stream, before = skipping.from_config(cfg.data), meta.config.get("data.skip_samples")
            skipping.check_resumed(stream, before, meta.consumed_samples)
        return run.program.abstract_state, run.splits.order

    with clock.during(phases.RESTORE):
        state, meta, warnings = choosing.restore_newest(
            source, cfg, expect, only_params=only_params
        )
    start, run = position(meta), run_from(position(meta))
    if only_params or meta.only_params:
        told = f"starting with the parameters of {source.folder}, step {meta.step}"
        return run, run.program.adopt(state.params), start, [*warnings, told]
    run, state, changed = _go_on(run, state, start, meta)
    told = f"resumed from {source.folder} at step {start.step}, {start.samples} samples"
    return run, state, start, [*warnings, told, *changed]


def _go_on(
    run: Run, saved: Any, start: step_log.Position, meta: metadata.Meta
) -> tuple[Run, Any, list[str]]:
    """Return the run and the state that go on from a checkpoint, and a table of what changed."""
    run.faults.restore(meta.faults)
    state = resume.with_own_scale(run.cfg, meta, run.program.abstract_state, saved)
    found = resume.changes(meta, saved, meta_of(run, start), state)
    history = (*meta.history, *resume.history_entry(meta, found))
    return dataclasses.replace(run, history=history), state, resume.table(found)


def meta_of(run: Run, position: step_log.Position) -> metadata.Meta:
    """Return what a checkpoint of the run at a position says besides the state."""
    return metadata.Meta(
        step=position.step,
        consumed_samples=position.samples,
        data_order=run.splits.order,
        config=schema.flatten(run.cfg),
        faults=run.faults.as_json(),
        history=run.history,
        mesh=_axes(run.mesh),
        jax_version=jax.__version__,
    )


def _axes(mesh: jax.sharding.Mesh) -> str:
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    return axes or "one device"


def schedule_of(cfg: schema.Config, mesh: jax.sharding.Mesh) -> batch_schedule.BatchSchedule:
    """Return the batch sizes of a run.

    Raises:
        UserError: one of them cannot be cut over the mesh.
    """
    schedule = batch_schedule.from_config(cfg.batch, cfg.model.seq_len)
    n_ranks, n_stages = rules.data_parallel_size(mesh), mesh.shape["stage"]
    batch_schedule.check(schedule, cfg.batch.microbatch_size, n_ranks, n_stages)
    return schedule


def _open_store(cfg: schema.Config, lost: Callable[[], str]) -> storage.Checkpoints | None:
    """Open the run's checkpoints, to read and write; to read those before a step to replay."""
    folder, replayed = cfg.checkpoint.dir, cfg.train.replay_step
    if not folder or (replayed and not pathlib.Path(folder).is_dir()):
        return None
    if replayed:
        return storage.Checkpoints(folder, read_only=True, before=replayed)
    options = cfg.checkpoint
    return storage.Checkpoints(
        folder, options.max_to_keep, keep_period=options.keep_period, lost=lost
    )


def prepare(
    cfg: schema.Config,
    mesh: jax.sharding.Mesh,
    schedule: batch_schedule.BatchSchedule,
    store: storage.Checkpoints | None,
    start: step_log.Position,
) -> Run:
    """Build the program, and map the corpus, of a run that goes on from a position."""
    stream = skipping.from_config(cfg.data)
    n_steps, n_samples = skipping.run_length(cfg, schedule, *start)
    validation.check_schedule(cfg.optimizer, n_samples)
    skipping.check(stream, schedule, n_samples)
    program = step.build(cfg, mesh, n_samples)
    params = program.abstract_state.params
    return Run(
        cfg=cfg,
        mesh=mesh,
        schedule=schedule,
        end=step_log.Position(*stream.end(schedule, *start, n_samples)),
        n_samples=n_samples,
        splits=splits.open_splits(cfg, n_steps, n_samples),
        program=program,
        store=store,
        faults=faults.Faults(cfg, layouts.array_names(params)),
        replicas=corruption.Replicas(mesh, params, cfg.train.checksum_interval),
    )


def describe(run: Run) -> list[str]:
    """Return the lines that open a run's log: devices, mesh, model, length."""
    cfg, kind, has_stages = run.cfg, jax.devices()[0].device_kind, run.mesh.shape["stage"] > 1
    lines = [
        f"{jax.process_count()} process(es), {jax.device_count()} device(s) ({kind}), "
        f"mesh {_axes(run.mesh)}",
        f"{flops.n_params(cfg.model):,} parameters, {cfg.precision.compute_dtype}, attention "
        f"{run.program.compute.attention}, remat {remat.in_effect(cfg.model.remat, has_stages)}",
        f"{run.end.step:,} steps, {run.end.samples:,} samples of {cfg.model.seq_len} tokens; "
        f"{run.splits.description}",
    ]
    lines += warmup_warnings(cfg.optimizer, run.n_samples)
    lines += pipeline.describe(cfg, run.mesh)
    lines += run.replicas.describe()
    limit = device_memory()
    needed = step_bytes(cfg, run.mesh, run.program.compute.attention, limit)
    lines += memory_warnings(needed, limit)
    if run.store is None:
        lines.append("WARNING: checkpoint.dir is empty: nothing will be saved")
    lines += validation.without_effect(cfg)
    lines += beyond_the_end(cfg, run.schedule, run.end)
    return lines


def beyond_the_end(
    cfg: schema.Config, schedule: batch_schedule.BatchSchedule, end: step_log.Position
) -> list[str]:
    """Return a line for each field that would take effect only after the end of the run."""
    told, faults = [], cfg.faults
    if cfg.log.profile_steps[0] > end.step:
        told.append(f"log.profile_steps={' '.join(map(str, cfg.log.profile_steps))}")
    if schedule.stages[-1][0] >= end.samples:
        first, size = schedule.stages[-1]
        told.append(f"the batch of {size} from sample {first} on (batch.schedule or batch.ramp)")
    if faults.spike != "off" and faults.spike_window + 2 > end.step:
        told.append(f"faults.spike_window={faults.spike_window} (faults.spike={faults.spike})")
    where = f"the run ends at step {end.step}, sample {end.samples}"
    return [f"WARNING: {one} has no effect: {where}" for one in told]


def warmup_warnings(o: schema.Optimizer, run_samples: int) -> list[str]:
    """Return a line if a run ends before its warm-up, as a short trial of a recipe does."""
    warmup, _ = o.schedule(run_samples)
    if warmup <= run_samples:
        return []
    last = optimizer.learning_rate(o, run_samples, run_samples)
    return [
        f"WARNING: the warm-up of {int(warmup):,} samples is longer than the run of "
        f"{run_samples:,}: the learning rate only rises, to {last:.6g} where optimizer.peak_lr is "
        f"{o.peak_lr:g}"
    ]


def device_memory() -> int | None:
    """Return the bytes that a device of this process offers; None where it does not tell."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit")


def step_bytes(
    cfg: schema.Config, mesh: jax.sharding.Mesh, attention: str, limit: int | None
) -> float:
    """Return the bytes that a full step takes of a device, by the plan's closed forms.

    With the plan's headroom in the bytes that a device offers, `limit`, where it tells.
    """
    rows = cfg.batch.microbatch_size * rules.data_parallel_size(mesh)
    layout = placement.Layout(
        sizes=dict(mesh.shape),
        n_microbatches=max(cfg.batch.global_batch_size // rows, 1),
        attention=attention,
        problems=(),
    )
    return sum(memory_model.memory(cfg, layout).values()) + memory_model.headroom(
        cfg, layout, limit or 0
    )


def memory_warnings(needed: float, limit: int | None) -> list[str]:
    """Return a line if a step needs more bytes than a device has."""
    if limit is None or needed <= limit:
        return []
    return [
        f"WARNING: a step needs about {needed / 2**30:.1f} GiB a device (closed forms), which has "
        f"{limit / 2**30:.1f}: it may run out of memory; python -m gpt3jax.plan says what to change"
    ]
