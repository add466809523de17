"""A profile of chosen steps."""

from typing import Any

import jax

from gpt3jax.config import schema


class Profile:
    """A JAX profile of the steps `log.profile_steps`, for TensorBoard or xprof."""

    def __init__(self, log: schema.Log):
        """Nothing is traced yet."""
        self._folder, (self._first, self._last) = log.dir, log.profile_steps
        self._running = False

    def before(self, step_number: int) -> None:
        """Start at the first of the steps, or inside of them where a run resumes there."""
        if self._first <= step_number <= self._last and not self._running:
            jax.profiler.start_trace(self._folder)
            self._running = True

    def after(self, step_number: int, step_metrics: Any) -> None:
        """Wait for the last of the steps and write the profile."""
        if step_number == self._last and self._running:
            jax.block_until_ready(step_metrics)
            self.close()

    def close(self) -> None:
        """Write what was traced; a run may end before the last of the steps."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
