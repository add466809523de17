"""Many points for a chart of few columns, such that no peak gets lost.

A column keeps the mean of its points, the least and the greatest. Values that are not finite count
for nothing; a column that has no other is NaN, and the line breaks there.
"""

import dataclasses

import numpy as np
from numpy import typing as npt

Array = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Columns:
    """Values of columns."""

    mean: Array
    low: Array
    high: Array


class Bins:
    """Points in the order of x, cut into columns of equal width in x; empty ones are left out."""

    def __init__(self, x: Array, n_columns: int) -> None:
        """Cut; with fewer points than columns each is a column of its own."""
        if len(x) <= n_columns:
            self._firsts = np.arange(len(x))
        else:
            width = (x[-1] - x[0]) / n_columns or 1.0
            column = np.minimum((x - x[0]) / width, n_columns - 1).astype(int)
            self._firsts = np.flatnonzero(np.diff(column, prepend=-1))

    def of(self, values: Array) -> Columns:
        """Return the columns of one value of each point."""
        if not len(self._firsts):
            return Columns(mean=values, low=values, high=values)
        finite = np.where(np.isfinite(values), values, np.nan)
        known = np.add.reduceat(np.isfinite(values).astype(float), self._firsts)
        with np.errstate(over="ignore"):
            sums = np.add.reduceat(np.nan_to_num(finite), self._firsts)
        low = np.fmin.reduceat(finite, self._firsts)
        high = np.fmax.reduceat(finite, self._firsts)
        mean = np.where(known > 0, sums / np.maximum(known, 1), np.nan)
        return Columns(mean=np.clip(mean, low, high), low=low, high=high)  # rounding may exceed
