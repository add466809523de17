"""The training loop and nothing else.

Its order is an invariant: restore; then, for each step, evaluate if due, save if due, stop if
asked, take the next batch, dispatch the step, and read the metrics of the step *before*. So the
device always has a step queued while Python waits for the last one's numbers, and what is saved or
evaluated at step n is the state after exactly n steps.
"""

import math
import shlex
import sys
from typing import Any, Literal

import jax

from gpt3jax.config import schema
from gpt3jax.data import loader
from gpt3jax.distributed import messages
from gpt3jax.hardware import flops
from gpt3jax.preflight import joint
from gpt3jax.record import metrics
from gpt3jax.run import folder_lock, profiling, saving, startup, step_log, stopping
from gpt3jax.watch import oversight, phases


def train(cfg: schema.Config) -> bool:
    """Train a config from its newest checkpoint, or from scratch; tell whether it is at its end.

    Raises:
        UserError: what does not fit or cannot be read, or a folder that another run holds, before
            the first step; one that it has taken since; a loss that is not finite.
        TransientError: a last checkpoint that cannot be written.
    """
    preflight = joint.before_devices(cfg)
    with folder_lock.Hold(cfg) as held, oversight.Oversight(cfg) as overseer:
        return _train(cfg, preflight, overseer, held)


def _train(
    cfg: schema.Config,
    preflight: joint.Session | None,
    overseer: oversight.Oversight,
    held: folder_lock.Hold,
) -> bool:
    clock = overseer.clock
    run, state, start, news = startup.start_or_resume(cfg, clock, held.lost)
    overseer.begin(start.step)
    news += joint.before_step(preflight, run, start.samples)
    with (
        metrics.Recorder(
            cfg,
            start_step=start.step,
            end_step=run.end.step,
            start_samples=start.samples,
            end_samples=run.end.samples,
            n_devices=jax.device_count(),
            peak_flops=_peak_flops(cfg),
            history=run.history,
            active=jax.process_index() == 0,
        ) as recorder,
        stopping.Stop(held.known_lost) as stop,
    ):
        for line in (*startup.describe(run), *news):
            recorder.say(line)
        try:
            with clock.during(phases.HOST):
                state, position = loop(run, state, start, recorder, stop, overseer)
            messages.refuse_together(held.known_lost())
            with clock.during(phases.SAVE):
                finish(run, state, start, position, recorder, clock)
        finally:
            if run.store is not None:
                with clock.during(phases.SAVE):
                    run.store.close()  # an error must not cut off a save under way
        done = position.samples >= run.end.samples
        told = overseer.end(done)
        if position != start:
            recorder.say(told)
    return done


def loop(
    run: startup.Run,
    state: Any,
    start: step_log.Position,
    recorder: metrics.Recorder,
    stop: stopping.Stop,
    overseer: oversight.Oversight,
) -> tuple[Any, step_log.Position]:
    """Take steps until the end of the run or a signal; return the last state and position."""
    cfg, clock, position = run.cfg, overseer.clock, start
    batches = loader.train_batches(
        run.splits, cfg, run.schedule, run.mesh, start.samples, run.end.samples
    )
    log = step_log.StepLog(
        cfg, recorder, clock, start.step + 1, run.end, n_samples=run.n_samples, seen=run.faults
    )
    profile = profiling.Profile(cfg.log)
    while position.samples < run.end.samples:
        if position != start:
            if _due(position.step, cfg.train.eval_interval):
                log.settle()
                with clock.during(phases.EVALUATE):
                    evaluate(run, state, position, "validation", recorder)
            if _due(position.step, cfg.checkpoint.save_interval):
                log.settle()
                with clock.during(phases.SAVE):
                    saving.save(run, state, position, recorder)
        saving.report(run.store, recorder)
        if stop.requested(position.step):
            break
        with clock.during(phases.DATA):
            batch, size, samples = next(batches)
        profile.before(position.step + 1)
        args = (state, batch, *run.faults.step_args(position.step + 1))
        log.compile_first(size, run.program.train, *args)
        with clock.during(phases.DEVICE):  # it waits where the device is behind
            state, step_metrics = run.program.train(*args)
        position = step_log.Position(position.step + 1, samples)
        profile.after(position.step, step_metrics)
        log.push(position, size, step_metrics)
        run.replicas.after_step(position.step, state.params)
        overseer.stepped(position.step, recorder)
    log.settle()
    run.replicas.finish()
    profile.close()
    return state, position


def finish(
    run: startup.Run,
    state: Any,
    start: step_log.Position,
    position: step_log.Position,
    recorder: metrics.Recorder,
    clock: phases.Phases,
) -> None:
    """Save what is not saved yet; at the end of the run evaluate, after a signal say how to go on.

    Raises:
        UserError: the last checkpoint could not be written.
    """
    done = position.samples >= run.end.samples
    if position != start:
        saving.save_last(run, state, position, recorder)
    if not done:
        command = shlex.join(["python", "-m", "gpt3jax.main", *sys.argv[1:]])
        saved = f"saved in {run.store.folder}" if run.store else "not saved (no checkpoint.dir)"
        recorder.say(f"stopped at step {position.step}, {saved}; resume with: {command}")
        return
    if position == start and messages.of_first_process(_is_evaluated(run, position, recorder)):
        recorder.say(f"nothing left to do: the run ended at step {position.step}")
        return
    with clock.during(phases.EVALUATE):
        evaluate(run, state, position, "validation", recorder)
        evaluate(run, state, position, "test", recorder)
    recorder.say(f"the run is complete: step {position.step}, {position.samples} samples")


def evaluate(
    run: startup.Run,
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


def _is_evaluated(
    run: startup.Run, position: step_log.Position, recorder: metrics.Recorder
) -> bool:
    """Tell whether the evaluation that ends a run is there already, or none is wanted."""
    splits = {"test_loss": run.splits.test, "validation_loss": run.splits.validation}
    wanted = [name for name, source in splits.items() if source is not None]
    return not wanted or recorder.recorded(position.step, wanted[0])


def _due(step_number: int, interval: int) -> bool:
    return interval > 0 and step_number % interval == 0


def _peak_flops(cfg: schema.Config) -> float | None:
    if cfg.log.peak_tflops:
        return cfg.log.peak_tflops * 1e12
    return flops.peak_flops(jax.devices()[0].device_kind, cfg.precision.compute_dtype)
