"""What a run keeps in log.dir: config.json, metrics.jsonl, TensorBoard's files, faults/."""

import contextlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence

from gpt3jax import errors
from gpt3jax.config import schema
from gpt3jax.record import json_files, metrics, tensorboard

_CONFIG = "config.json"


class LogFolder:
    """The open files of log.dir.

    All methods raise UserError, which names log.dir, where the folder cannot be written.
    """

    def __init__(
        self,
        cfg: schema.Config,
        start_step: int,
        start_samples: int,
        history: Sequence[Mapping[str, object]],
        layouts: Mapping[str, object],
    ) -> None:
        """Write config.json and open the other files; set aside entries that will come again."""
        self._log_dir = cfg.log.dir
        folder, fields = pathlib.Path(cfg.log.dir), schema.flatten(cfg)
        self._metrics_path = folder / metrics.FILE
        with json_files.user_errors(self._log_dir), contextlib.ExitStack() as stack:
            folder.mkdir(parents=True, exist_ok=True)
            self.set_aside = json_files.set_aside(self._metrics_path, start_step)
            """A line on entries that were set aside, "" if none were."""
            content = fields | ({"history": history} if history else {})
            content |= {"layout of each batch size": layouts} if layouts else {}
            json_files.replace_file(folder / _CONFIG, json.dumps(content, indent=2) + "\n")
            self._metrics = stack.enter_context(open(self._metrics_path, "a"))
            # A purge drops all points from a step on. Points over samples are a TensorBoard run of
            # their own, because a purge by steps would drop most of them.
            self._by_step = stack.enter_context(tensorboard.Events(folder, start_step + 1))
            self._by_sample = stack.enter_context(
                tensorboard.Events(folder / "vs_samples", start_samples + 1)
            )
            self._by_step.write_table(start_step, "config", fields)
            self._stack = stack.pop_all()

    def record(
        self,
        entry: Mapping[str, float],
        both: Mapping[str, float],
        over_steps: Mapping[str, float],
    ) -> None:
        """Add an entry to metrics.jsonl, and plot scalars: `both` over steps and over samples."""
        with json_files.user_errors(self._log_dir):
            self._metrics.write(json_files.to_json(entry) + "\n")
            self._metrics.flush()
            self._by_step.plot(int(entry["step"]), {**both, **over_steps})
            over_samples = {f"{tag} vs samples": value for tag, value in both.items()}
            self._by_sample.plot(int(entry["consumed_samples"]), over_samples)

    def plot(self, step: int, values: Mapping[str, float]) -> None:
        """Plot scalars over steps in TensorBoard, and nowhere else."""
        with json_files.user_errors(self._log_dir):
            self._by_step.plot(step, values)

    def n_entries(self) -> int:
        """Return how many entries all starts have recorded, those that were set aside included."""
        files = (self._metrics_path, json_files.beside(self._metrics_path))
        return sum(file.read_bytes().count(b"\n") for file in files if file.exists())

    def write_fault(self, step: int, entry: Mapping[str, object]) -> None:
        """Write the file on a faulty step."""
        path = fault_path(self._log_dir, step)
        with json_files.user_errors(self._log_dir):
            path.parent.mkdir(parents=True, exist_ok=True)
            json_files.replace_file(path, json_files.to_json(entry, indent=2) + "\n")

    def close(self) -> None:
        """Write out and close everything."""
        with json_files.user_errors(self._log_dir):
            self._stack.close()


def problem(cfg: schema.Config, start_step: int) -> errors.UserError | None:
    """Return why a run may not start in its log.dir after so many steps, if it may not.

    The entries past this step would be set aside. They belong to another run if that one saved its
    checkpoints elsewhere. A run that has resumed from a checkpoint.dir is the same one, moved.
    """
    folder, ours = pathlib.Path(cfg.log.dir), cfg.checkpoint.dir
    try:
        theirs = json.loads((folder / _CONFIG).read_text()).get("checkpoint.dir")
    except (OSError, ValueError, AttributeError):  # no run was here, or nothing says which
        return None
    is_other = bool(theirs) and not (ours and (start_step or _same_path(ours, theirs)))
    if not (cfg.log.dir and is_other and json_files.has_later(folder / metrics.FILE, start_step)):
        return None
    return errors.UserError(
        f"log.dir={folder} has the log of another run, whose checkpoints are in {theirs}, and "
        f"this one (checkpoint.dir={ours!r}) would displace it from step {start_step + 1} on: give "
        "this one another log.dir, or '' to keep no log",
        page="operations.md#one-run-in-a-folder",
    )


def _same_path(one: str, other: str) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def has(log_dir: str, step: int, name: str) -> bool:
    """Return whether metrics.jsonl has a value of this name at a step."""
    entries = json_files.entries(pathlib.Path(log_dir) / metrics.FILE)
    return any(entry.get("step") == step and name in entry for entry in entries)


def fault_path(log_dir: str, step: int) -> pathlib.Path:
    """Return the file on a faulty step."""
    return pathlib.Path(log_dir) / "faults" / f"step-{step}.json"
