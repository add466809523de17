"""What process 0 records of its devices at chosen steps: a JAX profile, and their memory.

One process is enough to see where a step's time goes: all run the same program. The files of
several would have the same name where they share a host, and one would survive.
"""

import contextlib
import pathlib
from collections.abc import Mapping

import jax

from gpt3jax.config import schema


class Profile:
    """The profile of the steps `log.profile_steps`, and the memory after `log.profile_memory`."""

    def __init__(self, log: schema.Log, process: int):
        """Record nothing yet, and never in a process other than the first."""
        self._folder, (self._first, self._last) = log.dir, log.profile_steps
        self._memory_step = log.profile_memory
        if process:
            self._first = self._last = self._memory_step = 0
        self._running = False

    def before(self, step_number: int) -> None:
        """Start at the first of the steps, or between them if a run resumes there."""
        if self._first <= step_number <= self._last and not self._running:
            jax.profiler.start_trace(self._folder)
            self._running = True

    def step(self, step_number: int) -> contextlib.AbstractContextManager[object]:
        """Return what names a step in the profile, around its dispatch."""
        return jax.profiler.StepTraceAnnotation("train", step_num=step_number)

    def after(self, step_number: int, step_metrics: Mapping[str, jax.Array]) -> None:
        """Wait for a step whose files are due, and write them."""
        if step_number == self._last and self._running:
            jax.block_until_ready(step_metrics)
            self.close()
        if step_number == self._memory_step:
            jax.block_until_ready(step_metrics)
            jax.profiler.save_device_memory_profile(memory_file(self._folder, step_number))

    def close(self) -> None:
        """Write what was traced, in case the run ends before the last of the steps."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False


def memory_file(folder: str, step_number: int) -> str:
    """Return the file that has the memory of process 0's devices after a step."""
    return str(pathlib.Path(folder) / f"memory-step-{step_number}.prof")
