"""Where the steps of a run are on each axis: steps, tokens, hours."""

import numpy as np

from gpt3jax.page import charts, decimation
from gpt3jax.report import run_folder

Array = decimation.Array
AXES = (
    charts.Axis(key="step", name="steps"),
    charts.Axis(key="tokens", name="tokens"),
    charts.Axis(key="hours", name="hours"),
)


class Positions:
    """The logged steps of a run on each axis, and any other step by interpolation."""

    def __init__(self, run: run_folder.Run) -> None:
        """Place the entries. Hours are real time since the first start, with gaps between starts.

        Entries of earlier versions have no time: theirs follows from the times of steps.
        """
        table = run.metrics.steps
        self._step = table["step"]
        self._places = {"step": self._step}
        if len(table) and np.isfinite(table["consumed_tokens"]).any():
            self._places["tokens"] = _filled(self._step, table["consumed_tokens"])
        if len(table):
            self._places["hours"] = _hours(run)
        self.has_all_times = bool(np.isfinite(table["time"]).all())

    @property
    def axes(self) -> set[str]:
        """Return the keys of the axes on which this run has places; without entries, steps."""
        return set(self._places)

    def entries(self) -> dict[str, Array]:
        """Return the places of the entries of steps."""
        return dict(self._places)

    def at(self, steps: Array) -> dict[str, Array]:
        """Return the places of other steps. Those outside of the entries are at the ends."""
        if not len(self._step):
            return {"step": steps}
        places = {key: np.interp(steps, self._step, place) for key, place in self._places.items()}
        return places | {"step": steps}


def _filled(step: Array, values: Array) -> Array:
    known = np.isfinite(values)
    return np.interp(step, step[known], values[known])


def _hours(run: run_folder.Run) -> Array:
    table = run.metrics.steps
    n_steps = np.diff(table["step"], prepend=0.0)
    seconds = np.nan_to_num(table["step_time"], posinf=0.0, neginf=0.0)
    on_steps = np.cumsum(np.maximum(n_steps * seconds, 0.0))
    known = np.isfinite(table["time"])
    if not known.any():
        return on_steps / 3600
    rows = np.arange(len(table))
    offset = np.interp(rows, rows[known], (table["time"] - on_steps)[known])
    moments = np.maximum.accumulate(on_steps + offset)
    began = min(run.starts[0].began if run.starts else moments[0], moments[0])
    return (moments - began) / 3600
