"""Stopping cleanly when the scheduler or the user asks for it."""

import contextlib
import signal
from typing import Any

import jax
from jax.experimental import multihost_utils


class Stop(contextlib.AbstractContextManager["Stop"]):
    """Turns SIGTERM and Ctrl-C into a request to stop after the step; a second Ctrl-C kills.

    With several processes, SIGTERM only: JAX's service passes it on to all of them.
    """

    def __init__(self) -> None:
        """No request yet."""
        self._asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        for number in (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ():
            self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        self._asked = True
        if number == signal.SIGINT:  # schedulers repeat SIGTERM, people insist
            signal.signal(number, signal.SIG_DFL)

    def requested(self, step_number: int) -> bool:
        """Tell whether any process was asked to stop; all processes get the same answer."""
        if jax.process_count() == 1:
            return self._asked
        return bool(multihost_utils.reached_preemption_sync_point(step_number))
