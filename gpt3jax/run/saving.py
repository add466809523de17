"""When a run saves its state, and what it does about saves that fail.

A failing store ends no run before `checkpoint.max_failed_saves` tries, and all processes at once.
"""

import time
from typing import Any

from gpt3jax import errors
from gpt3jax.checkpoint import storage
from gpt3jax.config import schema
from gpt3jax.record import metrics
from gpt3jax.run import startup, step_log


def save(
    run: startup.Run, state: Any, position: step_log.Position, recorder: metrics.Recorder
) -> None:
    """Start to save a checkpoint, unless this very step has one.

    All waiting for a save, this one's copies or the end of the one before, happens in here.

    Raises:
        TransientError: as many saves in a row failed as `checkpoint.max_failed_saves` allows, or
            replicas of parameters differ.
    """
    if run.store is None:
        return
    report(run.store, recorder, wait=True)
    run.store.wait()
    limit = run.cfg.checkpoint.max_failed_saves
    if not _start_save(run, run.store, state, position) or run.store.n_failed + 1 < limit:
        return
    # The last try, if there is a limit: all processes wait for it, so that they end together.
    failure = run.store.wait() if limit else ""
    if failure and run.store.n_failed >= limit:
        raise errors.TransientError(
            f"{run.store.n_failed} saves in a row failed (checkpoint.max_failed_saves), the last: "
            f"{failure}"
        )


def save_last(
    run: startup.Run, state: Any, position: step_log.Position, recorder: metrics.Recorder
) -> None:
    """Save the run's last state and wait for it; after a failure try again, with pauses.

    Raises:
        TransientError: it failed as often as `checkpoint.max_failed_saves` says.
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
    raise errors.TransientError(f"the last checkpoint failed {tries} times: {failure}")


def _start_save(
    run: startup.Run, store: storage.Checkpoints, state: Any, position: step_log.Position
) -> bool:
    """Start to save, and tell whether there was anything to save.

    Raises:
        UserError: another run is in the folder.
    """
    store.check_alone()
    if position.step in store.steps():
        return False
    run.replicas.check(position.step, state.params)
    store.save(state, startup.meta_of(run, position))
    return True


def report(
    store: storage.Checkpoints | None, recorder: metrics.Recorder, wait: bool = False
) -> None:
    """Say so if the last save failed, once it is known; `wait` waits for it."""
    failure = store.poll(wait=wait) if store is not None else None
    if failure:
        recorder.say(f"WARNING: {failure}; training goes on and tries again at the next interval")
