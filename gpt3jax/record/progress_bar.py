"""A progress bar over the steps of a run, where a terminal shows it."""

import sys
from typing import NoReturn

import tqdm


class ProgressBar:
    """A bar on stderr if that is a terminal; else nothing."""

    def __init__(self, start_step: int, end_step: int) -> None:
        """Show the bar at `start_step`."""
        self._bar: tqdm.tqdm[NoReturn] | None = None
        self._loss = self._rate = ""
        if sys.stderr.isatty():
            text = "{percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt}, ETA {remaining}{postfix}"
            self._bar = tqdm.tqdm(
                total=end_step, initial=start_step, bar_format=text, dynamic_ncols=True
            )

    def show_rate(self, text: str) -> None:
        """Show this text on the speed from the next step on."""
        self._rate = text

    def advance(self, step: int, loss: float | None = None) -> None:
        """Move to a step; without a loss the last one stays."""
        if self._bar is None:
            return
        if loss is not None:
            self._loss = f"loss {loss:.4f}, "
        self._bar.set_postfix_str((self._loss + self._rate).rstrip(", "), refresh=False)
        self._bar.update(step - self._bar.n)

    def refresh(self) -> None:
        """Draw the bar now."""
        if self._bar is not None:
            self._bar.refresh()

    def close(self) -> None:
        """Leave the bar as it is; a second call does nothing."""
        if self._bar is not None:
            self._bar.close()


def write_line(text: str) -> None:
    """Print a line to stdout at once, above the bar if there is one."""
    tqdm.tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()
