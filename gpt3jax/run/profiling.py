"""A JAX profile of chosen steps."""

from collections.abc import Mapping

import jax

from gpt3jax.config import schema


class Profile:
    """The profile of the steps `log.profile_steps`, for TensorBoard or xprof."""

    def __init__(self, log: schema.Log):
        """Trace nothing yet."""
        self._folder, (self._first, self._last) = log.dir, log.profile_steps
        self._running = False

    def before(self, step_number: int) -> None:
        """Start at the first of the steps, or between them if a run resumes there."""
        if self._first <= step_number <= self._last and not self._running:
            jax.profiler.start_trace(self._folder)
            self._running = True

    def after(self, step_number: int, step_metrics: Mapping[str, jax.Array]) -> None:
        """Wait for the last of the steps, then write the profile."""
        if step_number == self._last and self._running:
            jax.block_until_ready(step_metrics)
            self.close()

    def close(self) -> None:
        """Write what was traced, in case the run ends before the last of the steps."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
