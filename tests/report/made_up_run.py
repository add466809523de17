"""A run of 80 of 100 steps: killed after step 45, resumed from 40 on another mesh."""

import dataclasses
import json
import math

from gpt3jax.config import schema
from gpt3jax.watch import goodput

import tiny

BEGAN = 1.7e9
NOW = BEGAN + 1000
STARTS = (
    goodput.Start(
        BEGAN, 0, 45, {"start": 5.0, "compile": 5.0, "wait for devices": 22.5},
        layout={"mesh": "data 4", "devices": "4 x cpu", "jax": "0.12.0"},
    ),
    goodput.Start(
        BEGAN + 132.5, 40, 80, {"start": 5.0, "restore": 5.0, "wait for devices": 20.0}, "stopped",
        layout={"mesh": "tensor 4", "devices": "4 x cpu", "jax": "0.12.0"},
    ),
)  # fmt: skip


def loss(step):
    return 8.0 - 2 * math.log10(step)


def moment(step):
    """Return when a step ended."""
    start = STARTS[step > 40]
    return start.began + 10 + 0.5 * (step - start.first_step)


def entry(step):
    return {
        "step": step, "time": moment(step), "consumed_samples": 16 * step,
        "consumed_tokens": 512 * step, "batch_size": 16, "learning_rate": 1e-3, "loss": loss(step),
        "grad_norm": 1.0, "loss_scale": 1.0, "interval_loss": loss(step), "step_time": 0.5,
        "skipped": 0, "skipped_in_interval": 0, "nan_in_interval": 0, "skipped_samples": 0,
        "spikes_in_interval": 0, "tokens_per_second": 1024.0,
        "tokens_per_second_per_device": 256.0, "tflops_per_device": 4.0, "mfu": 0.4,
    }  # fmt: skip


def write(folder):
    """Write the run to a folder, with logs/ and checkpoints/ in it; return the folder."""
    logs = folder / "logs"
    (logs / "faults").mkdir(parents=True)
    entries = [entry(step) for step in range(2, 81, 2)]
    entries[14] |= {"loss": "NaN", "skipped_in_interval": 3, "nan_in_interval": 1}  # step 30
    entries[24] |= {"spikes_in_interval": 1}  # step 50
    for step in (40, 80):
        place = {name: entry(step)[name] for name in ("step", "time", "consumed_samples")}
        entries.append(place | {"validation_loss": 5.0, "validation_ppl": math.exp(5.0)})
    write_lines(logs / "metrics.jsonl", entries)
    write_lines(logs / "metrics.dropped.jsonl", [entry(step) for step in (42, 44)])
    end_with(folder, "stopped")
    cfg = tiny.make_config(
        train={"n_steps": 100}, log={"dir": "run/logs"}, checkpoint={"dir": "run/checkpoints"}
    )
    changes = {
        "mesh": {"then": "data 4", "now": "tensor 4"},
        "data.skip_samples": {"then": [], "now": ["8:16"]},
    }
    history = [{"step": 40, "samples": 640, "changes": changes}]
    content = schema.flatten(cfg) | {"history": history}
    (logs / "config.json").write_text(json.dumps(content))
    fault = {"step": 30, "fault": "not finite", "loss": "NaN", "skipped": 1, "samples": ["464:480"]}
    (logs / "faults" / "step-30.json").write_text(json.dumps(fault | {"policy": "skip"}))
    (folder / "checkpoints" / "40").mkdir(parents=True)
    return folder


def write_lines(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def end_with(folder, end):
    """Write goodput.json such that the last start has this end."""
    starts = [*STARTS[:-1], dataclasses.replace(STARTS[-1], end=end)]
    rows = [dataclasses.asdict(start) for start in starts]
    (folder / "logs" / "goodput.json").write_text(json.dumps({"starts": rows}))
