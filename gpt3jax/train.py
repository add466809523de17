"""The training loop and nothing else.

Its order is an invariant: restore; then, for each step, evaluate if due, save if due, stop if
asked to, load the next batch, dispatch the step, and read the metrics of the step *before*. So the
device always has a step queued while Python waits for the last step's numbers, and what is saved or
evaluated at step n is the state after exactly n steps.
"""

import contextlib
import math
import sys
from collections.abc import Iterator
from typing import Literal

import jax

from gpt3jax import errors, step
from gpt3jax.config import command_line, schema
from gpt3jax.data import loader
from gpt3jax.distributed import messages
from gpt3jax.hardware import flops
from gpt3jax.preflight import across_processes
from gpt3jax.record import log_folder, recording, wandb_run
from gpt3jax.run import (
    compilation_cache,
    folder_lock,
    layout_change,
    layout_choice,
    profiling,
    saving,
    start_report,
    startup,
    step_log,
    stopping,
)
from gpt3jax.watch import phases, watchers


def train(cfg: schema.Config) -> bool:
    """Train a config from its newest checkpoint, or from scratch; return whether it is at its end.

    Raises:
        UserError: before the first step, if something does not fit or cannot be read, or another
            run holds a folder; later, if another run has taken a folder, or a loss is not finite.
        TransientError: the last checkpoint cannot be written, or replicas differ.
    """
    if cfg.log.wandb_project:
        problem = wandb_run.problem(cfg.log) if messages.process()[0] == 0 else None
        messages.raise_of_first("wandb", problem, cfg.distributed.start_timeout)
    preflight = across_processes.before_devices(cfg)
    with folder_lock.Hold(cfg) as held, watchers.Oversight(cfg) as overseer:
        clock = overseer.clock
        compilation_cache.keep_beside(cfg.checkpoint.dir)
        compare = across_processes.comparison(preflight)
        started = startup.start_or_resume(cfg, clock, held.lost, compare)
        run, start = started.run, started.position
        if has_ended(run, start):
            _say_so(started)
            return True
        check_log_folder(cfg, start.step)
        overseer.begin(start.step, startup.describe_mesh(run.mesh))
        warnings = across_processes.before_step(preflight, run, start.samples)
        with _open_recorder(run, start) as recorder, stopping.Stop(held.known_lost) as stop:
            for line in (*start_report.lines(run), *started.lines, *warnings):
                recorder.say(line)
            with _closing_store(run, clock):
                with clock.during(phases.HOST):
                    run, state, position = loop(run, started.state, start, recorder, stop, overseer)
                messages.refuse_together(
                    held.known_lost(), page="operations.md#one-run-in-a-folder"
                )
                with clock.during(phases.SAVE):
                    finish(run, state, start, position, recorder, clock)
            complete = position.samples >= run.end.samples
            recorder.will_exit(errors.DONE if complete else errors.REQUEUE)
            summary = overseer.end(complete)
            if position != start:
                recorder.say(summary)
    return complete


def loop(
    run: startup.Run,
    state: step.TrainState,
    start: step_log.Position,
    recorder: recording.Recorder,
    stop: stopping.Stop,
    overseer: watchers.Oversight,
) -> tuple[startup.Run, step.TrainState, step_log.Position]:
    """Take steps until the end of the run or a signal; return the last layout, state, position."""
    cfg, clock, position, stretch_end = run.cfg, overseer.clock, start, start.samples
    log = step_log.StepLog(cfg, recorder, clock, start.step + 1, run.end, run.n_samples, run.faults)
    profile = profiling.Profile(cfg.log, jax.process_index())
    while position.samples < run.end.samples:
        if position != start:
            _evaluate_and_save_if_due(run, state, position, log, recorder, clock)
        saving.report(run.store, recorder)
        if stop.requested(position.step):
            break
        if position.samples == stretch_end:
            log.settle()
            size, stretch_end = run.stretch(position.samples)
            run, state = layout_change.change(run, state, size, recorder.say, clock)
            batches = loader.train_batches(
                run.splits, run.cfg, run.schedule, run.mesh, position.samples, stretch_end
            )
        with clock.during(phases.DATA):
            batch, size, samples = next(batches)
        step_number = position.step + 1
        profile.before(step_number)
        args = (state, batch, *run.faults.step_args(step_number))
        log.compile_first(size, run.program.train, *args)
        # The call waits if the device is behind.
        with clock.during(phases.DEVICE), profile.step(step_number):
            state, step_metrics = run.program.train(*args)
        position = step_log.Position(step_number, samples)
        profile.after(step_number, step_metrics)
        log.push(position, size, step_metrics)
        run.replicas.after_step(position.step, state.params)
        overseer.stepped(position.step, recorder)
    log.settle()
    run.replicas.finish()
    profile.close()
    return run, state, position


def _evaluate_and_save_if_due(
    run: startup.Run,
    state: step.TrainState,
    position: step_log.Position,
    log: step_log.StepLog,
    recorder: recording.Recorder,
    clock: phases.Phases,
) -> None:
    if is_due(position.step, run.cfg.train.eval_interval):
        log.settle()
        with clock.during(phases.EVALUATE):
            evaluate(run, state, position, "validation", recorder)
    if is_due(position.step, run.cfg.checkpoint.save_interval):
        log.settle()
        with clock.during(phases.SAVE):
            saving.save(run, state, position, recorder)


def is_due(step_number: int, interval: int) -> bool:
    """Return whether a step ends an interval; an interval of 0 never ends."""
    return interval > 0 and step_number % interval == 0


def finish(
    run: startup.Run,
    state: step.TrainState,
    start: step_log.Position,
    position: step_log.Position,
    recorder: recording.Recorder,
    clock: phases.Phases,
) -> None:
    """Save what is not saved yet; at the end of the run evaluate, after a signal say how to go on.

    Raises:
        TransientError: the last checkpoint could not be written.
    """
    if position != start:
        saving.save_last(run, state, position, recorder)
    if position.samples < run.end.samples:
        command = command_line.shell_line("gpt3jax.main", *sys.argv[1:])
        saved = f"saved in {run.store.folder}" if run.store else "not saved (no checkpoint.dir)"
        recorder.say(f"stopped at step {position.step}, {saved}; resume with: {command}")
        return
    with clock.during(phases.EVALUATE):
        evaluate(run, state, position, "validation", recorder)
        evaluate(run, state, position, "test", recorder)
    recorder.say(f"the run is complete: step {position.step}, {position.samples} samples")


def evaluate(
    run: startup.Run,
    state: step.TrainState,
    position: step_log.Position,
    split: Literal["validation", "test"],
    recorder: recording.Recorder,
) -> None:
    """Measure the token-weighted mean loss on the split's next samples, and record it."""
    interval = run.cfg.train.eval_interval
    n_before = (position.step - 1) // interval if interval else 0
    batches = loader.eval_batches(run.splits, run.cfg, run.mesh, split, n_before)
    if not interval or batches is None:
        return
    sums = [run.program.eval(state.params, batch) for batch in batches]
    loss_sum, n_tokens = (math.fsum(float(x) for x in xs) for xs in zip(*sums, strict=True))
    recorder.log_eval(position.step, position.samples, split, loss_sum / n_tokens)


def has_ended(run: startup.Run, start: step_log.Position) -> bool:
    """Return whether nothing is left to do: no step, and no evaluation that ends the run."""
    if start.samples < run.end.samples:
        return False
    splits = {"test_loss": run.splits.test, "validation_loss": run.splits.validation}
    wanted = [name for name, source in splits.items() if source is not None]
    log_dir = run.cfg.log.dir
    is_recorded = not (wanted and log_dir) or log_folder.has(log_dir, start.step, wanted[0])
    return messages.of_first_process(is_recorded)


def _say_so(started: startup.Started) -> None:
    """Say that nothing is left to do; log.dir stays as it is."""
    run, last = started.run, f"nothing left to do: the run ended at step {started.position.step}"
    if run.store is not None:
        run.store.close()
    if jax.process_index() == 0:
        sys.stdout.write("\n".join((*start_report.lines(run), *started.lines, last, "")))


def check_log_folder(cfg: schema.Config, start_step: int) -> None:
    """Check that log.dir has no log of another run that this one would displace.

    Raises:
        UserError: it has.
    """
    problem = log_folder.problem(cfg, start_step) if jax.process_index() == 0 else None
    messages.raise_of_first("log.dir", problem, cfg.distributed.start_timeout)


def _open_recorder(run: startup.Run, start: step_log.Position) -> recording.Recorder:
    cfg = run.choice.given
    peak_flops: float | None = cfg.log.peak_tflops * 1e12
    if not peak_flops:
        kind = jax.devices()[0].device_kind
        peak_flops = flops.peak_flops(kind, flops.product_dtype(cfg.precision))
    return recording.Recorder(
        cfg,
        recording.Span(
            start_step=start.step,
            start_samples=start.samples,
            end_step=run.end.step,
            end_samples=run.end.samples,
        ),
        n_devices=run.mesh.size,
        peak_flops=peak_flops,
        history=run.history,
        layouts=layout_choice.as_json(run.choice),
        active=jax.process_index() == 0,
    )


@contextlib.contextmanager
def _closing_store(run: startup.Run, clock: phases.Phases) -> Iterator[None]:
    """Close the run's checkpoints at the end: an error must not cut off a save under way."""
    try:
        yield
    finally:
        if run.store is not None:
            with clock.during(phases.SAVE):
                run.store.close()
