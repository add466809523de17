"""Saves of a run's state, and what follows where they fail.

A store that fails ends a run only after `checkpoint.max_failed_saves` tries in a row, and then in
all processes at once.
"""

import time

from gpt3jax import errors, step
from gpt3jax.checkpoint import storage
from gpt3jax.config import schema
from gpt3jax.record import recording
from gpt3jax.run import startup, step_log


def save(
    run: startup.Run,
    state: step.TrainState,
    position: step_log.Position,
    recorder: recording.Recorder,
) -> None:
    """Start to save a checkpoint, unless this step has one already.

    All waiting for saves happens here: for the copies of this save, and for the end of the save
    before.

    Raises:
        TransientError: `checkpoint.max_failed_saves` saves in a row failed, or replicas of
            parameters differ.
    """
    if run.store is None:
        return
    report(run.store, recorder, wait=True)
    run.store.wait()
    limit = run.cfg.checkpoint.max_failed_saves
    if not _start_save(run, run.store, state, position) or run.store.n_failed + 1 < limit:
        return
    # Another failure would be the last one allowed: all processes wait for the save, so that they
    # end together.
    failure = run.store.wait() if limit else ""
    if failure and run.store.n_failed >= limit:
        raise errors.TransientError(
            f"{run.store.n_failed} saves in a row failed (checkpoint.max_failed_saves), the last: "
            f"{failure}",
            page="checkpoints.md#saving",
        )


def save_last(
    run: startup.Run,
    state: step.TrainState,
    position: step_log.Position,
    recorder: recording.Recorder,
) -> None:
    """Save the run's last state and wait for it; after a failure try again, with pauses.

    Raises:
        TransientError: all `checkpoint.max_failed_saves` tries failed.
    """
    if run.store is None:
        return
    report(run.store, recorder, wait=True)
    options = run.cfg.checkpoint
    tries = options.max_failed_saves or schema.Checkpoint().max_failed_saves
    for n in range(1, tries + 1):
        run.store.wait()
        failure = run.store.wait() if _start_save(run, run.store, state, position) else ""
        if not failure:
            return
        if n < tries:
            recorder.say(
                f"WARNING: {failure}; try {n} of {tries}, again in {options.retry_pause:g} s"
            )
            time.sleep(options.retry_pause)
    raise errors.TransientError(
        f"the last checkpoint failed {tries} times: {failure}", page="checkpoints.md#saving"
    )


def _start_save(
    run: startup.Run,
    store: storage.Checkpoints,
    state: step.TrainState,
    position: step_log.Position,
) -> bool:
    """Start to save; return whether there was anything to save.

    Raises:
        UserError: another run is in the folder.
        TransientError: replicas of parameters differ.
    """
    store.check_alone()
    if position.step in store.steps():
        return False
    run.replicas.check(position.step, state.params)
    store.save(state, startup.meta_of(run, position))
    return True


def report(
    store: storage.Checkpoints | None, recorder: recording.Recorder, *, wait: bool = False
) -> None:
    """Warn if the last save failed, once that is known; with `wait` wait until it is."""
    failure = store.poll(wait=wait) if store is not None else None
    if failure:
        recorder.say(f"WARNING: {failure}; training goes on and tries again at the next interval")
