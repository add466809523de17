"""Numerical faults of steps: what counts as a fault, and what the config says to do about it.

A gradient or loss that is not finite never changes a weight. A spike is a loss above a limit that
comes from the losses before. All processes judge alike, because they have the same numbers. This
module only judges; `step_log` acts.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from gpt3jax.config import command_line, schema
from gpt3jax.data import skipped_samples


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """The verdict on a faulty step: what is wrong with it, and whether the run may go on."""

    step_number: int
    kind: Literal["spike", "not finite"]
    entry: dict[str, object]
    """The content of faults/step-N.json."""
    warning: str
    """What to print where the run goes on."""
    error: str
    """Why the run must end, and what the user can do; "" where it goes on."""


class Faults:
    """The losses that the next limits come from; judges steps by them."""

    def __init__(self, cfg: schema.Config, names: Sequence[str]) -> None:
        """Know no loss yet; `names` are those of the arrays that have gradient norms."""
        self._cfg, self._names = cfg, tuple(names)
        self._losses: list[tuple[int, float]] = []
        self._skipped_in_row = 0

    def as_json(self) -> dict[str, object]:
        """Return what a run that goes on from here needs."""
        losses = [[number, loss] for number, loss in self._losses]
        return {"losses": losses, "skipped_in_row": self._skipped_in_row}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on from what `as_json` returned; from nothing if it is empty.

        While spikes are off no loss is kept: later limits must not come from losses before that.
        """
        losses = saved.get("losses", ()) if self._cfg.faults.spike != "off" else ()
        self._losses = [(int(number), float(loss)) for number, loss in losses]
        self._skipped_in_row = int(saved.get("skipped_in_row", 0))

    def loss_limit(self, step_number: int) -> float:
        """Return the loss above which this step is a spike; infinity if spikes are off.

        The limit comes from the successful steps up to two before this one. The step just before
        may not be read yet, and the limit must not depend on that. It is infinity while there are
        fewer such steps than the window.
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
        """Return the arguments of the training step after state and batch: the limit, if used."""
        if not self._cfg.faults.limits_loss:
            return ()
        return (np.float32(self.loss_limit(step_number)),)

    def note(self, step_number: int, values: Mapping[str, float]) -> None:
        """Keep a step's loss for the next limits if the step was successful; count skips in a row.

        `values` has the step's `loss, grad_norm, loss_scale, skipped`.
        """
        self._skipped_in_row = self._n_skipped_in_row(values)
        if not values["skipped"] and self._cfg.faults.spike != "off":
            self._losses.append((step_number, values["loss"]))
            del self._losses[: -self._cfg.faults.spike_window - 1]

    def judge(
        self,
        step_number: int,
        samples: int,
        size: int,
        values: Mapping[str, float],
        norms: np.ndarray,
    ) -> Fault | None:
        """Return what is wrong with a step, if anything; nothing changes. `note` comes after.

        The step's batch, of `size` samples, ends where `samples` samples are consumed. `values` are
        as in `note`, `norms` are the gradient norms of the arrays.
        """
        limit = self.loss_limit(step_number)
        is_finite = _is_finite(values)
        is_spike = is_finite and values["loss"] > limit
        if (is_finite and not is_spike) or _loss_scale_reacts(self._cfg.precision, values):
            return None
        policy = self._cfg.faults.spike if is_spike else self._cfg.faults.nonfinite
        problem = _describe_spike(values, limit) if is_spike else _describe_nonfinite(values)
        message = f"step {step_number}: {problem}"
        done = "its update was left out" if values["skipped"] else "its update was applied"
        kind: Literal["spike", "not finite"] = "spike" if is_spike else "not finite"
        entry = self._entry(step_number, samples, size, values, norms)
        return Fault(
            step_number=step_number,
            kind=kind,
            entry=entry | {"fault": kind, "policy": policy, "loss_limit": limit},
            warning=f"{message}; {done}",
            error=self._why_stop(policy, message, self._n_skipped_in_row(values)),
        )

    def _n_skipped_in_row(self, values: Mapping[str, float]) -> int:
        """Return how many steps in a row, up to this one, were skipped for a fault."""
        if _loss_scale_reacts(self._cfg.precision, values):
            return self._skipped_in_row
        return self._skipped_in_row + 1 if values["skipped"] else 0

    def _why_stop(self, policy: str, message: str, n_skipped: int) -> str:
        if policy == "stop":
            return (
                f"{message}; nothing was saved since. Resume from the last checkpoint with a lower "
                "optimizer.peak_lr, a longer warm-up or float32, look for damaged tokens in the "
                "samples of this step, or leave samples out with data.skip_samples"
            )
        limit = self._cfg.faults.max_skipped_steps
        if policy == "skip" and n_skipped >= limit:
            return (
                f"{message}; {n_skipped} steps in a row were skipped, and "
                f"faults.max_skipped_steps={limit}: the fault does not pass by itself. Resume from "
                "an older checkpoint, with a lower optimizer.peak_lr or without these samples "
                "(data.skip_samples)"
            )
        return ""

    def _entry(
        self,
        step_number: int,
        samples: int,
        size: int,
        values: Mapping[str, float],
        norms: np.ndarray,
    ) -> dict[str, object]:
        stream = skipped_samples.from_config(self._cfg.data)
        n_kept = stream.n_kept(samples)
        numbers = stream.numbers(np.arange(n_kept - size, n_kept))
        cuts = np.flatnonzero(np.diff(numbers) > 1) + 1
        parts = [(int(part[0]), int(part[-1]) + 1) for part in np.split(numbers, cuts)]
        config = f"{self._cfg.log.dir}/config.json"
        show = command_line.shell_line("gpt3jax.data.inspect", "--config", config, "--samples")
        names = ("loss", "grad_norm", "loss_scale", "skipped")
        return {
            "step": step_number,
            "samples": [f"{first}:{stop}" for first, stop in parts],
            "inspect": [f"{show} {first}:{stop}" for first, stop in parts],
            **{name: values[name] for name in names},
            "grad_norms": dict(zip(self._names, map(float, norms), strict=True)),
        }


def _is_finite(values: Mapping[str, float]) -> bool:
    return math.isfinite(values["grad_norm"]) and math.isfinite(values["loss"])


def _loss_scale_reacts(precision: schema.Precision, values: Mapping[str, float]) -> bool:
    """Return whether float16's loss scale takes care of a gradient that is not finite."""
    if _is_finite(values) or precision.compute_dtype != "float16":
        return False
    return bool(precision.static_loss_scale) or values["loss_scale"] > precision.min_loss_scale


def _describe_nonfinite(values: Mapping[str, float]) -> str:
    return (
        f"the gradient is not finite (loss {values['loss']}, gradient norm {values['grad_norm']}, "
        f"loss scale {values['loss_scale']}); the weights were left as they were before it"
    )


def _describe_spike(values: Mapping[str, float], limit: float) -> str:
    return f"the loss {values['loss']:.6g} is a spike, above the limit {limit:.6g}"
