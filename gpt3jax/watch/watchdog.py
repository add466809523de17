"""Ends a process that hangs, after printing where: its stacks, its phase, and who is behind.

A hang is a phase that lasts longer than its limit: a multiple of the usual step for parts of a
step, a fixed time for phases that may take long. A thread looks at the clock of `phases`. If Python
itself is stuck and no thread runs, a timer of the interpreter ends the process instead.
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
        peers: stragglers.Peers,
        process: int,
        every: float,
    ):
        """Look at the clock each `every` seconds, unless `step_multiple` is 0."""
        self._options, self._clock, self._peers = options, clock, peers
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
            # Each look puts the timer off.
            faulthandler.dump_traceback_later(2 * self.limit(doing.phase), exit=True, file=2)
        faulthandler.cancel_dump_traceback_later()

    def _end(self, doing: phases.Doing) -> None:
        """Print what is known, and end the process with the status that asks for a retry."""
        sys.stderr.write(
            f"gpt3jax: hang: process {self._process} has been in '{doing.phase}' for "
            f"{doing.seconds:.0f} s after step {doing.step}, the limit is "
            f"{self.limit(doing.phase):.0f} s (--watchdog); its threads:\n"
        )
        sys.stderr.flush()
        faulthandler.dump_traceback(file=2)
        for line in self._peers.behind():
            sys.stderr.write(f"gpt3jax: hang: {line}\n")
        sys.stderr.flush()
        # The end of one ends the others, above all that of the first; all should print their lines.
        self._closed.wait((2 if self._process else 3) * self._every)
        os._exit(errors.RETRY)
