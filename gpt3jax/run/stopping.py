"""Stopping cleanly when the scheduler or the user asks for it."""

import contextlib
import os
import signal
from collections.abc import Callable
from typing import Any

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


class Stop(contextlib.AbstractContextManager["Stop"]):
    """Turns the signals of schedulers, of a lost terminal and Ctrl-C into a request to stop.

    A run stops after the step. A second Ctrl-C kills. Under nohup SIGHUP stays ignored. With
    several processes one that is asked tells JAX's service, which watches for SIGTERM and asks all
    of them.
    """

    def __init__(self, lost: Callable[[], str] = lambda: "") -> None:
        """No request yet; `lost` asks for one when it returns a reason."""
        self._asked, self._lost = False, lost
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        alone = jax.process_count() == 1
        for number in _SIGNALS:
            is_jax_own = number == signal.SIGTERM and not alone
            is_nohup = number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN
            if not is_jax_own and not is_nohup:
                self._before[number] = signal.signal(number, self._ask if alone else self._pass_on)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        self._asked = True
        self._kill_next_time(number)

    def _pass_on(self, number: int, frame: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        self._kill_next_time(number)

    def _kill_next_time(self, number: int) -> None:
        if number == signal.SIGINT:  # schedulers repeat their signals, people insist
            signal.signal(number, signal.SIG_DFL)

    def requested(self, step_number: int) -> bool:
        """Tell whether any process was asked to stop; all processes get the same answer."""
        if not self._asked and self._lost():
            self._asked = True
            if jax.process_count() > 1:
                os.kill(os.getpid(), signal.SIGTERM)
        if jax.process_count() == 1:
            return self._asked
        return bool(multihost_utils.reached_preemption_sync_point(step_number))
