"""The clock of a process: what it is doing, and how long it has spent on what. Imports no JAX.

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

START, RESTORE, COMPILE, MOVE = "start", "restore", "compile", "move"
EVALUATE, SAVE = "evaluate", "save"
DATA, HOST, DEVICE = "wait for data", "host", "wait for devices"
STEPS = (DATA, HOST, DEVICE)
"""The phases that a step is made of."""
MEANINGS = {
    START: "Starting: imports, joining the other processes, checks, opening the corpus.",
    RESTORE: "Reading the checkpoint that the run goes on from.",
    COMPILE: "Compiling the step, and waiting for processes that still compile.",
    MOVE: "Moving the state to the layout of another batch size.",
    DATA: "Steps: waiting for the next batch.",
    HOST: "Steps: Python's own work, dispatch included.",
    DEVICE: "Steps: waiting for the devices.",
    EVALUATE: "Evaluating on the validation and the test split.",
    SAVE: "Saving checkpoints, as far as training waits for it.",
}


class Doing(NamedTuple):
    """What a process is doing at a moment."""

    step: int
    """The last step that is over."""
    phase: str
    seconds: float
    """How long the process has been in this phase without a break."""


class StepEnd(NamedTuple):
    """The time that all steps since the start of the process took, up to the end of a step."""

    step: int
    seconds: float
    own_seconds: float
    """The part of `seconds` outside of devices: waiting for data, and Python's work."""


class Phases:
    """A clock that always runs in exactly one phase; other threads may read it."""

    def __init__(self, begun: float | None = None) -> None:
        """Start in `START`, at the time `begun` of `time.monotonic` (by default now)."""
        self._lock = threading.Lock()
        self._seconds: dict[str, float] = collections.defaultdict(float)
        self._phase = START
        self._since = time.monotonic() if begun is None else begun
        self._step_times: collections.deque[float] = collections.deque(maxlen=20)
        self._last_step: StepEnd | None = None

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Be in a phase inside of this context, and then in the phase before again."""
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
            seconds = dict(self._seconds)
            seconds[self._phase] = seconds.get(self._phase, 0.0) + time.monotonic() - self._since
        return seconds

    def doing(self) -> Doing:
        """Return what the process is doing now."""
        with self._lock:
            step = self._last_step.step if self._last_step else 0
            return Doing(step, self._phase, time.monotonic() - self._since)

    def stepped(self, step: int) -> None:
        """Note that a step is over."""
        seconds, before = self.seconds(), self._last_step
        on_steps = step_seconds(seconds)
        if before is not None:
            self._step_times.append(on_steps - before.seconds)
        self._last_step = StepEnd(step, on_steps, on_steps - seconds.get(DEVICE, 0.0))

    def last_step(self) -> StepEnd | None:
        """Return the end of the last step; None before the first."""
        return self._last_step

    def usual_step(self) -> float | None:
        """Return the median time of the last 20 steps (seconds); None before there are two."""
        return statistics.median(self._step_times) if self._step_times else None


def step_seconds(seconds: dict[str, float]) -> float:
    """Return the time spent on steps, from the seconds of each phase."""
    return sum(seconds.get(phase, 0.0) for phase in STEPS)


def process_start() -> float:
    """Return when this process began, by `time.monotonic`: to 10 ms on Linux, elsewhere now."""
    try:
        fields = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        age = 0.0
    return time.monotonic() - age
