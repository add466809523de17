"""Stopping cleanly when the scheduler or the user asks for it."""

import contextlib
import os
import signal
import types
from collections.abc import Callable
from typing import TypeAlias

import jax
from jax.experimental import multihost_utils

# Schedulers send SIGTERM, SIGUSR1, SIGUSR2 (LSF at its time limit; SGE) or SIGXCPU (LSF, SGE); a
# lost ssh session sends SIGHUP, Ctrl-C SIGINT.
_SIGNALS = (
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
    signal.SIGHUP,
    signal.SIGINT,
)
_Handler: TypeAlias = Callable[[int, types.FrameType | None], object] | int | None


class Stop(contextlib.AbstractContextManager["Stop"]):
    """Turns the signals of schedulers, of a lost terminal and of Ctrl-C into a request to stop.

    The run then stops after the step. A second Ctrl-C kills. Under nohup SIGHUP stays ignored. With
    several processes, the one that gets the signal sends itself SIGTERM: JAX watches for that, and
    its service passes the request on to all processes.
    """

    def __init__(self, lost: Callable[[], str] = lambda: "") -> None:
        """Have no request yet; a reason returned by `lost` is a request too."""
        self._requested, self._lost = False, lost
        self._before: dict[int, _Handler] = {}

    def __enter__(self) -> "Stop":
        alone = jax.process_count() == 1
        for number in _SIGNALS:
            is_jax_own = number == signal.SIGTERM and not alone
            is_nohup = number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN
            if not is_jax_own and not is_nohup:
                handler = self._note_request if alone else self._pass_on
                self._before[number] = signal.signal(number, handler)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note_request(self, number: int, frame: types.FrameType | None) -> None:
        self._requested = True
        self._kill_next_time(number)

    def _pass_on(self, number: int, frame: types.FrameType | None) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        self._kill_next_time(number)

    def _kill_next_time(self, number: int) -> None:
        if number == signal.SIGINT:  # schedulers repeat their signals, people insist
            signal.signal(number, signal.SIG_DFL)

    def requested(self, step_number: int) -> bool:
        """Return whether any process is to stop; all processes get the same answer."""
        if not self._requested and self._lost():
            self._requested = True
            if jax.process_count() > 1:
                os.kill(os.getpid(), signal.SIGTERM)
        if jax.process_count() == 1:
            return self._requested
        return bool(multihost_utils.reached_preemption_sync_point(step_number))
