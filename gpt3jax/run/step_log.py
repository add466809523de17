"""The metrics of steps: read one step behind, summed over a logging interval, and recorded."""

import math
import time
from typing import Any, NamedTuple

import jax

from gpt3jax import optimizer
from gpt3jax.config import schema
from gpt3jax.distributed import messages
from gpt3jax.record import metrics
from gpt3jax.run import faults
from gpt3jax.watch import phases


class Position(NamedTuple):
    """Where a run stands: steps taken, and samples consumed, which alone decide what comes next."""

    step: int
    samples: int


class StepLog:
    """Reads each step's metrics after the next step is dispatched, and logs each interval."""

    def __init__(
        self,
        cfg: schema.Config,
        recorder: metrics.Recorder,
        clock: phases.Phases,
        first_step: int,
        end: Position,
        n_samples: int,
        seen: faults.Faults,
    ):
        """Nothing is pending yet; the first and the last step are logged in any case.

        `n_samples` is the length of the run that its schedules follow.
        """
        self._cfg, self._recorder, self._n_samples = cfg, recorder, n_samples
        self._faults = seen
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
            messages.meet(f"compiled/{batch_size}", self._cfg.watchdog.slow_phase_seconds)
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
            read = jax.device_get(step_metrics)
        self._clock.stepped(position.step)
        norms = read.pop("grad_norms")
        values = {k: v.item() for k, v in read.items()}
        spike = self._faults.judge(position, size, values, norms, self._recorder)
        self._interval.append(values | {"spike": spike})
        self._recorder.advance(position.step, values["loss"])
        interval = self._cfg.log.interval
        if position.step % interval == 0 or position.step in self._always_logged:
            self._log(position, size, values)

    def _log(self, position: Position, size: int, values: dict[str, float]) -> None:
        now = phases.step_seconds(self._clock.seconds())
        good = [v["loss"] for v in self._interval if not v["skipped"]]
        lr = optimizer.learning_rate(
            self._cfg.optimizer, self._n_samples, values["schedule_samples"]
        )
        summary = {
            "interval_loss": math.fsum(good) / len(good) if good else math.nan,
            "skipped_in_interval": sum(v["skipped"] for v in self._interval),
            "nan_in_interval": sum(not math.isfinite(v["loss"]) for v in self._interval),
            "spikes_in_interval": sum(v["spike"] for v in self._interval),
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
