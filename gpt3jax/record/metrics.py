"""What a run tells: console lines, a progress bar, `metrics.jsonl`, TensorBoard, `config.json`.

Only process 0 holds an active `Recorder`. It takes Python numbers and never asks a device for one
(it imports no JAX). A console line begins as Megatron-LM's does, to the letter, so that its parsers
go on working. `metrics.jsonl` has one JSON object a line, at full precision; what JSON lacks are
the strings "NaN", "Infinity", "-Infinity" (as in protobuf's JSON), which Python's `float` reads.
"""

import contextlib
import datetime
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import tqdm
from tensorboardX import event_file_writer, summary
from tensorboardX.proto import event_pb2, summary_pb2

from gpt3jax import errors
from gpt3jax.config import schema, user_paths
from gpt3jax.hardware import flops

FLUSH_SECONDS = 10.0  # TensorBoard files are synced to disk at most this often
_VALUES = ("loss", "grad_norm", "loss_scale", "interval_loss", "step_time")
_COUNTS = (
    "skipped",
    "skipped_in_interval",
    "nan_in_interval",
    "skipped_samples",
    "spikes_in_interval",
)
# TensorBoard's tags, Megatron's where it has them, and what they show. Over steps and samples:
_TAGS = {
    "learning-rate": "learning_rate",
    "batch-size": "batch_size",
    "lm loss": "loss",
    "loss-scale": "loss_scale",
    "grad-norm": "grad_norm",
}
# Over steps only; the memory's are by JAX's names.
_STEP_TAGS = {
    "skipped-train-samples": "skipped_samples",
    "skipped-steps": "skipped_in_interval",
    "loss-spikes": "spikes_in_interval",
    "iteration-time": "step_time",
    "throughput": "tflops_per_device",
    "mfu": "mfu",
    "tokens-per-second": "tokens_per_second",
    "tokens-per-second-per-device": "tokens_per_second_per_device",
}
_MEMORY = {"mem-allocated-bytes": "bytes_in_use", "mem-max-allocated-bytes": "peak_bytes_in_use"}


class Recorder(contextlib.AbstractContextManager["Recorder"]):
    """Tells and keeps the course of a run; a context manager, or call `close`.

    All methods raise UserError, naming log.dir, where its folder cannot be written.
    """

    def __init__(
        self,
        cfg: schema.Config,
        *,
        start_step: int,
        end_step: int,
        start_samples: int,
        end_samples: int,
        n_devices: int,
        peak_flops: float | None,
        history: Sequence[Mapping[str, Any]] = (),
        active: bool = True,
    ) -> None:
        """Open the run's records and write its config; set aside entries that will come again.

        Steps `start_step + 1 ... end_step` are to come, from `start_samples` consumed samples to
        `end_samples`. `peak_flops` is one device's FLOP/s; None leaves the MFU out. `history` is
        what starts of the run changed, for config.json. Inactive (all processes but one), nothing
        is opened and nothing told.
        """
        self._cfg, self._active = cfg, active
        self._end_step, self._end_samples = end_step, end_samples
        self._n_devices, self._peak_flops = n_devices, peak_flops
        self._files = None
        if active and cfg.log.dir:
            self._files = _Files(cfg, start_step, start_samples, history)
            if self._files.set_aside:
                self.say(self._files.set_aside)
        self._bar: Any = None
        self._bar_loss = self._bar_rate = ""
        if active and sys.stderr.isatty():
            text = "{percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt}, ETA {remaining}{postfix}"
            self._bar = tqdm.tqdm(
                total=end_step, initial=start_step, bar_format=text, dynamic_ncols=True
            )

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Where an error ended the run, that error is the news.
        with contextlib.suppress(*(() if kind is None else (errors.UserError,))):
            self.close()

    def close(self) -> None:
        """Write out and close everything; a second call does nothing."""
        if self._bar is not None:
            self._bar.close()
        if self._files is not None:
            self._files.close()

    def say(self, text: str) -> None:
        """Print a line at once, above the progress bar if there is one."""
        if self._active:
            tqdm.tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def advance(self, step: int, loss: float | None = None) -> None:
        """Move the progress bar to a step; without a loss it keeps the last one."""
        if self._bar is None:
            return
        if loss is not None:
            self._bar_loss = f"loss {loss:.4f}, "
        postfix = (self._bar_loss + self._bar_rate).rstrip(", ")
        self._bar.set_postfix_str(postfix, refresh=False)
        self._bar.update(step - self._bar.n)

    def recorded(self, step: int, name: str) -> bool:
        """Tell whether metrics.jsonl has a value of this name at a step; True without log.dir."""
        if self._files is None:
            return True
        lines = (pathlib.Path(self._cfg.log.dir) / "metrics.jsonl").read_text().splitlines()
        entries = [json.loads(line) for line in lines]
        return any(entry["step"] == step and name in entry for entry in entries)

    def log_step(
        self,
        step: int,
        consumed_samples: int,
        batch_size: int,
        learning_rate: float,
        metrics: Mapping[str, float],
        memory: Mapping[str, int] | None = None,
    ) -> None:
        """Tell of a step and of the interval that it ends.

        `metrics` has, of the step, `loss, grad_norm, loss_scale, skipped` (0 or 1); of the
        interval, `interval_loss` (mean over steps not skipped; NaN if all were),
        `skipped_in_interval, nan_in_interval, spikes_in_interval, step_time` (seconds per step); of
        the run, `skipped_samples`. Rates take the interval's batches to be `batch_size` samples
        each. `memory` is a device's `memory_stats()` (bytes).
        """
        if not self._active:
            return
        entry = {
            "step": step,
            "consumed_samples": consumed_samples,
            "consumed_tokens": consumed_samples * self._cfg.model.seq_len,
            "batch_size": batch_size,
            "learning_rate": float(learning_rate),
            **{name: float(metrics[name]) for name in _VALUES},
            **{name: int(metrics[name]) for name in _COUNTS},
            **self._rates(batch_size, float(metrics["step_time"])),
        }
        self._bar_rate = f"{_short(entry['tokens_per_second'])} tokens/s"
        self.say(_step_line(entry, self._end_step, self._end_samples, self._cfg.model.seq_len))
        both = {tag: entry[name] for tag, name in _TAGS.items()} | {"world-size": self._n_devices}
        alone = {tag: entry[name] for tag, name in _STEP_TAGS.items() if name in entry}
        if memory is not None:
            alone |= {tag: memory[name] for tag, name in _MEMORY.items() if name in memory}
        if self._files is not None:
            self._files.record(entry, both, alone)

    def plot(self, step: int, values: Mapping[str, float]) -> None:
        """Plot scalars over steps in TensorBoard, and nowhere else."""
        if self._files is not None:
            self._files.plot(step, values)

    def record_fault(self, step: int, entry: Mapping[str, Any]) -> str:
        """Keep what was seen of a faulty step; return the file's path, "" where there is none."""
        if not self._cfg.log.dir:
            return ""
        path = pathlib.Path(self._cfg.log.dir) / "faults" / f"step-{step}.json"
        if self._active:
            with blaming(self._cfg.log.dir):
                path.parent.mkdir(parents=True, exist_ok=True)
                replace_file(path, _to_json(entry, indent=2) + "\n")
        return str(path)

    def log_eval(
        self, step: int, consumed_samples: int, split: Literal["validation", "test"], loss: float
    ) -> None:
        """Tell of an evaluation after `step` steps: mean token loss and its perplexity."""
        if not self._active:
            return
        perplexity = math.exp(min(loss, 20.0))  # bounded as in Megatron; NaN stays NaN
        where = " on test set" if split == "test" else ""
        line = f" validation loss at iteration {step}{where} | lm loss value: {loss:.6E} | "
        line += f"lm loss PPL: {perplexity:.6E} |"
        self.say("\n".join(("-" * len(line), line, "-" * len(line))))
        entry = {"step": step, "consumed_samples": consumed_samples}
        found = {f"{split}_loss": float(loss), f"{split}_ppl": perplexity}
        tags = {f"lm loss {split}": loss, f"lm loss {split} ppl": perplexity}
        if self._files is not None:
            self._files.record(entry | found, tags, {})

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


class _Files:
    """What a run keeps in log.dir: config.json, metrics.jsonl, and TensorBoard's files."""

    def __init__(
        self,
        cfg: schema.Config,
        start_step: int,
        start_samples: int,
        history: Sequence[Mapping[str, Any]],
    ) -> None:
        self._log_dir = cfg.log.dir
        folder, flat = pathlib.Path(cfg.log.dir), schema.flatten(cfg)
        with blaming(self._log_dir), contextlib.ExitStack() as stack:
            folder.mkdir(parents=True, exist_ok=True)
            self.set_aside = _set_aside(folder / "metrics.jsonl", start_step)
            told = flat | ({"history": history} if history else {})
            replace_file(folder / "config.json", json.dumps(told, indent=2) + "\n")
            self._jsonl = stack.enter_context(open(folder / "metrics.jsonl", "a"))
            # Purging drops a run's points from one count on. Those over samples are therefore a
            # run of their own: purged by steps, most of them would go.
            self._by_step = stack.enter_context(_Events(folder, start_step + 1))
            self._by_sample = stack.enter_context(_Events(folder / "vs_samples", start_samples + 1))
            rows = "".join(f"| {name} | {value} |\n" for name, value in flat.items())
            table = summary.text("config", f"| field | value |\n|---|---|\n{rows}")
            self._by_step.write(step=start_step, summary=table)
            self._stack = stack.pop_all()

    def record(
        self, entry: Mapping[str, Any], both: Mapping[str, float], alone: Mapping[str, float]
    ) -> None:
        """Keep an entry; plot scalars over its step, those of `both` over its samples too."""
        with blaming(self._log_dir):
            self._jsonl.write(_to_json(entry) + "\n")
            self._jsonl.flush()
            self._by_step.plot({**both, **alone}, entry["step"])
            over_samples = {f"{tag} vs samples": value for tag, value in both.items()}
            self._by_sample.plot(over_samples, entry["consumed_samples"])

    def plot(self, step: int, values: Mapping[str, float]) -> None:
        with blaming(self._log_dir):
            self._by_step.plot(values, step)

    def close(self) -> None:
        with blaming(self._log_dir):
            self._stack.close()


class _Events(contextlib.AbstractContextManager["_Events"]):
    """A TensorBoard file, written in place.

    tensorboardX's SummaryWriter writes from a thread; a full disk ends the thread, and the run
    then waits for ever on its queue. It also turns the blank of "lm loss" into an underscore.
    """

    def __init__(self, folder: pathlib.Path, purge_step: int) -> None:
        """Start a file whose reader forgets what the folder has at `purge_step` and later."""
        folder.mkdir(parents=True, exist_ok=True)
        # The suffix keeps two runs that start in one second apart.
        self._file = event_file_writer.EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        self._flushed = -math.inf
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self.write(step=purge_step, session_log=start)

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def plot(self, values: Mapping[str, float], step: int) -> None:
        points = [summary_pb2.Summary.Value(tag=t, simple_value=x) for t, x in values.items()]
        self.write(step=step, summary=summary_pb2.Summary(value=points))

    def write(self, **event: Any) -> None:
        self._file.write_event(event_pb2.Event(wall_time=time.time(), **event))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._file.flush()
            self._flushed = time.monotonic()


def _step_line(e: Mapping[str, Any], end_step: int, end_samples: int, seq_len: int) -> str:
    """Return Megatron's line (`training_log` in megatron/training/training.py), ours appended.

    As there, skipped samples appear once there are any; a mean loss over no step and the gradient
    norm of a skipped step do not appear.
    """
    now = datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S.%f")
    seconds_left = (end_samples - e["consumed_samples"]) / e["batch_size"] * e["step_time"]
    fields = [
        f" [{now}] iteration {e['step']:8d}/{end_step:8d}",
        f"consumed samples: {e['consumed_samples']:12d}",
        f"skipped samples: {e['skipped_samples']:12d}" if e["skipped_samples"] else "",
        f"elapsed time per iteration (ms): {e['step_time'] * 1e3:.1f}",
        f"throughput per GPU (TFLOP/s/GPU): {e['tflops_per_device']:.1f}",
        f"learning rate: {e['learning_rate']:.6E}",
        f"global batch size: {e['batch_size']:5d}",
        f"lm loss: {e['interval_loss']:.6E}" if not math.isnan(e["interval_loss"]) else "",
        f"loss scale: {e['loss_scale']:.1f}",
        f"grad norm: {e['grad_norm']:.3f}" if not e["skipped"] else "",
        f"number of skipped iterations: {e['skipped_in_interval']:3d}",
        f"number of nan iterations: {e['nan_in_interval']:3d}",
        f"tokens/s: {e['tokens_per_second']:.1f}",
        f"MFU: {e['mfu'] * 100:.1f}%" if "mfu" in e else "",
        f"tokens: {_short(e['consumed_tokens'])}/{_short(end_samples * seq_len)}",
        f"ETA: {duration(seconds_left)}",
    ]
    return " | ".join(field for field in fields if field) + " |"


def _short(n: float) -> str:
    """Return a count as people say it: 950, 1.50K, 2.40M, 300.00B, 1.00T."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if n >= size:
            return f"{n / size:.2f}{unit}"
    return f"{n:.0f}"


def duration(seconds: float) -> str:
    """Return seconds without colons, which log parsers split at: 2d03h, 3h05m, 4m10s."""
    if not math.isfinite(seconds):
        return "?"
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d{hours % 24:02d}h"
    return f"{hours}h{minute:02d}m" if hours else f"{minute}m{second:02d}s"


def _to_json(entry: Mapping[str, Any], indent: int | None = None) -> str:
    def valid(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: valid(one) for name, one in value.items()}
        if not isinstance(value, float) or math.isfinite(value):
            return value
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"

    return json.dumps(valid(dict(entry)), allow_nan=False, indent=indent)


def _set_aside(path: pathlib.Path, step: int) -> str:
    """Move entries past a step, and unfinished ones, to a file beside; return what to say of it.

    They are of a run that was killed after its last checkpoint, or of another run in this folder.
    """
    entries = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    later = [entry.rstrip(b"\n") + b"\n" for entry in entries if _step_of(entry) > step]
    if not later:
        return ""
    beside = path.with_suffix(".dropped.jsonl")
    with open(beside, "ab") as file:  # first: cut short, entries are there twice, not nowhere
        file.writelines(later)
    replace_file(path, b"".join(entry for entry in entries if _step_of(entry) <= step).decode())
    return f"{path}: moved {len(later)} entries past step {step} or unfinished to {beside.name}"


def _step_of(entry: bytes) -> float:
    """Return the step of a line of metrics.jsonl; infinity if the line was not finished."""
    try:
        return float(json.loads(entry)["step"]) if entry.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


def replace_file(path: pathlib.Path, text: str) -> None:
    """Write a file so that a reader or a crash finds the old text or the new one."""
    draft = path.with_name(f"{path.name}.draft")
    with open(draft, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


@contextlib.contextmanager
def blaming(log_dir: str) -> Iterator[None]:
    """Turn an OSError inside of this context into a UserError that names log.dir."""
    try:
        yield
    except OSError as error:
        raise user_paths.not_writable("log.dir", log_dir, error) from error
