"""Messages between the processes of a run: through JAX's coordination service, or collectives."""

import json
import time
from collections.abc import Callable, Collection
from typing import Any

import jax
import numpy as np
from jax._src import distributed as _service  # its client communicates without collectives
from jax.experimental import multihost_utils

from gpt3jax import errors


def of_first_process(answer: bool) -> bool:
    """Return the answer of process 0 in all processes; all must call it."""
    if jax.process_count() == 1:
        return answer
    return bool(multihost_utils.broadcast_one_to_all(np.bool_(answer)))


def on_any_process(answer: bool) -> bool:
    """Return whether any process answers True; all must call it."""
    if jax.process_count() == 1:
        return answer
    return bool(np.any(multihost_utils.process_allgather(np.bool_(answer))))


def refuse_together(problem: str, page: str) -> None:
    """End all processes if one of them has a problem; all must call it, with the same page.

    Raises:
        UserError: with this process's problem, or the advice to read another process's output.
    """
    if on_any_process(bool(problem)):
        leave()
        raise errors.UserError(
            problem or "another process ended the run: its output says why", page=page
        )


def process() -> tuple[int, int]:
    """Return (number of this process, number of processes) without using a device."""
    return _service.global_state.process_id, _service.global_state.num_processes


def publish(name: str, text: str) -> None:
    """Publish a text under a new name for all processes, through the service."""
    _client().key_value_set(f"gpt3jax/{name}", text)


def receive(name: str, timeout: float) -> str | None:
    """Return the text published under a name; None if there is none within `timeout` seconds.

    A text that is already there is returned however short the time.
    """
    key = f"gpt3jax/{name}"
    try:
        return _client().blocking_key_value_get(key, max(int(1000 * timeout), 1))
    except jax.errors.JaxRuntimeError as error:
        _raise_unless_absent(error)
    # The service may have been too slow for the time that was left.
    try:
        return _client().key_value_try_get(key)
    except jax.errors.JaxRuntimeError as error:
        _raise_unless_absent(error)
    return None


def _raise_unless_absent(error: Exception) -> None:
    if "DEADLINE_EXCEEDED" not in str(error) and "NOT_FOUND" not in str(error):
        raise errors.TransientError(
            f"the first process cannot be reached: {error}", page="operations.md#by-symptom"
        ) from error


def gather(
    name: str, text: str, timeout: float, of: Collection[int] | None = None
) -> list[str | None]:
    """Return the texts of all processes in process 0, and an empty list in the others.

    None stands for a process that sent no text within `timeout` seconds, for all together, or that
    is not in `of`. Unlike a collective it cannot hang.
    """
    me, n = process()
    if n == 1:
        return [text]
    if me:
        publish(f"{name}/{me}", text)
        return []
    end = time.monotonic() + timeout
    senders = range(n) if of is None else of
    return [text] + [
        receive(f"{name}/{i}", end - time.monotonic()) if i in senders else None
        for i in range(1, n)
    ]


def raise_of_first(name: str, error: errors.UserError | None, timeout: float) -> None:
    """Raise the error of process 0, if it has one, in all processes; use each name once.

    Raises:
        UserError, TransientError: that error, or process 0 was silent for `timeout` seconds.
    """
    me, n = process()
    if n > 1 and me == 0:
        message = error and [isinstance(error, errors.TransientError), error.message, error.page]
        publish(name, json.dumps(message))
    elif n > 1:
        text = receive(name, timeout)
        if text is None:
            raise errors.TransientError(
                f"process {me} heard nothing from process 0 ({name}) for {timeout:.0f} s: look at "
                "its output",
                page="preflight.md#starting",
            )
        if message := json.loads(text):
            is_transient, reason, page = message
            kind = errors.TransientError if is_transient else errors.UserError
            error = kind(reason, page=page)
    if error is not None:
        leave()
        raise error


def text_of_first(name: str, make: Callable[[], str], timeout: float) -> str:
    """Return in all processes the text that `make` returns in process 0; use each name once.

    Raises:
        UserError, TransientError: what `make` raised, or process 0 was silent for so many seconds.
    """
    text, problem = "", None
    if process()[0] == 0:
        try:
            text = make()
        except errors.UserError as error:
            problem = error
    raise_of_first(f"{name}/problem", problem, timeout)
    if process()[1] == 1:
        return text
    if process()[0] == 0:
        publish(name, text)
        return text
    received = receive(name, timeout)
    if received is None:
        raise errors.TransientError(
            f"process 0 sent no {name} within {timeout:.0f} s: look at its output",
            page="operations.md#by-symptom",
        )
    return received


def post(name: str, text: str) -> None:
    """Publish a text under a name, in place of an earlier one."""
    _client().key_value_set(f"gpt3jax/{name}", text, allow_overwrite=True)


def posted(folder: str) -> dict[str, str]:
    """Return the texts published under names `folder/NAME`, by NAME."""
    prefix = f"gpt3jax/{folder}/"
    entries = _client().key_value_dir_get(prefix)
    return {name.removeprefix(prefix): text for name, text in entries}


def meet(name: str, timeout: float) -> None:
    """Wait until all processes call this; use each name once.

    Raises:
        TransientError: a process did not call it within `timeout` seconds.
    """
    if process()[1] == 1:
        return
    try:
        _client().wait_at_barrier(f"gpt3jax/{name}", int(1000 * timeout))
    except jax.errors.JaxRuntimeError as error:
        raise errors.TransientError(
            f"waiting for all processes ({name}): {error}", page="operations.md#by-symptom"
        ) from error


def leave() -> None:
    """Leave the service together: if process 0 just ended, JAX would abort the others."""
    if process()[1] == 1:
        return
    try:
        jax.distributed.shutdown()
    except RuntimeError:  # a process has ended already
        return


def _client() -> Any:
    return _service.global_state.client
