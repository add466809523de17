"""A profile of chosen steps."""

from typing import Any

import jax

from gpt3jax import config


class Profile:
    """A JAX profile of the steps `log.profile_steps`, for TensorBoard or xprof."""

    def __init__(self, log: config.Log):
        """Nothing is traced yet."""
        self._folder, (self._first, self._last) = log.dir, log.profile_steps

    def before(self, step_number: int) -> None:
        """Start at the first of the steps."""
        if step_number == self._first:
            jax.profiler.start_trace(self._folder)

    def after(self, step_number: int, step_metrics: Any) -> None:
        """Wait for the last of the steps and write the profile."""
        if step_number == self._last:
            jax.block_until_ready(step_metrics)
            jax.profiler.stop_trace()
