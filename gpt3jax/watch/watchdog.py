"""Ends a process that hangs, after it told where: its stacks, its phase, and who is behind.

A hang is a phase that lasts longer than a multiple of the usual step, or than a limit of its own
where a phase may take long. The clock of `phases` knows; a thread looks. Should Python itself be
stuck, so that no thread runs, a timer of the interpreter's ends the process in its place.
"""

import faulthandler
import os
import sys
import threading

from gpt3jax import errors
from gpt3jax.config import schema
from gpt3jax.watch import phases, stragglers


class Watchdog:
    """Watches the phases of this process from a thread."""

    def __init__(
        self,
        options: schema.Watchdog,
        clock: phases.Phases,
        others: stragglers.Peers,
        process: int,
        every: float,
    ):
        """Look every so many seconds, unless `step_multiple` is 0."""
        self._options, self._clock, self._others = options, clock, others
        self._process, self._every = process, every
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        if options.step_multiple:
            self._thread.start()

    def close(self) -> None:
        """Watch no more."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def limit(self, phase: str) -> float:
        """Return how long a phase may last (seconds)."""
        usual = self._clock.usual_step()
        if phase not in phases.STEPS or usual is None:
            return self._options.slow_phase_seconds
        return max(self._options.min_seconds, self._options.step_multiple * usual)

    def _run(self) -> None:
        while not self._closed.wait(self._every):
            doing = self._clock.doing()
            left = self.limit(doing.phase) - doing.seconds
            if left < 0:
                self._end(doing)
            faulthandler.dump_traceback_later(
                2 * self.limit(doing.phase), exit=True, file=2
            )  # each look puts it off
        faulthandler.cancel_dump_traceback_later()

    def _end(self, doing: phases.Doing) -> None:
        """Tell what is known, and end the process with the status that is worth a retry."""
        told = f"in '{doing.phase}' for {doing.seconds:.0f} s after step {doing.step}"
        sys.stderr.write(
            f"gpt3jax: hang: process {self._process} has been {told}, the limit is "
            f"{self.limit(doing.phase):.0f} s (--watchdog); its threads:\n"
        )
        sys.stderr.flush()
        faulthandler.dump_traceback(file=2)
        for line in self._others.behind():
            sys.stderr.write(f"gpt3jax: hang: {line}\n")
        sys.stderr.flush()
        # The first process goes last: the others are ended by its absence, and should tell before.
        self._closed.wait(0 if self._process else 2 * self._every)
        os._exit(errors.RETRY)
