"""A live view of a run below the lines on a terminal: progress, the loss so far, rates, time left.

It is drawn only where stdout is a terminal, so nothing of it reaches a pipe or a file.
"""

import itertools
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence

from rich import console, control, live, text
from rich.segment import ControlType

from gpt3jax.record import console_line

_PAUSE = 0.1  # seconds between two drawings; more of them show no more
_CURVE_ROWS = 3
_MAX_POINTS = 1024
_BLOCKS = " ▁▂▃▄▅▆▇█"


class Curve:
    """A value over the steps so far, in bounded memory: means over equal numbers of steps."""

    def __init__(self) -> None:
        """Have no value yet."""
        self._means: list[float] = []
        self._last: list[float] = []  # not yet enough for a mean
        self._steps_per_mean = 1

    def add(self, value: float) -> None:
        """Add the value of the next step; one that is not finite counts for nothing."""
        self._last.append(value)
        if len(self._last) == self._steps_per_mean:
            self._means.append(_finite_mean(self._last))
            self._last = []
        if len(self._means) == 2 * _MAX_POINTS:
            self._means = _binned(self._means, _MAX_POINTS)
            self._steps_per_mean *= 2

    def rows(self, width: int, height: int) -> list[str]:
        """Return the curve in block characters, at most `width` columns with its labels.

        The labels, at the right, are its highest and its lowest value. No value gives no rows.
        """
        finite = [mean for mean in self._means if math.isfinite(mean)]
        if not finite:
            return []
        labels = [f" {max(finite):.2f}", *[""] * (height - 2), f" {min(finite):.2f}"]
        columns = max(1, width - max(map(len, labels)))
        means = _binned(self._means, min(columns, len(self._means)))
        heights = _heights(means, 8 * height)
        return [
            "".join(_BLOCKS[min(max(h - 8 * row, 0), 8)] for h in heights) + label
            for row, label in zip(reversed(range(height)), labels, strict=True)
        ]


def _binned(values: Sequence[float], n: int) -> list[float]:
    """Return the means of n stretches of values, of equal length but for one value."""
    bounds = [i * len(values) // n for i in range(n + 1)]
    return [_finite_mean(values[a:b]) for a, b in itertools.pairwise(bounds)]


def _finite_mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return statistics.fmean(finite) if finite else math.nan


def _heights(values: Sequence[float], top: int) -> list[int]:
    """Return values as heights from 1 (the lowest) to `top`; 0 for those that are not finite."""
    finite = [value for value in values if math.isfinite(value)]
    low, span = min(finite), (max(finite) - min(finite)) or 1.0
    return [
        1 + round((value - low) / span * (top - 1)) if math.isfinite(value) else 0
        for value in values
    ]


class LiveView:
    """The view, where stdout is a terminal; else it draws nothing and lines are only printed.

    Attributes:
        is_shown: whether stdout is a terminal that can redraw lines.
    """

    def __init__(self, start_step: int, end_step: int) -> None:
        """Draw nothing before the first step, whose compilation may print lines of its own."""
        self._step, self._end_step = start_step, end_step
        self._curve, self._loss, self._learning_rate = Curve(), math.nan, math.nan
        self._speed: list[str] = []
        self._end_time = math.inf
        self._widths: list[int] = []
        self._drawn = -math.inf
        self._is_closing = False
        self._console = console.Console(highlight=False)
        self.is_shown = sys.stdout.isatty() and self._console.is_interactive
        self._live = live.Live(
            get_renderable=lambda: self,
            console=self._console,
            auto_refresh=False,
            redirect_stderr=sys.stderr.isatty(),
        )

    def show_speed(self, tokens_per_second: float, seconds: float) -> None:
        """Show the speed, and the time that the rest of the run takes, from the next step on."""
        self._speed = [f"{console_line.short_count(tokens_per_second)} tokens/s"]
        self._end_time = time.monotonic() + seconds

    def advance(self, step: int, loss: float, learning_rate: float) -> None:
        """Move to a step."""
        self._step, self._loss, self._learning_rate = step, loss, learning_rate
        self._curve.add(loss)
        if not self.is_shown:
            return
        if not self._live.is_started:
            self._live.start()
            self._console.show_cursor()  # a killed process could not bring it back
        now = time.monotonic()
        if now - self._drawn >= _PAUSE or step == self._end_step:
            self._drawn = now
            self._erase_wrapped_rows()
            self._live.refresh()

    def write_line(self, line: str) -> None:
        """Print a line to stdout at once, above the view."""
        if self._live.is_started:
            self._erase_wrapped_rows()
            self._console.print(text.Text(line), soft_wrap=True)
        else:
            sys.stdout.write(line + "\n")
            sys.stdout.flush()

    def close(self) -> None:
        """Leave the last view on the terminal; a second call does nothing."""
        if self._live.is_started:
            self._is_closing = True
            self._erase_wrapped_rows()
            self._live.stop()

    def _erase_wrapped_rows(self) -> None:
        """Erase the rows that became more because the terminal became narrower; Live does not."""
        width = self._console.width
        n_more = sum(max(0, (drawn - 1) // width) for drawn in self._widths)
        erase_and_go_up = [(ControlType.ERASE_IN_LINE, 2), (ControlType.CURSOR_UP, 1)] * n_more
        self._console.control(control.Control(ControlType.CARRIAGE_RETURN, *erase_and_go_up))
        self._widths = []

    def __rich_console__(
        self, _: console.Console, options: console.ConsoleOptions
    ) -> Iterator[text.Text]:
        """Yield the view's lines, and an empty one, where the cursor waits: what others print."""
        lines = self._lines(options.max_width, with_curve=not options.ascii_only)
        self._widths = [len(line) for line in lines]
        for line in lines if self._is_closing else [*lines, ""]:
            yield text.Text(line, no_wrap=True)

    def _lines(self, width: int, *, with_curve: bool) -> list[str]:
        """Return the lines of the view, none of them wider than `width`."""
        share = self._step / self._end_step if self._end_step else 1.0
        progress = f"step {self._step:,}/{self._end_step:,} {100 * share:3.0f}%"
        rate = f"learning rate {self._learning_rate:.2e}"
        fields = [f"loss {self._loss:.4f}", rate, *self._speed]
        left = self._end_time - time.monotonic()
        if math.isfinite(left) and self._step < self._end_step:
            fields.append(f"ETA {console_line.duration(left)}")
        curve = self._curve.rows(width, _CURVE_ROWS) if with_curve else []
        return [line[:width] for line in [*curve, *_packed([progress, *fields], width)]]


def _packed(fields: Sequence[str], width: int) -> list[str]:
    """Return fields in as few lines of this width as they need."""
    lines = [fields[0]]
    for field in fields[1:]:
        if len(lines[-1]) + 2 + len(field) <= width:
            lines[-1] += f"  {field}"
        else:
            lines.append(field)
    return lines
