"""`metrics.jsonl` as columns of numbers, whatever of the file can be read."""

import dataclasses
import json
import math
import pathlib

import numpy as np

from gpt3jax import errors
from gpt3jax.page import decimation

Array = decimation.Array
STEP_FIELDS = (
    "step", "time", "consumed_samples", "consumed_tokens", "batch_size", "learning_rate", "loss",
    "grad_norm", "loss_scale", "interval_loss", "step_time", "skipped_in_interval",
    "nan_in_interval", "skipped_samples", "spikes_in_interval", "tokens_per_second",
    "tokens_per_second_per_device", "tflops_per_device", "mfu",
)  # fmt: skip
EVALUATION_FIELDS = ("step", "time", "consumed_samples", "validation_loss", "test_loss")

_LARGEST = 1e60  # beyond what float32 holds: with larger numbers, sums and ratios would overflow


class Table:
    """Columns of equal length by the names of their fields, in the order of steps."""

    def __init__(self, columns: dict[str, Array]) -> None:
        """Sort rows by step; rows of one step keep their order."""
        order = np.argsort(columns["step"], kind="stable")
        self._columns = {name: column[order] for name, column in columns.items()}

    def __len__(self) -> int:
        return len(self._columns["step"])

    def __getitem__(self, name: str) -> Array:
        return self._columns[name]

    def known(self, name: str) -> Array:
        """Return the values of a field that are finite."""
        column = self._columns[name]
        return column[np.isfinite(column)]

    def last(self, name: str) -> float:
        """Return the last finite value of a field, NaN if there is none."""
        known = self.known(name)
        return float(known[-1]) if len(known) else math.nan


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Metrics:
    """The content of a file of metrics."""

    steps: Table
    """An entry for each logged step, with `STEP_FIELDS`; what an entry lacks is NaN."""
    evaluations: Table
    """An entry for each evaluation, with `EVALUATION_FIELDS`."""
    n_entries: int
    n_unreadable: int
    """Lines that are not whole entries."""
    has_cut_end: bool
    """The last line is not whole: a run writes it just now, or was killed there."""


def read(path: pathlib.Path) -> Metrics:
    """Return the metrics of a file; of none if it is not there.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    except OSError as error:
        raise errors.UserError(
            f"{path} cannot be read ({error.strerror}): check its permissions or its mount",
            page="watching.md#the-report",
        ) from error
    entries = [entry for entry in map(_entry, lines) if entry is not None]
    has_cut_end = bool(lines) and not lines[-1].endswith(b"\n") and _entry(lines[-1]) is None
    n_unreadable = len(lines) - len(entries) - has_cut_end
    steps = [entry for entry in entries if "loss" in entry or "interval_loss" in entry]
    evaluations = [entry for entry in entries if entry.keys() & {"validation_loss", "test_loss"}]
    return Metrics(
        steps=_table(steps, STEP_FIELDS),
        evaluations=_table(evaluations, EVALUATION_FIELDS),
        n_entries=len(entries),
        n_unreadable=n_unreadable,
        has_cut_end=has_cut_end,
    )


def _entry(line: bytes) -> dict[str, object] | None:
    """Return the object in a line, None if it is not whole or has no step."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_entry = isinstance(entry, dict) and 0 <= _number(entry.get("step")) < 2**53
    return entry if is_entry else None


def _table(entries: list[dict[str, object]], fields: tuple[str, ...]) -> Table:
    return Table(
        {name: np.array([_number(entry.get(name)) for entry in entries]) for name in fields}
    )


def _number(value: object) -> float:
    """Return a value as a number, NaN where it is none. Strings stand for what JSON lacks."""
    try:
        number = float(value) if isinstance(value, float | int | str) else math.nan
    except (ValueError, OverflowError):
        return math.nan
    size = abs(number)
    if size > _LARGEST:
        return math.copysign(math.inf, number)
    return number if size > 1 / _LARGEST or math.isnan(number) else 0.0
