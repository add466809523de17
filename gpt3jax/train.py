"""The training loop and nothing else.

Its order is an invariant: restore; then, for each step, evaluate if due, save if due, stop if
asked, take the next batch, dispatch the step, and read the metrics of the step *before*. So the
device always has a step queued while Python waits for the last one's numbers, and what is saved or
evaluated at step n is the state after exactly n steps.
"""

import dataclasses
import functools
import math
import shlex
import sys
from typing import Any, Literal

import jax

from gpt3jax import (
    batch_schedule,
    checkpoint,
    config,
    distributed,
    flops,
    metrics,
    pipeline,
    profiling,
    sharding,
    step,
    step_log,
    stopping,
)
from gpt3jax.data import loader, splits, text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What stays the same from the first step to the last."""

    cfg: config.Config
    mesh: jax.sharding.Mesh
    schedule: batch_schedule.BatchSchedule
    end: step_log.Position
    splits: splits.Splits
    program: step.Program
    store: checkpoint.Checkpoints | None


def train(cfg: config.Config) -> None:
    """Train a config from its newest checkpoint, or from scratch, to its end.

    Raises:
        UserError: what does not fit or cannot be read, before the first step; a loss that is not
            finite; a last checkpoint that cannot be written.
    """
    run, state, start, news = start_or_resume(cfg)
    with (
        metrics.Recorder(
            cfg,
            start_step=start.step,
            end_step=run.end.step,
            start_samples=start.samples,
            end_samples=run.end.samples,
            n_devices=jax.device_count(),
            peak_flops=_peak_flops(cfg),
            active=jax.process_index() == 0,
        ) as recorder,
        stopping.Stop() as stop,
    ):
        for line in (*describe(run), *news):
            recorder.say(line)
        try:
            state, position = loop(run, state, start, recorder, stop)
            finish(run, state, start, position, recorder)
        finally:
            if run.store is not None:
                run.store.close()  # an error must not cut off a save under way


def start_or_resume(cfg: config.Config) -> tuple[Run, Any, step_log.Position, list[str]]:
    """Return the run, the state and position to start from, and lines that say where from."""
    mesh = sharding.make_mesh(cfg.mesh)
    schedule = batch_schedule.from_config(cfg.batch, cfg.model.seq_len)
    n_ranks, n_stages = sharding.data_parallel_size(mesh), mesh.shape["stage"]
    batch_schedule.check(schedule, cfg.batch.microbatch_size, n_ranks, n_stages)
    text.ensure_corpus(cfg.data, cfg.model)
    folder = cfg.checkpoint.dir
    store = checkpoint.Checkpoints(folder, cfg.checkpoint.max_to_keep) if folder else None
    source = checkpoint.choose_source(store, cfg.checkpoint.load)
    run_from = functools.cache(functools.partial(prepare, cfg, mesh, schedule, store))
    if source is None:
        start = step_log.Position(0, 0)
        run = run_from(start)
        seed = f"starting from random weights (train.seed={cfg.train.seed})"
        return run, run.program.init(), start, [seed]

    def expect(meta: checkpoint.Meta) -> tuple[Any, dict[str, Any]]:
        run = run_from(step_log.Position(meta.step, meta.consumed_samples))
        return run.program.abstract_state, run.splits.order

    state, meta, warnings = checkpoint.restore_newest(source, cfg, expect)
    start = step_log.Position(meta.step, meta.consumed_samples)
    told = f"resumed from {source.folder} at step {start.step}, {start.samples} samples"
    return run_from(start), state, start, [*warnings, told]


def prepare(
    cfg: config.Config,
    mesh: jax.sharding.Mesh,
    schedule: batch_schedule.BatchSchedule,
    store: checkpoint.Checkpoints | None,
    start: step_log.Position,
) -> Run:
    """Build the program, and map the corpus, of a run that goes on from a position.

    Its end depends on the start, because the batch size may have been another one before.
    """
    end = step_log.Position(*schedule.end(cfg.train, cfg.model.seq_len, *start))
    return Run(
        cfg=cfg,
        mesh=mesh,
        schedule=schedule,
        end=end,
        splits=splits.open_splits(cfg, end.step, end.samples),
        program=step.build(cfg, mesh, end.samples),
        store=store,
    )


def loop(
    run: Run, state: Any, start: step_log.Position, recorder: metrics.Recorder, stop: stopping.Stop
) -> tuple[Any, step_log.Position]:
    """Take steps until the end of the run or a signal; return the last state and position."""
    cfg, position = run.cfg, start
    batches = loader.train_batches(
        run.splits, cfg, run.schedule, run.mesh, start.samples, run.end.samples
    )
    log = step_log.StepLog(cfg, recorder, first_step=start.step + 1, end=run.end)
    profile = profiling.Profile(cfg.log)
    while position.samples < run.end.samples:
        if position != start:
            if _due(position.step, cfg.train.eval_interval):
                with log.untimed():
                    evaluate(run, state, position, "validation", recorder)
            if _due(position.step, cfg.checkpoint.save_interval):
                with log.untimed():
                    save(run, state, position, recorder)
        _report_save(run.store, recorder)
        if stop.requested(position.step):
            break
        batch, size = next(batches)
        profile.before(position.step + 1)
        with log.compiling(size):
            state, step_metrics = run.program.train(state, batch)
        position = step_log.Position(position.step + 1, position.samples + size)
        profile.after(position.step, step_metrics)
        log.push(position, size, step_metrics)
    log.settle()
    profile.close()
    return state, position


def finish(
    run: Run,
    state: Any,
    start: step_log.Position,
    position: step_log.Position,
    recorder: metrics.Recorder,
) -> None:
    """Save what is not saved yet; at the end of the run evaluate, after a signal say how to go on.

    Raises:
        UserError: the last checkpoint could not be written.
    """
    done = position.samples >= run.end.samples
    if position != start:
        save(run, state, position, recorder)
    if run.store is not None:
        failure = run.store.poll(wait=True)
        if failure:
            raise config.UserError(f"the last checkpoint failed: {failure}")
    if not done:
        command = shlex.join(["python", "-m", "gpt3jax.main", *sys.argv[1:]])
        saved = f"saved in {run.store.folder}" if run.store else "not saved (no checkpoint.dir)"
        recorder.say(f"stopped at step {position.step}, {saved}; resume with: {command}")
        return
    if position == start and distributed.of_first_process(_is_evaluated(run, position, recorder)):
        recorder.say(f"nothing left to do: the run ended at step {position.step}")
        return
    evaluate(run, state, position, "validation", recorder)
    evaluate(run, state, position, "test", recorder)
    recorder.say(f"the run is complete: step {position.step}, {position.samples} samples")


def evaluate(
    run: Run,
    state: Any,
    position: step_log.Position,
    split: Literal["validation", "test"],
    recorder: metrics.Recorder,
) -> None:
    """Measure the token-weighted mean loss on the split's next samples, and record it."""
    train = run.cfg.train
    n_before = (position.step - 1) // train.eval_interval if train.eval_interval else 0
    batches = loader.eval_batches(run.splits, run.cfg, run.mesh, split, n_before)
    if not train.eval_interval or batches is None:
        return
    sums = [run.program.eval(state.params, batch) for batch in batches]
    loss_sum, n_tokens = (math.fsum(float(x) for x in xs) for xs in zip(*sums, strict=True))
    recorder.log_eval(position.step, position.samples, split, loss_sum / n_tokens)


def _is_evaluated(run: Run, position: step_log.Position, recorder: metrics.Recorder) -> bool:
    """Tell whether the evaluation that ends a run is there already, or none is wanted."""
    splits = {"test_loss": run.splits.test, "validation_loss": run.splits.validation}
    wanted = [name for name, source in splits.items() if source is not None]
    return not wanted or recorder.recorded(position.step, wanted[0])


def save(run: Run, state: Any, position: step_log.Position, recorder: metrics.Recorder) -> None:
    """Start to save a checkpoint, unless this very step has one."""
    if run.store is None:
        return
    _report_save(run.store, recorder, wait=True)
    if position.step in run.store.steps():
        return
    run.store.save(
        state,
        checkpoint.Meta(
            step=position.step,
            consumed_samples=position.samples,
            data_order=run.splits.order,
            config=config.flatten(run.cfg),
        ),
    )


def _report_save(
    store: checkpoint.Checkpoints | None, recorder: metrics.Recorder, wait: bool = False
) -> None:
    failure = store.poll(wait) if store is not None else None
    if failure:
        recorder.say(f"WARNING: {failure}; training goes on and tries again at the next interval")


def _due(step_number: int, interval: int) -> bool:
    return interval > 0 and step_number % interval == 0


def _peak_flops(cfg: config.Config) -> float | None:
    if cfg.log.peak_tflops:
        return cfg.log.peak_tflops * 1e12
    return flops.peak_flops(jax.devices()[0].device_kind, cfg.precision.compute_dtype)


def describe(run: Run) -> list[str]:
    """Return the lines that open a run's log: devices, mesh, model, length."""
    cfg, shape = run.cfg, run.mesh.shape
    axes = " x ".join(f"{axis} {size}" for axis, size in shape.items() if size > 1) or "one device"
    kind = jax.devices()[0].device_kind
    lines = [
        f"{jax.process_count()} process(es), {jax.device_count()} device(s) ({kind}), mesh {axes}",
        f"{flops.n_params(cfg.model):,} parameters, {cfg.precision.compute_dtype}, attention "
        f"{run.program.compute.attention}, remat {cfg.model.remat}",
        f"{run.end.step:,} steps, {run.end.samples:,} samples of {cfg.model.seq_len} tokens; "
        f"{run.splits.told}",
    ]
    lines += pipeline.describe(cfg, run.mesh)
    if run.store is None:
        lines.append("WARNING: checkpoint.dir is empty: nothing will be saved")
    return lines
