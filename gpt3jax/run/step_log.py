"""The metrics of steps: read one step behind, summed up over a logging interval, and recorded."""

import math
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from gpt3jax import errors, optimizer
from gpt3jax.config import schema
from gpt3jax.distributed import messages
from gpt3jax.record import recording
from gpt3jax.run import numerical_faults
from gpt3jax.watch import phases


class Position(NamedTuple):
    """How far a run is. The samples alone decide which batch comes next."""

    step: int
    """Steps taken."""
    samples: int
    """Samples consumed."""


class _Pending(NamedTuple):
    """A step that was dispatched, whose metrics nobody has read yet."""

    position: Position
    size: int
    metrics: dict[str, jax.Array]


class StepLog:
    """Reads each step's metrics after the next step is dispatched, and logs each interval."""

    def __init__(
        self,
        cfg: schema.Config,
        recorder: recording.Recorder,
        clock: phases.Phases,
        first_step: int,
        end: Position,
        n_samples: int,
        history: numerical_faults.Faults,
    ):
        """Have nothing to read yet; log the first and the last step in any case.

        `n_samples` is the length of the run that its schedules follow.
        """
        self._cfg, self._recorder, self._n_samples = cfg, recorder, n_samples
        self._faults = history
        self._always_logged = (first_step, end.step)
        self._pending: _Pending | None = None
        self._interval: list[dict[str, float]] = []
        self._clock, self._since = clock, phases.step_seconds(clock.seconds())
        self._compiled: set[int] = set()

    def compile_first(self, batch_size: int, train_step: Any, *args: object) -> None:
        """Compile the step (`Program.train`) for a batch size that is new, and say so.

        All processes wait for each other: once a program runs, its collectives give up on processes
        that still compile (gloo after 30 s).
        """
        if batch_size in self._compiled:
            return
        self._recorder.say(f"compiling the step for batch size {batch_size} ...")
        self.settle()
        begin = time.perf_counter()
        with self._clock.during(phases.COMPILE):
            train_step.compile(*args)
            messages.meet(f"compiled/{batch_size}", self._cfg.watchdog.slow_phase_seconds)
        self._recorder.say(f"compiled in {time.perf_counter() - begin:.1f} s")
        self._compiled.add(batch_size)

    def push(self, position: Position, size: int, step_metrics: dict[str, jax.Array]) -> None:
        """Keep a dispatched step's metrics, still on the device, and read those before them."""
        self._read_then_keep(_Pending(position, size, step_metrics))

    def settle(self) -> None:
        """Read the metrics that are not read yet."""
        self._read_then_keep(None)

    def _read_then_keep(self, pending: _Pending | None) -> None:
        previous, self._pending = self._pending, pending
        if previous is not None:
            self._read(previous)

    def _read(self, dispatched: _Pending) -> None:
        position, size, step_metrics = dispatched
        with self._clock.during(phases.DEVICE):
            read = jax.device_get(step_metrics)
        self._clock.stepped(position.step)
        norms = read.pop("grad_norms")
        values = {name: value.item() for name, value in read.items()}
        is_spike = self._check(position, size, values, norms)
        self._interval.append(values | {"spike": is_spike})
        values["learning_rate"] = self._learning_rate(values)
        self._recorder.advance(position.step, values["loss"], values["learning_rate"])
        interval = self._cfg.log.interval
        if position.step % interval == 0 or position.step in self._always_logged:
            self._log(position, size, values)

    def _check(
        self, position: Position, size: int, values: dict[str, float], norms: np.ndarray
    ) -> bool:
        """Look for a fault in a step and act on it; return whether it was a spike.

        Raises:
            UserError: the config says to stop, or too many steps were skipped in a row.
        """
        fault = self._faults.judge(*position, size, values, norms)
        self._faults.note(position.step, values)
        if fault is None:
            return False
        file = self._recorder.record_fault(fault.step_number, fault.entry)
        see = f"; see {file}" if file else ""
        if fault.error:
            raise errors.UserError(fault.error + see, page="numerical_faults.md")
        self._recorder.say(f"WARNING: {fault.warning}{see}")
        return fault.kind == "spike"

    def _learning_rate(self, values: Mapping[str, float]) -> float:
        """Return the rate of a step that was read, without asking a device."""
        samples = values["schedule_samples"]
        return float(optimizer.learning_rate(self._cfg.optimizer, self._n_samples, samples))

    def _log(self, position: Position, size: int, values: dict[str, float]) -> None:
        now = phases.step_seconds(self._clock.seconds())
        good = [v["loss"] for v in self._interval if not v["skipped"]]
        successful = values["schedule_samples"] + size * (1 - values["skipped"])
        summary = {
            "interval_loss": math.fsum(good) / len(good) if good else math.nan,
            "skipped_in_interval": sum(v["skipped"] for v in self._interval),
            "nan_in_interval": sum(not math.isfinite(v["loss"]) for v in self._interval),
            "spikes_in_interval": sum(v["spike"] for v in self._interval),
            "skipped_samples": position.samples - successful,  # of the whole run
            "step_time": (now - self._since) / len(self._interval),
        }
        self._recorder.log_step(
            position.step,
            position.samples,
            size,
            values["learning_rate"],
            values | summary,
            jax.local_devices()[0].memory_stats(),
        )
        self._interval, self._since = [], now
