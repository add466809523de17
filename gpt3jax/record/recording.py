"""Records the course of a run: console, live view, `metrics.jsonl`, TensorBoard, W&B.

Only process 0 has an active `Recorder`. It takes Python numbers and never asks a device for one: it
imports no JAX.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from typing import Literal

from gpt3jax import errors
from gpt3jax.config import schema
from gpt3jax.hardware import flops
from gpt3jax.record import console_line, live_view, log_folder, tensorboard, wandb_run

_VALUES = ("loss", "grad_norm", "loss_scale", "interval_loss", "step_time")
_COUNTS = (
    "skipped",
    "skipped_in_interval",
    "nan_in_interval",
    "skipped_samples",
    "spikes_in_interval",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Span:
    """The part of a run that lies before it: from a start to the run's end."""

    start_step: int
    """Steps taken before."""
    start_samples: int
    """Samples consumed before."""
    end_step: int
    end_samples: int


class Recorder(contextlib.AbstractContextManager["Recorder"]):
    """Shows and keeps the course of a run; a context manager, or call `close`.

    All methods raise UserError, which names log.dir, where its folder cannot be written.
    """

    def __init__(
        self,
        cfg: schema.Config,
        span: Span,
        *,
        n_devices: int,
        peak_flops: float | None,
        history: Sequence[Mapping[str, object]] = (),
        layouts: Mapping[str, object] | None = None,
        active: bool = True,
    ) -> None:
        """Open the run's records and write its config.

        `peak_flops` is one device's FLOP/s; None leaves the MFU out. `history` is what earlier
        starts of the run changed, for config.json. A recorder that is not active (that of all
        processes but the first) opens nothing and prints nothing.
        """
        self._cfg, self._span, self._active = cfg, span, active
        self._n_devices, self._peak_flops = n_devices, peak_flops
        self.view = live_view.LiveView(span.start_step, span.end_step)
        self.folder: log_folder.LogFolder | None = None
        """The files in log.dir; None without one."""
        if active and cfg.log.dir:
            self.folder = log_folder.LogFolder(
                cfg, span.start_step, span.start_samples, history, layouts or {}
            )
            if self.folder.set_aside:
                self.say(self.folder.set_aside)
        self._wandb: wandb_run.WandbRun | None = None
        if self.folder is not None and cfg.log.wandb_project:
            self._wandb = wandb_run.WandbRun(cfg, self.folder.n_entries(), self.say)
        self._status = errors.DONE

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._status = errors.status_of(kind)
        # Where an error ends the run, an error of closing must not hide it.
        with contextlib.suppress(*(() if kind is None else (errors.UserError,))):
            self.close()

    def will_exit(self, status: int) -> None:
        """Note the exit status of a run that no error ends, for `close`."""
        self._status = status

    def close(self) -> None:
        """Write out and close everything; a second call does nothing."""
        self.view.close()
        if self._wandb is not None:
            self._wandb.close(self._status)
        if self.folder is not None:
            self.folder.close()

    def say(self, text: str) -> None:
        """Print a line at once, above the live view if there is one."""
        if self._active:
            self.view.write_line(text)

    def advance(self, step: int, loss: float, learning_rate: float) -> None:
        """Move the live view to a step."""
        if self._active:
            self.view.advance(step, loss, learning_rate)

    def log_step(
        self,
        step: int,
        consumed_samples: int,
        batch_size: int,
        learning_rate: float,
        metrics: Mapping[str, float],
        memory: Mapping[str, int] | None = None,
    ) -> None:
        """Show and keep a step, and the interval that it ends.

        `metrics` has, of the step, `loss, grad_norm, loss_scale, skipped` (0 or 1); of the
        interval, `interval_loss` (mean over steps not skipped; NaN if all were),
        `skipped_in_interval, nan_in_interval, spikes_in_interval, step_time` (seconds per step); of
        the run, `skipped_samples`. Rates assume that all batches of the interval have `batch_size`
        samples. `memory` is a device's `memory_stats()` (bytes).
        """
        if not self._active:
            return
        seq_len = self._cfg.model.seq_len
        entry = {
            "step": step,
            "time": time.time(),
            "consumed_samples": consumed_samples,
            "consumed_tokens": consumed_samples * seq_len,
            "batch_size": batch_size,
            "learning_rate": float(learning_rate),
            **{name: float(metrics[name]) for name in _VALUES},
            **{name: int(metrics[name]) for name in _COUNTS},
            **self._rates(batch_size, float(metrics["step_time"])),
        }
        end_step, end_samples = self._span.end_step, self._span.end_samples
        seconds = console_line.seconds_left(entry, end_samples)
        self.view.show_speed(entry["tokens_per_second"], seconds)
        if self.folder is None or not self.view.is_shown:  # the view shows what the folder keeps
            self.say(console_line.step_line(entry, end_step, end_samples, seq_len))
        self._keep(entry, *self._scalars(entry, memory or {}))

    def _keep(
        self,
        entry: Mapping[str, float],
        both: Mapping[str, float],
        over_steps: Mapping[str, float],
    ) -> None:
        """Keep an entry, with what to plot over steps and samples, and what over steps alone."""
        if self.folder is not None:
            self.folder.record(entry, both, over_steps)
        if self._wandb is not None:
            step, consumed_samples = int(entry["step"]), int(entry["consumed_samples"])
            self._wandb.log(step, consumed_samples, {**both, **over_steps})

    def _rates(self, batch_size: int, step_time: float) -> dict[str, float]:
        n_tokens = batch_size * self._cfg.model.seq_len
        tokens_per_second = n_tokens / step_time if step_time > 0 else math.nan
        per_device = tokens_per_second / self._n_devices
        flops_per_second = per_device * flops.flops_per_token(self._cfg.model)
        return {
            "tokens_per_second": tokens_per_second,
            "tokens_per_second_per_device": per_device,
            "tflops_per_device": flops_per_second / 1e12,
            **({"mfu": flops_per_second / self._peak_flops} if self._peak_flops else {}),
        }

    def _scalars(
        self, entry: Mapping[str, float], memory: Mapping[str, int]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Return what to plot over steps and samples, and what over steps alone."""
        values = {**entry, "n_devices": self._n_devices}
        both = {tag: values[name] for tag, name in tensorboard.TAGS.items()}
        over_steps = {
            tag: known[name]
            for tags, known in ((tensorboard.STEP_TAGS, entry), (tensorboard.MEMORY_TAGS, memory))
            for tag, name in tags.items()
            if name in known
        }
        return both, over_steps

    def log_eval(
        self, step: int, consumed_samples: int, split: Literal["validation", "test"], loss: float
    ) -> None:
        """Show and keep an evaluation after `step` steps: mean token loss and its perplexity."""
        if not self._active:
            return
        perplexity = math.exp(min(loss, 20.0))  # bounded as in Megatron; NaN stays NaN
        line = console_line.evaluation_line(step, split, loss, perplexity)
        self.say(line if self.view.is_shown else console_line.between_rules(line))
        place = {"step": step, "time": time.time(), "consumed_samples": consumed_samples}
        values = {f"{split}_loss": float(loss), f"{split}_ppl": perplexity}
        names = tensorboard.EVALUATION_TAGS.items()
        tags = {tag: values[name] for tag, name in names if name in values}
        self._keep(place | values, tags, {})

    def plot(self, step: int, values: Mapping[str, float]) -> None:
        """Plot scalars over steps, of a step that `log_step` is still to get; keep no entry."""
        if self.folder is not None:
            self.folder.plot(step, values)
        if self._wandb is not None:
            self._wandb.add_to_next_row(values)

    def record_fault(self, step: int, entry: Mapping[str, object]) -> str:
        """Keep what is known of a faulty step; return the file's path, "" without log.dir."""
        if self.folder is not None:
            self.folder.write_fault(step, entry)
        if self._wandb is not None:
            self._wandb.alert(f"step {step}: {entry['fault']} (policy {entry['policy']})")
        log_dir = self._cfg.log.dir
        return str(log_folder.fault_path(log_dir, step)) if log_dir else ""
