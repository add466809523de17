"""`python -m gpt3jax.checkpoint`: look into a folder of checkpoints, and verify them.

    list DIR                           all checkpoints: step, samples, time, size, state
    show DIR [--step N]                one checkpoint: position, config, arrays
    verify DIR [--step N | --all]      read every array and compare it with its digest

The default is the newest checkpoint. Nothing in the folder is changed, and a run may write to it
meanwhile. No GPU and no mesh is needed, and only the memory of one layer.
"""

import dataclasses
import datetime
import json
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import tqdm
import tyro
from rich import box, console, table

from gpt3jax import errors
from gpt3jax.checkpoint import listing, metadata, sample_order
from gpt3jax.config import command_line, ranges, schema, user_paths

if TYPE_CHECKING:
    from gpt3jax.checkpoint import partial_reading

DAMAGED = 1  # the exit status of verify where a checkpoint is damaged


@dataclasses.dataclass(frozen=True, kw_only=True)
class List:
    """List all checkpoints of a folder, and what is left of unfinished or damaged ones."""

    folder: tyro.conf.Positional[user_paths.Path]
    """Folder of checkpoints: the checkpoint.dir of a run."""
    json: bool = False
    """Print JSON."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Show:
    """Show one checkpoint: its position, its config, its arrays."""

    folder: tyro.conf.Positional[user_paths.Path]
    """Folder of checkpoints: the checkpoint.dir of a run."""
    step: Annotated[int, ranges.Range(-1, ranges.INT32)] = -1
    """Step of the checkpoint (-1: the newest)."""
    json: bool = False
    """Print JSON."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verify:
    """Read every array and compare it with its digest; exit with 1 if a checkpoint is damaged."""

    folder: tyro.conf.Positional[user_paths.Path]
    """Folder of checkpoints: the checkpoint.dir of a run."""
    step: Annotated[int, ranges.Range(-1, ranges.INT32)] = -1
    """Step of the checkpoint (-1: the newest)."""
    all: bool = False
    """Verify all checkpoints of the folder."""
    json: bool = False
    """Print JSON."""


def list_all(options: List, out: console.Console) -> int:
    """Print a table, or JSON, of the checkpoints of a folder.

    Raises:
        UserError: the folder cannot be read.
    """
    entries = listing.entries(options.folder)
    if options.json:
        _print_json(out, [_as_json(entry) for entry in entries])
        return errors.DONE
    shown = table.Table(box=box.SIMPLE, title=options.folder, title_justify="left")
    for name in ("step", "samples", "written", "size", "state", "holds", "version"):
        shown.add_column(name, justify="right" if name in ("step", "samples", "size") else "left")
    for entry in entries:
        meta = entry.meta
        state = f"{entry.state} ({entry.name})" if entry.name.startswith("d") else entry.state
        shown.add_row(
            f"{entry.step:,}", f"{meta.consumed_samples:,}" if meta else "?", _time(entry.written),
            size(entry.n_bytes), state, _holds(meta), meta.version if meta else "?",
        )  # fmt: skip
    if entries:
        out.print(shown)
    else:
        out.print(f"{options.folder} has no checkpoint")
    return errors.DONE


def show(options: Show, out: console.Console) -> int:
    """Print the content of a checkpoint.

    Raises:
        UserError: it is not there, or its meta file cannot be read.
    """
    from gpt3jax.checkpoint import partial_reading  # after parsing: JAX takes seconds

    entry = _chosen(options.folder, options.step)[0]
    path = pathlib.Path(options.folder) / entry.name
    if entry.meta is None:
        raise metadata.DamagedError(f"checkpoint {path} has no meta file that can be read")
    arrays = partial_reading.arrays(path)
    if options.json:
        as_json = [{"name": n, "shape": s, "dtype": d, "bytes": b} for n, s, d, b in arrays]
        meta = dataclasses.asdict(entry.meta)
        _print_json(out, _as_json(entry) | {"meta": meta, "arrays": as_json})
        return errors.DONE
    n_bytes = sum(array.n_bytes for array in arrays)
    out.print(f"{path}: step {entry.step:,}, {entry.meta.consumed_samples:,} samples")
    out.print(
        f"{_holds(entry.meta)}, {size(entry.n_bytes)} on disk, {len(arrays)} arrays of "
        f"{size(n_bytes)}"
    )
    out.print(f"written {_time(entry.written)} by gpt3jax {entry.meta.version}")
    for title, rows in _tables(entry.meta).items():
        shown = table.Table(box=box.SIMPLE, show_header=False, title=title, title_justify="left")
        for name, value in rows.items():
            shown.add_row(name, str(value))
        out.print(shown)
    out.print(_table_of_arrays(arrays))
    return errors.DONE


def _tables(meta: metadata.Meta) -> dict[str, Mapping[str, object]]:
    """Return what a meta file says, as tables by their titles."""
    tables: dict[str, Mapping[str, object]] = {
        "order of samples": sample_order.in_words(meta.data_order),
        "config": meta.config,
    }
    if meta.history:
        tables["changed by starts of the run"] = _changes(meta)
    return tables


def _table_of_arrays(arrays: "list[partial_reading.Array]") -> table.Table:
    shown = table.Table("array", "shape", "type", box=box.SIMPLE)
    shown.add_column("size", justify="right")
    for name, shape, dtype, n_bytes in arrays:
        shown.add_row(name, " x ".join(map(str, shape)) or "a number", dtype, size(n_bytes))
    return shown


def verify(options: Verify, out: console.Console) -> int:
    """Print which checkpoints are whole, and what is damaged in the others.

    Raises:
        UserError: there is no such checkpoint.
    """
    if options.all and options.step >= 0:
        raise errors.UserError(
            f"--all and --step={options.step} say different things: give one",
            page="checkpoints.md#looking-into-a-folder",
        )
    results: list[dict[str, object]] = []
    chosen = _chosen(options.folder, options.step)
    for entry in chosen if options.all else chosen[:1]:
        problem, n_arrays = "", 0
        try:
            n_arrays = verify_entry(options.folder, entry, quiet=options.json)
        except metadata.DamagedError as error:
            problem = str(error)
        if problem and not (pathlib.Path(options.folder) / entry.name).is_dir():
            continue  # the run that writes there has removed it meanwhile
        results.append({"step": entry.step, "whole": not problem, "problem": problem or None})
        if not options.json:
            message = problem or f"step {entry.step} is whole: {n_arrays} arrays, all as written"
            out.print(message, soft_wrap=True)
    if options.json:
        _print_json(out, results)
    return errors.DONE if all(result["whole"] for result in results) else DAMAGED


def verify_entry(folder: str, entry: listing.Entry, *, quiet: bool) -> int:
    """Read all arrays of a checkpoint, block by block; return how many it has.

    Raises:
        DamagedError: it names what cannot be read or is not as it was written.
    """
    import jax  # after parsing: it takes seconds

    from gpt3jax.checkpoint import array_names, parameters, storage, verification

    jax.config.update("jax_platforms", "cpu")
    store = storage.Checkpoints(folder, read_only=True)
    meta = store.read_meta(entry.step)
    abstract_state = parameters.abstract_state(schema.unflatten(schema.Config, meta.config))
    names = array_names.saved_names(abstract_state, meta)
    with tqdm.tqdm(names, desc=f"step {entry.step}", unit=" arrays", disable=quiet or None) as bar:
        return verification.verify(store, entry.step, abstract_state, bar)


def _chosen(folder: str, step: int) -> list[listing.Entry]:
    """Return the whole checkpoints of a folder, newest first, or that of one step.

    Raises:
        UserError: there is none.
    """
    entries = [e for e in reversed(listing.entries(folder)) if e.name.isdigit()]
    chosen = [entry for entry in entries if step < 0 or entry.step == step]
    if not chosen:
        steps = "those of " + ", ".join(str(e.step) for e in entries) if entries else "none"
        missing = "checkpoint" if step < 0 else f"checkpoint of step {step}"
        raise errors.UserError(
            f"{folder} has no {missing}: it has {steps}",
            page="checkpoints.md#looking-into-a-folder",
        )
    return chosen


def _as_json(entry: listing.Entry) -> dict[str, object]:
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


def _time(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")


def size(n_bytes: float) -> str:
    """Return a number of bytes as text with a unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.0f} B" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.1f} TiB"


def _print_json(out: console.Console, value: object) -> None:
    out.out(json.dumps(value, indent=2), highlight=False)


def main() -> int:
    """Run the command; return the exit status: 2 for errors, 1 where verify finds damage."""
    commands = (
        Annotated[List, tyro.conf.subcommand("list")]
        | Annotated[Show, tyro.conf.subcommand("show")]
        | Annotated[Verify, tyro.conf.subcommand("verify")]
    )
    run: dict[type, Callable[[Any, console.Console], int]] = {  # Any: its own options
        List: list_all,
        Show: show,
        Verify: verify,
    }

    def run_command() -> int:
        options = command_line.parse(commands, "checkpoint", __doc__)
        out = console.Console(width=None if sys.stdout.isatty() else 120, highlight=False)
        return run[type(options)](options, out)

    return command_line.run(run_command)


if __name__ == "__main__":
    sys.exit(main())
