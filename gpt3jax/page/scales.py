"""Axes of charts: where their ticks are, and what stands beside them."""

import dataclasses
import datetime
import math

_TIME_STEPS = (
    1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 10_800, 21_600, 43_200, 86_400, 172_800,
    604_800, 1_209_600, 2_592_000,
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """A stretch of numbers along an axis, in equal steps or, if `log`, in equal factors."""

    low: float
    high: float
    log: bool = False

    def share(self, value: float) -> float:
        """Return where a value is: 0 at `low`, 1 at `high`."""
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(max(value, 1e-300))
        return (at - low) / (high - low)

    def ticks(self, at_most: int) -> list[float]:
        """Return round numbers in this stretch."""
        if not self.log:
            return _linear(self.low, self.high, at_most)
        for factors in ((1, 2, 3, 5), (1, 3), (1,)):
            found = _logarithmic(self.low, self.high, factors)
            if 3 <= len(found) <= at_most:
                return found
        if len(found) > at_most:
            return found[:: -(-len(found) // at_most)]
        return _linear(self.low, self.high, at_most)


def around(low: float, high: float, *, log: bool = False) -> Scale:
    """Return a scale with a margin around values."""
    if log and low > 0:
        margin = max((high / low) ** 0.05, 1.02)
        return Scale(low=low / margin, high=high * margin, log=True)
    margin = 0.05 * (high - low) or max(abs(high) * 0.05, 1e-9)
    return Scale(low=0.0 if 0 <= low < margin * 4 else low - margin, high=high + margin)


def _linear(low: float, high: float, at_most: int) -> list[float]:
    step = _round_step((high - low) / at_most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _round_step(least: float) -> float:
    """Return the smallest of 1, 2, 5, 10, 20, 50, ... that is not below `least`."""
    size = 10.0 ** math.floor(math.log10(least))
    return next(size * factor for factor in (1, 2, 5, 10, 20) if size * factor >= least * 0.999)


def _logarithmic(low: float, high: float, factors: tuple[int, ...]) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = (factor * 10.0**power for power in powers for factor in factors)
    return [tick for tick in ticks if low <= tick <= high]


def short(value: float) -> str:
    """Return a number for a narrow place: 2.5K, 12M, 0.002, 3e-05."""
    size = abs(value)
    for unit, least in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if size >= least * 0.99999:
            return f"{value / least:.4g}{unit}" if size < 1e15 else f"{value:.2g}"
    if size == 0 or size >= 1e-3:
        return f"{value:.4g}"
    return f"{value:.2g}"


def time_ticks(began: float, ended: float, at_most: int) -> list[tuple[float, str]]:
    """Return round moments (Unix time, UTC) and their names."""
    wanted = (ended - began) / at_most
    step = next(
        (step for step in _TIME_STEPS if step >= wanted), math.ceil(wanted / 86_400) * 86_400
    )
    form = "%H:%M:%S" if step < 60 else "%H:%M" if step < 43_200 else "%d %b"
    moments = range(math.ceil(began / step) * step, math.floor(ended) + 1, step)
    return [(moment, utc(moment).strftime(form)) for moment in moments]


def utc(moment: float) -> datetime.datetime:
    """Return a Unix time as a date."""
    return datetime.datetime.fromtimestamp(moment, datetime.UTC)
