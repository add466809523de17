"""What a process of a run is doing, and how long it has spent on what. Imports no JAX.

One measurement serves the step time in the log, the watchdog, the search for slow processes and
the account of the run's time.
"""

import collections
import contextlib
import os
import pathlib
import statistics
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

START, RESTORE, COMPILE, EVALUATE, SAVE = "start", "restore", "compile", "evaluate", "save"
DATA, HOST, DEVICE = "wait for data", "host", "wait for devices"
STEPS = (DATA, HOST, DEVICE)
"""The phases that a step is made of; `HOST` is what Python does, dispatch included."""


class Doing(NamedTuple):
    """What a process does at a moment."""

    step: int
    phase: str
    seconds: float
    """How long it has been in this phase without a break."""


class StepEnd(NamedTuple):
    """What had been spent on steps, since the start of the process, when one was over."""

    step: int
    seconds: float
    own_seconds: float
    """Of these, not in waiting for devices: waiting for data, and Python's work."""


class Phases:
    """A clock that always runs in exactly one phase; other threads may read it."""

    def __init__(self, begun: float | None = None) -> None:
        """Start in `START`; `begun` is when, by `time.monotonic` (now, if not given)."""
        self._lock = threading.Lock()
        self._seconds: dict[str, float] = collections.defaultdict(float)
        self._phase = START
        self._since = time.monotonic() if begun is None else begun
        self._usual: collections.deque[float] = collections.deque(maxlen=20)
        self._at_step: StepEnd | None = None

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Be in a phase inside of this context, and then again in the one before."""
        before = self._phase
        self._enter(phase)
        try:
            yield
        finally:
            self._enter(before)

    def _enter(self, phase: str) -> None:
        with self._lock:
            now = time.monotonic()
            self._seconds[self._phase] += now - self._since
            self._phase, self._since = phase, now

    def seconds(self) -> dict[str, float]:
        """Return the seconds spent in each phase so far, the present one included."""
        with self._lock:
            found = dict(self._seconds)
            found[self._phase] = found.get(self._phase, 0.0) + time.monotonic() - self._since
        return found

    def doing(self) -> Doing:
        """Return what the process does now."""
        with self._lock:
            step = self._at_step.step if self._at_step else 0
            return Doing(step, self._phase, time.monotonic() - self._since)

    def stepped(self, step: int) -> None:
        """Note that a step is over."""
        seconds, before = self.seconds(), self._at_step
        steps = step_seconds(seconds)
        if before is not None:
            self._usual.append(steps - before.seconds)
        self._at_step = StepEnd(step, steps, steps - seconds.get(DEVICE, 0.0))

    def last_step(self) -> StepEnd | None:
        """Return how things stood when the last step was over; None before that."""
        return self._at_step

    def usual_step(self) -> float | None:
        """Return the median time of the last steps (seconds); None before there are two."""
        return statistics.median(self._usual) if self._usual else None


def step_seconds(seconds: dict[str, float]) -> float:
    """Return the time spent on steps, of the seconds of each phase."""
    return sum(seconds.get(phase, 0.0) for phase in STEPS)


def process_start() -> float:
    """Return when this process began, by `time.monotonic`; on Linux to 10 ms, elsewhere now."""
    try:
        fields = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        age = 0.0
    return time.monotonic() - age
