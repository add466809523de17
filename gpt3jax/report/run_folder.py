"""What a run has left in its folders, read as plain files."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from gpt3jax import errors
from gpt3jax.checkpoint import listing
from gpt3jax.config import schema, user_paths
from gpt3jax.record import json_files, metrics
from gpt3jax.report import metric_tables
from gpt3jax.watch import goodput

_Content = TypeVar("_Content")
_PAGE = "watching.md#the-report"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """What `faults/step-N.json` says of a step."""

    step: int
    kind: str
    policy: str
    loss: str
    limit: str
    samples: str
    is_skipped: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resume:
    """A start from a checkpoint that changed something."""

    step: int
    changes: Mapping[str, tuple[object, object]]
    """By field or fact: the values then and now."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """A run; what is not there is empty, and `notes` says what could not be read."""

    name: str
    log_dir: pathlib.Path
    metrics: metric_tables.Metrics
    dropped: metric_tables.Metrics
    """Entries that a resumed run has set aside, to write them again."""
    starts: Sequence[goodput.Start]
    fields: schema.Flat
    """The config of the last start, by dotted names."""
    config: schema.Config | None
    """The same, if this version can read it."""
    resumes: Sequence[Resume]
    faults: Sequence[Fault]
    checkpoints: Sequence[listing.Entry] | None
    """None where the run has no folder of checkpoints, or it is not visible from here."""
    notes: Sequence[str]


def read_all(names: Sequence[str]) -> list[Run]:
    """Return runs by the folders that the user gave.

    Raises:
        UserError: a folder is none of a run, cannot be read, or is given twice.
    """
    folders = [find(name) for name in names]
    for i, folder in enumerate(folders):
        first = next(j for j, other in enumerate(folders) if other.resolve() == folder.resolve())
        if first != i:
            raise errors.UserError(
                f"RUN {names[i]} is the same folder as {names[first]} ({folder.resolve()}): "
                "give each run once",
                page=_PAGE,
            )
    return [_read(name, folder) for name, folder in zip(names, folders, strict=True)]


def find(name: str) -> pathlib.Path:
    """Return the log.dir that a user means: a folder with a run's files, or one with logs/ in it.

    Raises:
        UserError: there is neither.
    """
    folders = (pathlib.Path(name), pathlib.Path(name, "logs"))
    files = (metrics.FILE, "goodput.json")
    try:
        for folder in folders:
            if any((folder / file).is_file() for file in files):
                return folder
        is_folder = folders[0].is_dir()
    except OSError as error:
        message = f"RUN {name} cannot be read ({error.strerror})"
        raise errors.UserError(message, page=_PAGE) from error
    if not is_folder:
        raise errors.UserError(f"RUN {name} is no folder: give the log.dir of a run", page=_PAGE)
    raise errors.UserError(
        f"RUN {name} has no metrics.jsonl, neither in itself nor in {folders[1]}: give the log.dir "
        "of a run (a run with an empty log.dir keeps nothing)",
        page=_PAGE,
    )


def _read(name: str, folder: pathlib.Path) -> Run:
    notes: list[str] = []
    path = folder / metrics.FILE
    tables = metric_tables.read(path)
    dropped = _or_note(notes, lambda: metric_tables.read(json_files.beside(path)))
    if tables.n_unreadable and not tables.n_entries:
        raise errors.UserError(
            f"{path} has no entry in its {tables.n_unreadable} lines: each is "
            'a JSON object with "step" in it. Give the log.dir of a gpt3jax run',
            page=_PAGE,
        )
    if tables.n_unreadable:
        notes.append(f"{tables.n_unreadable} lines of metrics.jsonl are not whole entries")
    fields = _or_note(notes, lambda: _config_fields(folder / "config.json")) or {}
    history = fields.pop("history", [])
    return Run(
        name=name,
        log_dir=folder,
        metrics=tables,
        dropped=dropped or metric_tables.read(folder / "none"),
        starts=_or_note(notes, lambda: _starts(folder / "goodput.json")) or [],
        fields=fields,
        config=_or_note(notes, lambda: _config(fields)),
        resumes=_or_note(notes, lambda: [_resume(entry) for entry in history]) or [],
        faults=_faults(notes, folder / "faults"),
        checkpoints=_or_note(notes, lambda: _checkpoints(fields, folder)),
        notes=notes,
    )


def _or_note(notes: list[str], read: Callable[[], _Content]) -> _Content | None:
    """Return what a function reads; where it cannot, note why and return None."""
    try:
        return read()
    except errors.UserError as error:
        notes.append(str(error))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        notes.append(f"a part of the run's files is unlike any that this version writes: {error!r}")
    return None


def _starts(path: pathlib.Path) -> list[goodput.Start]:
    starts = goodput.read(path)
    if path.exists() and not starts:
        message = f"{path} cannot be read: the starts of the run are not known"
        raise errors.UserError(message, page=_PAGE)
    goodput.shares(starts)  # it fails here, not later, where an entry has no times
    return starts


def _config_fields(path: pathlib.Path) -> dict[str, Any]:
    return user_paths.read_json(path, _PAGE) if path.exists() else {}


def _config(fields: schema.Flat) -> schema.Config | None:
    return schema.unflatten(schema.Config, fields) if fields else None


def _resume(entry: Mapping[str, Any]) -> Resume:
    changes = {name: (change["then"], change["now"]) for name, change in entry["changes"].items()}
    return Resume(step=int(entry["step"]), changes=changes)


def _faults(notes: list[str], folder: pathlib.Path) -> list[Fault]:
    paths = _or_note(notes, lambda: sorted(folder.glob("step-*.json"))) or []
    read = [_or_note(notes, lambda path=path: _fault(path)) for path in paths]  # type: ignore[misc]
    return sorted((fault for fault in read if fault), key=lambda fault: fault.step)


def _fault(path: pathlib.Path) -> Fault:
    content = json.loads(path.read_bytes())
    return Fault(
        step=int(content["step"]),
        kind="spike" if content.get("fault") == "spike" else "not finite",
        policy=str(content.get("policy", "")),
        loss=_shown(content.get("loss")),
        limit=_shown(content.get("loss_limit")),
        samples=", ".join(map(str, content.get("samples", ()))),
        is_skipped=bool(content.get("skipped")),
    )


def _shown(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, int | float) else str(value or "")


def _checkpoints(fields: schema.Flat, log_dir: pathlib.Path) -> list[listing.Entry] | None:
    """Return the checkpoints of a run, whose paths may start where the run was started."""
    if not fields.get("checkpoint.dir"):
        return None
    folder, parts = pathlib.Path(fields["checkpoint.dir"]), pathlib.Path(fields["log.dir"]).parts
    here = log_dir.resolve()
    if here.parts[-len(parts) :] == parts:  # then the run was started where log.dir begins
        folder = pathlib.Path(*here.parts[: -len(parts)], folder)
    return listing.entries(str(folder)) if folder.is_dir() else None
