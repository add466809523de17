"""Numerical faults of steps: what counts as one, what is done, and what is kept of it.

A gradient or loss that is not finite never changes a weight; a spike is a loss above a limit that
comes from the losses before. Both are decided from numbers that all processes have alike.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gpt3jax import errors
from gpt3jax.config import schema
from gpt3jax.data import skipping
from gpt3jax.record import metrics


class Faults:
    """Judges steps in order, and knows the losses that the next limits come from."""

    def __init__(self, cfg: schema.Config, names: Sequence[str]) -> None:
        """Nothing was seen yet; `names` are those of the arrays that have gradient norms."""
        self._cfg, self._names = cfg, tuple(names)
        self._losses: list[tuple[int, float]] = []
        self._skipped_in_row = 0

    def as_json(self) -> dict[str, Any]:
        """Return what a run that goes on from here needs."""
        losses = [[number, loss] for number, loss in self._losses]
        return {"losses": losses, "skipped_in_row": self._skipped_in_row}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on from what `as_json` gave; from nothing if it is empty.

        While spikes are off no loss is kept: the next limits must not come from those before.
        """
        losses = saved.get("losses", ()) if self._cfg.faults.spike != "off" else ()
        self._losses = [(int(number), float(loss)) for number, loss in losses]
        self._skipped_in_row = int(saved.get("skipped_in_row", 0))

    def loss_limit(self, step_number: int) -> float:
        """Return the loss above which this step is a spike; infinity if spikes are off.

        It comes from the successful steps up to two before: the one before may not be read yet, and
        the limit must not depend on that. Infinity while they are fewer than the window.
        """
        f = self._cfg.faults
        known = [loss for number, loss in self._losses if number <= step_number - 2]
        window = known[-f.spike_window :]
        if f.spike == "off" or len(window) < f.spike_window:
            return math.inf
        mean = math.fsum(window) / len(window)
        variance = math.fsum((loss - mean) ** 2 for loss in window) / len(window)
        return float(np.float32(mean + f.spike_deviations * math.sqrt(variance)))

    def step_args(self, step_number: int) -> tuple[np.float32, ...]:
        """Return what the training step takes besides state and batch, to skip spikes itself."""
        if not self._cfg.faults.limits_loss:
            return ()
        return (np.float32(self.loss_limit(step_number)),)

    def note(self, step_number: int, values: Mapping[str, float]) -> None:
        """Take a step's loss, if the step was successful, into the next limits."""
        if not values["skipped"] and self._cfg.faults.spike != "off":
            self._losses.append((step_number, values["loss"]))
            del self._losses[: -self._cfg.faults.spike_window - 1]

    def judge(
        self,
        position: tuple[int, int],
        size: int,
        values: Mapping[str, float],
        norms: Sequence[float],
        recorder: metrics.Recorder,
    ) -> bool:
        """Tell and keep what was wrong with the step that ended at (step, samples), if anything.

        `values` has its `loss, grad_norm, loss_scale, skipped`. Return whether it was a spike.

        Raises:
            UserError: the policy is to stop, or too many steps were skipped in a row.
        """
        step_number, limit = position[0], self.loss_limit(position[0])
        finite = math.isfinite(values["grad_norm"]) and math.isfinite(values["loss"])
        spike = finite and values["loss"] > limit
        self.note(step_number, values)
        if not finite and _is_expected(self._cfg.precision, values):
            return False
        self._skipped_in_row = self._skipped_in_row + 1 if values["skipped"] else 0
        if finite and not spike:
            return False
        policy = self._cfg.faults.spike if spike else self._cfg.faults.nonfinite
        told = _spike(values, limit) if spike else _nonfinite(values)
        entry = self._entry(position, size, values, norms)
        entry |= {"fault": "spike" if spike else "not finite", "policy": policy}
        file = recorder.record_fault(step_number, entry | {"loss_limit": limit})
        told = f"step {step_number}: {told}"
        kept = f"; see {file}" if file else ""
        self._stop_if_asked(policy, told, kept)
        done = "its update was left out" if values["skipped"] else "its update was applied"
        recorder.say(f"WARNING: {told}; {done}{kept}")
        return spike

    def _stop_if_asked(self, policy: str, told: str, kept: str) -> None:
        if policy == "stop":
            raise errors.UserError(
                f"{told}; nothing was saved since. Resume from the last checkpoint with a lower "
                "optimizer.peak_lr, a longer warm-up or float32, look for damaged tokens in the "
                "samples of this step, or leave samples out with data.skip_samples" + kept
            )
        n, most = self._skipped_in_row, self._cfg.faults.max_skipped_steps
        if policy == "skip" and n >= most:
            raise errors.UserError(
                f"{told}; {n} steps in a row were skipped, and faults.max_skipped_steps={most}: "
                "the fault does not pass by itself. Resume from an older checkpoint, with a lower "
                "optimizer.peak_lr or without these samples (data.skip_samples)" + kept
            )

    def _entry(
        self,
        position: tuple[int, int],
        size: int,
        values: Mapping[str, float],
        norms: Sequence[float],
    ) -> dict[str, Any]:
        step_number, samples = position
        stream = skipping.from_config(self._cfg.data)
        taken = stream.n_kept(samples)
        numbers = stream.numbers(np.arange(taken - size, taken))
        cuts = np.flatnonzero(np.diff(numbers) > 1) + 1
        parts = [(int(part[0]), int(part[-1]) + 1) for part in np.split(numbers, cuts)]
        show = f"python -m gpt3jax.data.inspect --config {self._cfg.log.dir}/config.json --samples "
        names = ("loss", "grad_norm", "loss_scale", "skipped")
        return {
            "step": step_number,
            "samples": [f"{first}:{stop}" for first, stop in parts],
            "inspect": [f"{show}{first}:{stop}" for first, stop in parts],
            **{name: values[name] for name in names},
            "grad_norms": dict(zip(self._names, map(float, norms), strict=True)),
        }


def _is_expected(precision: schema.Precision, values: Mapping[str, float]) -> bool:
    """Tell whether float16's loss scale takes care of a gradient that is not finite."""
    if precision.compute_dtype != "float16":
        return False
    return bool(precision.static_loss_scale) or values["loss_scale"] > precision.min_loss_scale


def _nonfinite(values: Mapping[str, float]) -> str:
    return (
        f"the gradient is not finite (loss {values['loss']}, gradient norm {values['grad_norm']}, "
        f"loss scale {values['loss_scale']}); the weights were left as they were before it"
    )


def _spike(values: Mapping[str, float], limit: float) -> str:
    return f"the loss {values['loss']:.6g} is a spike, above the limit {limit:.6g}"
