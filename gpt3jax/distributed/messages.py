"""Joining the processes of a run, so that none trains alone by mistake."""

import json
import time
from collections.abc import Collection
from typing import Any

import jax
import numpy as np
from jax._src import distributed as _service  # its client is the way to talk without collectives
from jax.experimental import multihost_utils

from gpt3jax import errors


def of_first_process(answer: bool) -> bool:
    """Return the first process's answer, on all; for what it alone knows and all must act on."""
    if jax.process_count() == 1:
        return answer
    return bool(multihost_utils.broadcast_one_to_all(np.bool_(answer)))


def on_any_process(answer: bool) -> bool:
    """Tell whether any process answers yes; all must ask."""
    if jax.process_count() == 1:
        return answer
    return bool(np.any(multihost_utils.process_allgather(np.bool_(answer))))


def refuse_together(problem: str) -> None:
    """End all processes if one of them has a problem; all must ask.

    Raises:
        UserError: it says which problem, or that another process does.
    """
    if on_any_process(bool(problem)):
        leave()
        raise errors.UserError(problem or "another process ended the run: its output says why")


def process() -> tuple[int, int]:
    """Return (number of this process, how many there are) without touching a device."""
    return _service.global_state.process_id, _service.global_state.num_processes


def publish(name: str, text: str) -> None:
    """Let every process read a text under a name, once; through the service, not the devices."""
    _client().key_value_set(f"gpt3jax/{name}", text)


def receive(name: str, timeout: float) -> str | None:
    """Return the text published under a name; None if there is none after so many seconds."""
    try:
        return _client().blocking_key_value_get(f"gpt3jax/{name}", max(int(1000 * timeout), 1))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" in str(error) or "NOT_FOUND" in str(error):
            return None
        raise errors.TransientError(f"the first process cannot be reached: {error}") from error


def gather(
    name: str, text: str, timeout: float, of: Collection[int] | None = None
) -> list[str | None]:
    """Return every process's text in the first one, and nothing in the others.

    None stands for a process that gave none within `timeout` seconds, of all together, or that is
    not in `of`. Unlike a collective it cannot hang, whatever the processes do.
    """
    me, n = process()
    if n == 1:
        return [text]
    if me:
        publish(f"{name}/{me}", text)
        return []
    end = time.monotonic() + timeout
    asked = range(n) if of is None else of
    return [text] + [
        receive(f"{name}/{i}", end - time.monotonic()) if i in asked else None for i in range(1, n)
    ]


def raise_of_first(name: str, error: errors.UserError | None, timeout: float) -> None:
    """Raise in all processes the error of the first one, if it has one; once under each name.

    Raises:
        UserError, TransientError: that error, or nothing was heard for `timeout` seconds.
    """
    me, n = process()
    if n > 1 and me == 0:
        told = error and [isinstance(error, errors.TransientError), str(error)]
        publish(name, json.dumps(told))
    elif n > 1:
        text = receive(name, timeout)
        if text is None:
            raise errors.TransientError(
                f"process {me} heard nothing from process 0 ({name}) for {timeout:.0f} s: look at "
                "its output"
            )
        if told := json.loads(text):
            error = (errors.TransientError if told[0] else errors.UserError)(told[1])
    if error is not None:
        leave()
        raise error


def post(name: str, text: str) -> None:
    """Publish a text in place of an earlier one."""
    _client().key_value_set(f"gpt3jax/{name}", text, allow_overwrite=True)


def posted(folder: str) -> dict[str, str]:
    """Return the texts published under names that begin with `folder` and a slash, by the rest."""
    prefix = f"gpt3jax/{folder}/"
    found = dict(_client().key_value_dir_get(prefix))
    return {name.removeprefix(prefix): text for name, text in found.items()}


def meet(name: str, timeout: float) -> None:
    """Wait until all processes are here, once under each name.

    Raises:
        TransientError: one did not come within `timeout` seconds.
    """
    if process()[1] == 1:
        return
    try:
        _client().wait_at_barrier(f"gpt3jax/{name}", int(1000 * timeout))
    except jax.errors.JaxRuntimeError as error:
        raise errors.TransientError(f"waiting for all processes ({name}): {error}") from error


def leave() -> None:
    """Leave together: a first process that simply ends would abort the others in mid-sentence."""
    if process()[1] == 1:
        return
    try:
        jax.distributed.shutdown()
    except RuntimeError:  # one of them is gone already
        return


def _client() -> Any:
    return _service.global_state.client
