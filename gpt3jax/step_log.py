"""The metrics of steps: read one step behind, summed over a logging interval, and recorded."""

import math
import time
from typing import Any, NamedTuple

import jax

from gpt3jax import config, distributed, metrics, optimizer, phases


class Position(NamedTuple):
    """Where a run stands: steps taken, and samples consumed, which alone decide what comes next."""

    step: int
    samples: int


class StepLog:
    """Reads each step's metrics after the next step is dispatched, and logs each interval."""

    def __init__(
        self,
        cfg: config.Config,
        recorder: metrics.Recorder,
        clock: phases.Phases,
        first_step: int,
        end: Position,
    ):
        """Nothing is pending yet; the first and the last step are logged in any case."""
        self._cfg, self._recorder, self._end = cfg, recorder, end
        self._always_logged = (first_step, end.step)
        self._pending: tuple[Position, int, Any] | None = None
        self._interval: list[dict[str, float]] = []
        self._clock, self._since = clock, phases.step_seconds(clock.seconds())
        self._compiled: set[int] = set()

    def compile_first(self, batch_size: int, step: Any, *args: Any) -> None:
        """Compile the step for a batch size that is new, and say so; all processes wait for all.

        Once a program runs, its collectives give up on processes that still compile (gloo after
        30 s).
        """
        if batch_size in self._compiled:
            return
        self._recorder.say(f"compiling the step for batch size {batch_size} ...")
        self.settle()
        begin = time.perf_counter()
        with self._clock.during(phases.COMPILE):
            step.compile(*args)
            distributed.meet(f"compiled/{batch_size}", self._cfg.watchdog.slow_phase_seconds)
        self._recorder.say(f"compiled in {time.perf_counter() - begin:.1f} s")
        self._compiled.add(batch_size)

    def push(self, position: Position, size: int, step_metrics: Any) -> None:
        """Take a dispatched step's metrics, still on the device, and read the one before."""
        previous, self._pending = self._pending, (position, size, step_metrics)
        if previous is not None:
            self._read(*previous)

    def settle(self) -> None:
        """Read what is pending."""
        previous, self._pending = self._pending, None
        if previous is not None:
            self._read(*previous)

    def _read(self, position: Position, size: int, step_metrics: Any) -> None:
        with self._clock.during(phases.DEVICE):
            values = {k: v.item() for k, v in jax.device_get(step_metrics).items()}
        self._clock.stepped(position.step)
        _check_finite(self._cfg.precision, position.step, values)
        self._interval.append(values)
        self._recorder.advance(position.step, values["loss"])
        interval = self._cfg.log.interval
        if position.step % interval == 0 or position.step in self._always_logged:
            self._log(position, size, values)

    def _log(self, position: Position, size: int, values: dict[str, float]) -> None:
        now = phases.step_seconds(self._clock.seconds())
        good = [v["loss"] for v in self._interval if not v["skipped"]]
        lr = optimizer.learning_rate(
            self._cfg.optimizer, self._end.samples, values["schedule_samples"]
        )
        summary = {
            "interval_loss": math.fsum(good) / len(good) if good else math.nan,
            "skipped_in_interval": sum(v["skipped"] for v in self._interval),
            "nan_in_interval": sum(not math.isfinite(v["loss"]) for v in self._interval),
            # Of the whole run: consumed before this step, less those of successful steps.
            "skipped_samples": position.samples
            - size
            - values["schedule_samples"]
            + size * values["skipped"],
            "step_time": (now - self._since) / len(self._interval),
        }
        self._recorder.log_step(
            position.step,
            position.samples,
            size,
            float(lr),
            values | summary,
            jax.local_devices()[0].memory_stats(),
        )
        self._interval, self._since = [], now


def _check_finite(precision: config.Precision, step_number: int, values: dict[str, float]) -> None:
    dynamic = precision.compute_dtype == "float16" and not precision.static_loss_scale
    if not values["skipped"] or (dynamic and values["loss_scale"] > precision.min_loss_scale):
        return
    if precision.compute_dtype == "float16" and precision.static_loss_scale:
        return
    raise config.UserError(
        f"step {step_number}: the gradient is not finite (loss {values['loss']}, loss scale "
        f"{values['loss_scale']}); the weights were left as they were before it. Resume from the "
        "last checkpoint with a lower optimizer.peak_lr, a longer warm-up or float32, or look for "
        "damaged tokens in the samples of this step"
    )
