"""Where the steps of a run are on each axis: steps, tokens, real time."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gpt3jax.page import decimation
from gpt3jax.report import run_folder

Array = decimation.Array
STEP, TOKENS, TIME = "step", "tokens", "time"


class Unit(NamedTuple):
    """A unit of time."""

    name: str
    seconds: float


def unit_of(seconds: float) -> Unit:
    """Return the unit in which a length of time is a handy number."""
    if seconds < 3 * 3600:
        return Unit("minutes", 60.0)
    return Unit("hours", 3600.0) if seconds < 4 * 86_400 else Unit("days", 86_400.0)


class Positions:
    """The logged steps of a run on each axis, and any other step by interpolation."""

    def __init__(self, run: run_folder.Run) -> None:
        """Place the entries. Time is real time since the first start, pauses included.

        Entries of earlier versions have no time: theirs follows from the times of steps.
        """
        table = run.metrics.steps
        self._step = table["step"]
        self._places = {STEP: self._step}
        if len(table):
            known = np.isfinite(table["consumed_tokens"])
            if known.any():
                tokens = table["consumed_tokens"][known]
                self._places[TOKENS] = np.interp(self._step, self._step[known], tokens)
            moments = _moments(run)
            self._began = min([moments[0], *(start.began for start in run.starts[:1])])
            self._places[TIME] = moments - self._began
        self._unit = 1.0

    @property
    def axes(self) -> set[str]:
        """Return the keys of the axes on which this run has places; without entries, steps."""
        return set(self._places)

    @property
    def seconds(self) -> float:
        """Return the time from the first start to the last entry."""
        return float(self._places[TIME][-1])

    def use(self, unit: Unit) -> None:
        """Give times in a unit from now on."""
        self._unit = unit.seconds

    def at(self, steps: Array) -> dict[str, Array]:
        """Return the places of steps. Those outside of the entries are at their ends."""
        if not len(self._step):
            return {STEP: steps}
        places = {key: np.interp(steps, self._step, place) for key, place in self._places.items()}
        return places | {STEP: steps, TIME: places[TIME] / self._unit}

    def of_moment(self, moment: float) -> float:
        """Return the place in time of a moment (Unix time)."""
        return (moment - self._began) / self._unit


def _moments(run: run_folder.Run) -> Array:
    """Return when each entry was written: Unix time, or if no entry has it, seconds of steps."""
    table = run.metrics.steps
    n_steps = np.diff(table["step"], prepend=0.0)
    seconds = np.nan_to_num(table["step_time"], posinf=0.0, neginf=0.0)
    on_steps = np.cumsum(np.maximum(n_steps * seconds, 0.0))
    known = np.isfinite(table["time"])
    if not known.any():
        return on_steps + (run.starts[0].began if run.starts else 0.0)
    rows = np.arange(len(table))
    offset = np.interp(rows, rows[known], (table["time"] - on_steps)[known])
    return np.maximum.accumulate(on_steps + offset)


def common_axes(places: Sequence[Positions]) -> list[tuple[str, str]]:
    """Return (key, name) of the axes on which all runs have places; set their unit of time."""
    unit = unit_of(max(place.seconds for place in places))
    for place in places:
        place.use(unit)
    keys = set.intersection(*(place.axes for place in places))
    names = {STEP: "steps", TOKENS: "tokens", TIME: unit.name}
    return [(key, name) for key, name in names.items() if key in keys]
