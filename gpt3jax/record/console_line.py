"""The console's lines on steps and evaluations.

They begin as Megatron-LM's do, to the letter, so that parsers of its logs go on working. Fields of
our own follow.
"""

import datetime
import math
from collections.abc import Mapping
from typing import Literal


def step_line(entry: Mapping[str, float], end_step: int, end_samples: int, seq_len: int) -> str:
    """Return the line on a step, from its entry in metrics.jsonl.

    It is Megatron's (`training_log` in megatron/training/training.py): the number of skipped
    samples appears once there are any; the loss is left out where no step of the interval counts,
    the gradient norm where the step was skipped.
    """
    now = datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S.%f")
    loss, skipped_samples = entry["interval_loss"], entry["skipped_samples"]
    fields = [
        f" [{now}] iteration {entry['step']:8d}/{end_step:8d}",
        f"consumed samples: {entry['consumed_samples']:12d}",
        f"skipped samples: {skipped_samples:12d}" if skipped_samples else "",
        f"elapsed time per iteration (ms): {entry['step_time'] * 1e3:.1f}",
        f"throughput per GPU (TFLOP/s/GPU): {entry['tflops_per_device']:.1f}",
        f"learning rate: {entry['learning_rate']:.6E}",
        f"global batch size: {entry['batch_size']:5d}",
        f"lm loss: {loss:.6E}" if not math.isnan(loss) else "",
        f"loss scale: {entry['loss_scale']:.1f}",
        f"grad norm: {entry['grad_norm']:.3f}" if not entry["skipped"] else "",
        f"number of skipped iterations: {entry['skipped_in_interval']:3d}",
        f"number of nan iterations: {entry['nan_in_interval']:3d}",
        f"tokens/s: {entry['tokens_per_second']:.1f}",
        f"MFU: {entry['mfu'] * 100:.1f}%" if "mfu" in entry else "",
        f"tokens: {short_count(entry['consumed_tokens'])}/{short_count(end_samples * seq_len)}",
        f"ETA: {duration(seconds_left(entry, end_samples))}",
    ]
    return " | ".join(field for field in fields if field) + " |"


def seconds_left(entry: Mapping[str, float], end_samples: int) -> float:
    """Return how long the rest of the run takes, from a step's entry in metrics.jsonl."""
    steps_left = (end_samples - entry["consumed_samples"]) / entry["batch_size"]
    return steps_left * entry["step_time"]


def evaluation_line(
    step: int, split: Literal["validation", "test"], loss: float, perplexity: float
) -> str:
    """Return Megatron's line on an evaluation."""
    where = " on test set" if split == "test" else ""
    line = f" validation loss at iteration {step}{where} | lm loss value: {loss:.6E} | "
    return line + f"lm loss PPL: {perplexity:.6E} |"


def between_rules(line: str) -> str:
    """Return a line between two rules, as Megatron prints evaluations."""
    rule = "-" * len(line)
    return "\n".join((rule, line, rule))


def short_count(n: float) -> str:
    """Return a count as people say it: 950, 1.50K, 2.40M, 300.00B, 1.00T."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if n >= size:
            return f"{n / size:.2f}{unit}"
    return f"{n:.0f}"


def duration(seconds: float) -> str:
    """Return seconds without colons, where log parsers would split: 2d03h, 3h05m, 4m10s."""
    if not math.isfinite(seconds):
        return "?"
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d{hours % 24:02d}h"
    return f"{hours}h{minute:02d}m" if hours else f"{minute}m{second:02d}s"
