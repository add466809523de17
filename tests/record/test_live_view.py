"""The live view: as wide as the terminal, below all that is printed, and nowhere else."""

import io
import math
import os
import re
import sys

import pytest

from gpt3jax.record import live_view

LONG = " iteration 7 | " + "elapsed time per iteration (ms): 74.0 | " * 6
TOKENS = re.compile(r"\x1b\[[?\d;]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+")


class Terminal(io.StringIO):
    """A terminal that wraps lines, and wraps them anew when it is resized, as most do."""

    encoding = "utf-8"

    def __init__(self, width):
        super().__init__()
        self.width, self.row, self.column = width, 0, 0
        self.rows, self.is_continued = [""], [False]
        self.shows_cursor = True

    def isatty(self):
        """Be a terminal."""
        return True

    def write(self, string):
        """Show characters, and do what control codes say."""
        for token in TOKENS.findall(string):
            self._take(token)
        return len(string)

    def _take(self, token):
        if token in ("\r", "\n"):
            self.column = 0
            if token == "\n":
                self._down(is_continued=False)
        elif token == "\x1b[2K":
            self.rows[self.row], self.is_continued[self.row] = "", False
        elif token == "\x1b[1A":
            self.row -= 1
        elif token in ("\x1b[?25h", "\x1b[?25l"):
            self.shows_cursor = token[-1] == "h"
        elif token[0] == "\x1b":
            pass  # colours
        else:
            for character in token:
                self._put(character)

    def _put(self, character):
        if self.column == self.width:
            self._down(is_continued=True)
            self.column = 0
        self.rows[self.row] = self.rows[self.row][: self.column].ljust(self.column) + character
        self.column += 1

    def _down(self, is_continued):
        self.row += 1
        if self.row == len(self.rows):
            self.rows.append("")
            self.is_continued.append(False)
        self.is_continued[self.row] = is_continued

    def resize(self, width):
        """Become narrower or wider."""
        lines, above = [], slice(self.row + 1)
        for row, is_continued in zip(self.rows[above], self.is_continued[above], strict=True):
            lines = [*lines[:-1], lines[-1] + row] if is_continued else [*lines, row]
        self.width, self.row, self.column, self.rows, self.is_continued = width, 0, 0, [""], [False]
        self.write("\n".join(lines))


def open_terminal(monkeypatch, width=80):
    """Make stdout and stderr a terminal; what a fixture sets pytest's capture would replace."""
    monkeypatch.setenv("TERM", "xterm")
    for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    screen = Terminal(width)
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(os, "get_terminal_size", lambda *_: os.terminal_size((screen.width, 24)))
    monkeypatch.setattr(live_view, "_PAUSE", 0.0)
    return screen


def advance(view, *steps):
    for step in steps:
        view.advance(step, 4 + 4 * math.exp(-step / 50), 1e-3 * step / 400)


@pytest.mark.parametrize("width", [80, 40, 12])
def test_no_line_is_wider_than_the_terminal_and_none_is_left_behind(monkeypatch, width):
    terminal = open_terminal(monkeypatch, width)
    view = live_view.LiveView(0, 1000)
    view.show_speed(6_900.0, 1e5)
    advance(view, *range(1, 401))
    fields = "step 400/1,000  40%  loss 4.0013  learning rate 1.00e-03  6.90K tokens/s  ETA 1d03h"
    assert not any(terminal.is_continued) and terminal.rows[-1] == ""
    if width == 12:
        assert [row[:8] for row in terminal.rows[3:5]] == ["step 400", "loss 4.0"]
        return
    assert " ".join(terminal.rows[3:-1]).split() == fields.split()
    high, _, low = (row.split()[-1] for row in terminal.rows[:3])
    assert (high, low) == ("7.92", "4.00")


@pytest.mark.parametrize("width", [40, 132])
def test_a_resized_terminal_has_the_view_once_below_what_was_printed(monkeypatch, width):
    terminal = open_terminal(monkeypatch)
    view = live_view.LiveView(0, 1000)
    view.write_line("before")
    advance(view, *range(1, 301))
    terminal.resize(width)
    advance(view, 301)
    assert terminal.rows[0] == "before" and not any(terminal.is_continued)
    assert sum("step" in row for row in terminal.rows) == 1
    n_rows = 6 if width == 40 else 5  # of the line before, the curve and the fields
    assert all(terminal.rows[:n_rows]) and not any(terminal.rows[n_rows:])
    terminal.resize(80)
    view.write_line("after")
    view.close()
    assert terminal.rows[:2] == ["before", "after"]
    assert sum("step" in row for row in terminal.rows) == 1


def test_lines_longer_than_the_terminal_stay_whole_above_the_view(monkeypatch):
    terminal = open_terminal(monkeypatch, 40)
    view = live_view.LiveView(0, 100)
    advance(view, 1, 2)
    view.write_line(LONG)
    advance(view, 3)
    sys.stderr.write("a library's warning\n")
    sys.stdout.write("printed by others\n")
    advance(view, 4)
    view.close()
    whole = "".join(terminal.rows)
    assert whole.startswith(LONG) and len(terminal.rows[0]) == 40
    assert terminal.rows.count("a library's warning") == 1
    assert whole.count("step ") == 1 and whole.index("printed by others") < whole.index("step 4")
    assert sys.stdout is terminal and sys.stderr is terminal


def test_the_last_view_stays_and_the_cursor_is_below_it_and_visible(monkeypatch):
    terminal = open_terminal(monkeypatch)
    view = live_view.LiveView(10, 12)
    advance(view, 11)
    assert terminal.shows_cursor  # a process that is killed now leaves it so
    advance(view, 12)
    view.close()
    view.close()
    assert terminal.rows[-2].startswith("step 12/12 100%  loss") and "ETA" not in terminal.rows[-2]
    assert terminal.rows[-1] == "" and terminal.row == len(terminal.rows) - 1
    assert terminal.shows_cursor


def test_nothing_is_drawn_before_the_first_step(monkeypatch):
    terminal = open_terminal(monkeypatch)
    view = live_view.LiveView(0, 100)
    view.write_line("compiling")
    view.close()
    assert terminal.rows == ["compiling", ""]


def test_a_pipe_gets_lines_alone(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes every file for a terminal
    monkeypatch.setattr(sys, "stdout", pipe := io.StringIO())
    view = live_view.LiveView(0, 100)
    advance(view, 1)
    view.write_line(LONG)
    advance(view, 100)
    view.close()
    assert not view.is_shown and pipe.getvalue() == f"{LONG}\n"


def test_a_terminal_that_cannot_redraw_gets_lines_alone(monkeypatch):
    terminal = open_terminal(monkeypatch)
    monkeypatch.setenv("TERM", "dumb")
    view = live_view.LiveView(0, 100)
    advance(view, 1)
    view.write_line("saved")
    view.close()
    assert not view.is_shown and terminal.rows == ["saved", ""]


def test_the_curve_falls_as_the_loss_does():
    curve = live_view.Curve()
    for value in (8.0, 6.0, 4.0, 2.0):
        curve.add(value)
    assert curve.rows(40, 2) == ["█▃   8.00", "██▆▁ 2.00"]
    assert curve.rows(7, 2) == ["█  8.00", "█▁ 2.00"]  # two steps a column


def test_a_curve_of_many_steps_takes_bounded_memory_and_keeps_its_ends():
    curve = live_view.Curve()
    for step in range(100_000):
        curve.add(10 - 9 * step / 99_999)
    assert len(curve._means) < 2 * live_view._MAX_POINTS
    top, _, bottom = curve.rows(60, 3)
    assert len(top) == 60 and float(top.split()[-1]) > 9.9
    assert 1.0 <= float(bottom.split()[-1]) < 1.1


def test_losses_that_are_not_finite_leave_a_gap():
    curve = live_view.Curve()
    assert curve.rows(40, 3) == []
    for value in (math.nan, 3.0, math.inf, 1.0, math.nan):
        curve.add(value)
    *_, bottom = curve.rows(40, 3)
    assert bottom == " █ ▁  1.00"


def test_a_loss_that_never_changes_is_drawn():
    curve = live_view.Curve()
    curve.add(3.0)
    curve.add(3.0)
    assert curve.rows(40, 2) == ["   3.00", "▁▁ 3.00"]
