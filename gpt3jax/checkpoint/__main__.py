"""`python -m gpt3jax.checkpoint`: look into a folder of checkpoints, and verify them.

    list DIR                           all of them: step, samples, when, size, state
    show DIR [--step N]                one: position, config, arrays
    verify DIR [--step N | --all]      read every array and compare it with its digest

The newest is taken by default. Nothing in the folder is changed, and a run may write to it
meanwhile. It needs no GPU, no mesh, and the memory of one layer.
"""

import dataclasses
import datetime
import json
import pathlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import tqdm
import tyro
from rich import box, console, table

from gpt3jax import errors
from gpt3jax.checkpoint import listing, metadata
from gpt3jax.config import command, ranges, schema, user_paths

if TYPE_CHECKING:
    from gpt3jax.checkpoint import storage

DAMAGED = 1  # the exit status of verify where one is damaged


@dataclasses.dataclass(frozen=True, kw_only=True)
class List:
    """Tell of all checkpoints of a folder, and of what is left of others."""

    folder: tyro.conf.Positional[user_paths.Path]
    """Folder of checkpoints, as checkpoint.dir."""
    json: bool = False
    """Print JSON."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Show:
    """Tell what is in one checkpoint: its position, its config, its arrays."""

    folder: tyro.conf.Positional[user_paths.Path]
    """Folder of checkpoints, as checkpoint.dir."""
    step: Annotated[int, ranges.Range(-1, ranges.INT32)] = -1
    """Which one (-1: the newest)."""
    json: bool = False
    """Print JSON."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verify:
    """Read every array and compare it with its digest; exit with 1 if a checkpoint is damaged."""

    folder: tyro.conf.Positional[user_paths.Path]
    """Folder of checkpoints, as checkpoint.dir."""
    step: Annotated[int, ranges.Range(-1, ranges.INT32)] = -1
    """Which one (-1: the newest)."""
    all: bool = False
    """All of them."""
    json: bool = False
    """Print JSON."""


def list_all(options: List, out: console.Console) -> int:
    """Print a table, or JSON, of a folder.

    Raises:
        UserError: the folder cannot be read.
    """
    found = listing.entries(options.folder)
    if options.json:
        _print_json(out, [_as_json(entry) for entry in found])
        return errors.DONE
    shown = table.Table(box=box.SIMPLE, title=options.folder, title_justify="left")
    for name in ("step", "samples", "written", "size", "state", "holds", "version"):
        shown.add_column(name, justify="right" if name in ("step", "samples", "size") else "left")
    for entry in found:
        meta = entry.meta
        state = f"{entry.state} ({entry.name})" if entry.name.startswith("d") else entry.state
        shown.add_row(
            f"{entry.step:,}", f"{meta.consumed_samples:,}" if meta else "?", _time(entry.written),
            size(entry.n_bytes), state, _holds(meta), meta.version if meta else "?",
        )  # fmt: skip
    if found:
        out.print(shown)
    else:
        out.print(f"{options.folder} has no checkpoint")
    return errors.DONE


def show(options: Show, out: console.Console) -> int:
    """Print what is in a checkpoint.

    Raises:
        UserError: it is not there, or what it says of itself cannot be read.
    """
    from gpt3jax.checkpoint import storage  # after parsing: JAX takes seconds

    entry = _chosen(options.folder, options.step, all_of_them=False)[0]
    path = pathlib.Path(options.folder) / entry.name
    if entry.meta is None:
        raise metadata.DamagedError(f"checkpoint {path} has no meta file that can be read")
    arrays = storage.arrays(path)
    if options.json:
        told = [{"name": n, "shape": s, "dtype": d, "bytes": b} for n, s, d, b in arrays]
        _print_json(out, _as_json(entry) | {"meta": _meta(entry), "arrays": told})
        return errors.DONE
    held = f"{size(entry.n_bytes)} on disk, {len(arrays)} arrays of {size(_total(arrays))}"
    out.print(f"{path}: step {entry.step:,}, {entry.meta.consumed_samples:,} samples")
    out.print(f"{_holds(entry.meta)}, {held}")
    out.print(f"written {_time(entry.written)} by gpt3jax {entry.meta.version}")
    parts = {"order of samples": entry.meta.data_order, "config": entry.meta.config}
    if entry.meta.history:
        parts["changed by starts of the run"] = _changes(entry.meta)
    for title, rows in parts.items():
        shown = table.Table(box=box.SIMPLE, show_header=False, title=title, title_justify="left")
        for name, value in rows.items():
            shown.add_row(name, str(value))
        out.print(shown)
    shown = table.Table("array", "shape", "type", box=box.SIMPLE)
    shown.add_column("size", justify="right")
    for name, shape, dtype, n_bytes in arrays:
        shown.add_row(name, " x ".join(map(str, shape)) or "a number", dtype, size(n_bytes))
    out.print(shown)
    return errors.DONE


def verify(options: Verify, out: console.Console) -> int:
    """Print which checkpoints are whole, and what is damaged in others.

    Raises:
        UserError: there is no such checkpoint.
    """
    if options.all and options.step >= 0:
        raise errors.UserError(f"--all and --step={options.step} say different things: give one")
    found: list[dict[str, Any]] = []
    for entry in _chosen(options.folder, options.step, options.all):
        problem, n_arrays = "", 0
        try:
            n_arrays = verify_one(options.folder, entry, quiet=options.json)
        except metadata.DamagedError as error:
            problem = str(error)
        if problem and not (pathlib.Path(options.folder) / entry.name).is_dir():
            continue  # the run that writes there has removed it meanwhile
        found.append({"step": entry.step, "whole": not problem, "problem": problem or None})
        if not options.json:
            told = problem or f"step {entry.step} is whole: {n_arrays} arrays, all as written"
            out.print(told, soft_wrap=True)
    if options.json:
        _print_json(out, found)
    return errors.DONE if all(one["whole"] for one in found) else DAMAGED


def verify_one(folder: str, entry: listing.Entry, quiet: bool) -> int:
    """Read a checkpoint whole, block by block; return how many arrays it has.

    Raises:
        DamagedError: it names what cannot be read or is not as it was written.
    """
    import jax  # after parsing: it takes seconds

    from gpt3jax.checkpoint import parameters, storage

    jax.config.update("jax_platforms", "cpu")
    store = storage.Checkpoints(folder, read_only=True)
    meta = store.read_meta(entry.step)
    abstract_state = parameters.abstract_state(schema.unflatten(schema.Config, meta.config))
    names = storage.names(abstract_state, meta)
    with tqdm.tqdm(names, desc=f"step {entry.step}", unit=" arrays", disable=quiet or None) as bar:
        return store.verify(entry.step, abstract_state, bar)


def _chosen(folder: str, step: int, all_of_them: bool) -> list[listing.Entry]:
    """Return the checkpoints that a command is about, newest first."""
    found = [e for e in reversed(listing.entries(folder)) if e.name.isdigit()]
    chosen = [entry for entry in found if step < 0 or entry.step == step]
    if not chosen:
        has = "those of " + ", ".join(str(e.step) for e in found) if found else "none"
        asked = "checkpoint" if step < 0 else f"checkpoint of step {step}"
        raise errors.UserError(f"{folder} has no {asked}: it has {has}")
    return chosen if all_of_them else chosen[:1]


def _as_json(entry: listing.Entry) -> dict[str, Any]:
    meta = entry.meta
    return {
        "name": entry.name,
        "step": entry.step,
        "samples": meta.consumed_samples if meta else None,
        "state": entry.state,
        "written": entry.written,
        "bytes": entry.n_bytes,
        "only_params": meta.only_params if meta else None,
        "version": meta.version if meta else None,
    }


def _meta(entry: listing.Entry) -> dict[str, Any]:
    assert entry.meta is not None
    return dataclasses.asdict(entry.meta)


def _changes(meta: metadata.Meta) -> dict[str, str]:
    """Return what starts of a run changed, by the step that they went on from."""
    return {
        f"after step {start['step']:,}: {name}": f"{change['then']} -> {change['now']}"
        for start in meta.history
        for name, change in start["changes"].items()
    }


def _holds(meta: metadata.Meta | None) -> str:
    if meta is None:
        return "?"
    return "parameters alone" if meta.only_params else "whole state"


def _total(arrays: "list[storage.Array]") -> int:
    return sum(array.n_bytes for array in arrays)


def _time(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")


def size(n_bytes: float) -> str:
    """Return a number of bytes as text with a unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.0f} B" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.1f} TiB"


def _print_json(out: console.Console, value: Any) -> None:
    out.out(json.dumps(value, indent=2), highlight=False)


def main() -> int:
    """Parse, look, tell; return the exit status: 2 for errors, 1 where verify finds damage."""
    commands = (
        Annotated[List, tyro.conf.subcommand("list")]
        | Annotated[Show, tyro.conf.subcommand("show")]
        | Annotated[Verify, tyro.conf.subcommand("verify")]
    )
    run: dict[type, Callable[[Any, console.Console], int]] = {
        List: list_all,
        Show: show,
        Verify: verify,
    }

    def look() -> int:
        options = command.parse(commands, "checkpoint", __doc__)
        out = console.Console(width=None if sys.stdout.isatty() else 120, highlight=False)
        return run[type(options)](options, out)

    return command.run(look)


if __name__ == "__main__":
    sys.exit(main())
