"""A run as its log.dir and its checkpoints tell it. Imports no JAX."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any, TypeAlias

from gpt3jax import errors
from gpt3jax.checkpoint import listing, metadata
from gpt3jax.config import recipe, schema
from gpt3jax.record import json_files, metrics

_PAGE = "start.md#train"
Entry: TypeAlias = Mapping[str, Any]  # a line of metrics.jsonl


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordedRun:
    """A run that has a checkpoint.

    Attributes:
        folder: as the user named it.
        log_dir: the folder with `config.json` and `metrics.jsonl`.
        entries: what is whole in `metrics.jsonl`.
        newest: what the newest checkpoint says of itself.
    """

    folder: pathlib.Path
    log_dir: pathlib.Path
    cfg: schema.Config
    entries: list[Entry]
    newest: metadata.Meta


def read(folder: str) -> RecordedRun:
    """Read a run from its log.dir, or from the folder that has it as `logs`.

    Raises:
        UserError: it is neither of the two, or the run has no checkpoint.
    """
    log_dir = _log_dir(pathlib.Path(folder))
    cfg = recipe.load(str(log_dir / "config.json"))
    return RecordedRun(
        folder=pathlib.Path(folder),
        log_dir=log_dir,
        cfg=cfg,
        entries=list(json_files.entries(log_dir / metrics.FILE)),
        newest=_newest(folder, cfg.checkpoint.dir),
    )


def _log_dir(folder: pathlib.Path) -> pathlib.Path:
    for log_dir in (folder, folder / "logs"):
        if (log_dir / "config.json").is_file():
            return log_dir
    raise errors.UserError(
        f"{folder} has no config.json, nor logs/config.json: give the log.dir of a run, or the "
        "folder that has it as logs",
        page=_PAGE,
    )


def _newest(folder: str, checkpoint_dir: str) -> metadata.Meta:
    if not checkpoint_dir:
        raise errors.UserError(
            f"{folder}: the run saved no checkpoint (checkpoint.dir is empty): train it with one",
            page="checkpoints.md#saving",
        )
    if not pathlib.Path(checkpoint_dir).is_dir():
        raise errors.UserError(
            f"{folder}: its checkpoint.dir={checkpoint_dir} is not there: start this command where "
            "the run was started, or put the folder back",
            page=_PAGE,
        )
    whole = [entry.meta for entry in listing.entries(checkpoint_dir) if entry.state == "whole"]
    if not whole or whole[-1] is None:
        raise errors.UserError(
            f"{folder}: its checkpoint.dir={checkpoint_dir} has no checkpoint yet: train until one "
            "is saved (checkpoint.save_interval)",
            page="checkpoints.md#saving",
        )
    return whole[-1]


def last_value(run: RecordedRun, name: str) -> Entry | None:
    """Return the last entry that has a finite value of this name."""
    found = (e for e in reversed(run.entries) if math.isfinite(float(e.get(name, math.nan))))
    return next(found, None)
