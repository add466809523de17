"""Saving and restoring a run's state, through Orbax (which only `array_blocks` imports as well).

A checkpoint holds the train state, or the parameters alone, a digest of each array, and the run's
position and config as JSON. Orbax writes it asynchronously and makes it appear under its final name
only when whole; but it restores flipped bits silently and tells of a failed write only at the next
save (0.12.8), so the digests are checked at restore, and `poll` looks for the file after each save.
"""

import contextlib
import dataclasses
import itertools
import json
import logging
import pathlib
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from gpt3jax import errors
from gpt3jax.checkpoint import array_blocks, array_digests, metadata, retention, stacking
from gpt3jax.config import schema, user_paths
from gpt3jax.distributed import messages
from gpt3jax.sharding import layouts

# What must be equal for weights to mean the same network.
_IDENTITY = (
    "model.n_layers", "model.d_model", "model.n_heads", "model.seq_len", "model.vocab_size",
    "model.vocab_multiple", "model.mask_padded_vocab", "model.gelu", "model.norm_eps",
    "model.attention.pattern", "model.attention.band",
)  # fmt: skip


class _ChangedError(metadata.DamagedError):
    """Arrays of a checkpoint that are not what their digests say."""

    def __init__(self, path: pathlib.Path, arrays: list[str]):
        super().__init__(
            f"checkpoint {path} was changed since it was written: {', '.join(arrays)} "
            "do not match their digests"
        )


class Checkpoints:
    """The checkpoints of one folder, by step."""

    def __init__(
        self,
        folder: str,
        max_to_keep: int | None = None,
        read_only: bool = False,
        keep_period: int = 0,
        before: int | None = None,
        lost: Callable[[], str] = lambda: "",
    ):
        """Open a folder, made if need be; `max_to_keep` newest ones are kept at each save.

        So are all whose steps are multiples of `keep_period` (0: no others), and what was kept so
        before. `read_only` is for another run's folder: nothing in it is changed. With `before`
        only those of earlier steps are seen. `lost` returns why the folder may not be written any
        more, "" while it may.

        Raises:
            UserError: the folder cannot be made or read, or is one step's.
        """
        self.folder = pathlib.Path(folder).absolute()
        self.n_failed = 0  # saves in a row, as far as `wait` has told
        self._read_only, self._before, self._lost = read_only, before, lost
        self._pending: int | None = None
        self._failure = ""
        self._outcome = ""  # of the last save, once it is known
        self._counted = True
        _silence_orbax()
        user_paths.check_not_a_step(self.folder)
        keep = retention.Keep(self.folder, max_to_keep, keep_period)
        try:
            if not read_only:
                self.folder.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(
                self.folder,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=keep,
                    cleanup_tmp_directories=not read_only,
                    read_only=read_only,
                    # Else a folder that cannot be made leaves threads that wait for it 5 minutes.
                    async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
                ),
                item_names=("state", "digests", "meta"),
            )
        except OSError as error:
            raise errors.UserError(f"checkpoint folder {folder}: {error}") from error
        self._known = set(self._manager.all_steps())  # what may be in the folder
        if not read_only and jax.process_index() == 0:
            keep.mark(self._known)

    def steps(self) -> list[int]:
        """Return the steps that have a whole checkpoint, newest first."""
        self._manager.reload()
        found = sorted(self._manager.all_steps(), reverse=True)
        return [n for n in found if self._before is None or n < self._before]

    def check_alone(self) -> None:
        """Check, before a save, that no other run writes to the folder; all processes must ask.

        Raises:
            UserError: one has taken the folder, or has written a step.
        """
        problem = self._lost()
        if not problem and jax.process_index() == 0:
            foreign = _steps_in(self.folder) - self._known
            if foreign:
                problem = (
                    f"{self.folder} has a checkpoint of step {max(foreign)}, which this run did "
                    "not write: another run is in its folder. Find out which, move what is not of "
                    "this run elsewhere, and start again"
                )
        messages.refuse_together(problem)

    def save(self, state: Any, meta: metadata.Meta) -> float:
        """Start to save; arrays are copied before this returns, files are written behind it.

        Returns the seconds that it took, in which no step can be dispatched. All processes must
        call it. A failure is told by `poll` and `wait`.
        """
        begin = time.monotonic()
        self.wait()
        self._save(
            ocp.args.StandardSave(state, _save_args(state)), array_digests.digests(state), meta
        )
        return time.monotonic() - begin

    def save_params(self, params: Any, meta: metadata.Meta) -> None:
        """Save parameters alone, a tree of `array_blocks.Blocks`; each block is asked for twice.

        Raises:
            UserError: what the blocks raise, before anything is written.
        """
        sums = [array_digests.digest_of_blocks(leaf) for leaf in jax.tree.leaves(params)]
        state = {"params": params}
        self._save(
            ocp.args.PyTreeSave(state, _save_args(state)),
            np.stack(sums),
            dataclasses.replace(meta, only_params=True),
        )

    def _save(self, state: Any, sums: Any, meta: metadata.Meta) -> None:
        self._pending, self._counted = meta.step, False
        self._known.add(meta.step)
        self._failure = self._unwritable()
        if self._failure:
            return
        items = ocp.args.Composite(
            state=state,
            digests=ocp.args.StandardSave({"leaves": sums}),
            meta=ocp.args.JsonSave(metadata.with_digest(dataclasses.asdict(meta))),
        )
        # Orbax raises here what an earlier save left behind, each once. Beside other processes,
        # which may not have failed, a second call would meet the barriers of their first.
        for _ in range(3 if jax.process_count() == 1 else 1):
            try:
                self._manager.save(meta.step, args=items)
                self._failure = ""
                return
            except Exception as error:  # as in poll
                self._failure = _first_line(error)

    def _unwritable(self) -> str:
        """Return why a process cannot write in the folder, "" if all can.

        Orbax has barriers without a time limit in a save: a process that fails before them leaves
        the others waiting. So all of them try first, and none begins where one would fail.
        """
        if jax.process_count() == 1:
            return ""
        failure, trial = "", self.folder / f"write-test-{jax.process_index()}"
        try:
            trial.mkdir(exist_ok=True)
            (trial / "file").write_bytes(bytes(4096))
        except OSError as error:
            failure = _first_line(error)
        shutil.rmtree(trial, ignore_errors=True)
        anywhere = messages.on_any_process(bool(failure))
        return failure or ("another process cannot write there" if anywhere else "")

    def poll(self, wait: bool = False) -> str | None:
        """Return what became of the last save, once it is known: "" for success, or the failure.

        A failed save leaves nothing behind: its partial files are removed, so that they do not
        fill a full disk.
        """
        if self._pending is None or (not wait and self._manager.is_saving_in_progress()):
            return None
        step, self._pending = self._pending, None
        failure = self._failure
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # whatever the storage raises; reported, training goes on
            failure = failure or _first_line(error)
        self._outcome = ""
        if not (self.folder / str(step)).is_dir():
            for rest in self.folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(rest, ignore_errors=True)
            self._drain()
            told = failure or "it is not there"
            self._outcome = f"step {step} was not saved in {self.folder}: {told}"
        return self._outcome

    def wait(self) -> str:
        """Wait for the last save; return "" or why it failed, and count those in `n_failed`.

        All processes must ask, at the same place: a save that failed for one failed for all.
        """
        self.poll(wait=True)
        if not self._counted:
            self._counted = True
            failed = messages.on_any_process(bool(self._outcome))
            self.n_failed = self.n_failed + 1 if failed else 0
            if failed:
                self._outcome = self._outcome or "another process could not save"
        return self._outcome

    def _drain(self) -> None:
        """Take from Orbax what it would raise in the next save, where only this process has it."""
        for check in (self._manager.wait_until_finished, self._manager.check_for_errors) * 2:
            with contextlib.suppress(Exception):
                check()
        self._manager.reload()  # else it counts the step as there, and drops an older one for it

    def read_meta(self, step: int) -> metadata.Meta:
        """Return what the checkpoint of a step says besides the state.

        Raises:
            DamagedError: it cannot be read.
        """
        with _reading(self.folder / str(step)):
            saved = self._manager.restore(
                step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
            )
            return metadata.checked_meta(dict(saved["meta"]))

    def restore(
        self, step: int, abstract_state: Any, wanted: Callable[[str], bool] = lambda name: True
    ) -> Any:
        """Return the state of a step in the layout (shapes, types, shardings) asked for.

        Layers that were stacked by another number of virtual stages are read as they were written
        and stacked anew, array by array. Arrays whose names (`params/norm/scale_D/value`) are not
        `wanted` are not read: the state has `...` in their places.

        Raises:
            DamagedError: files are missing, cut or changed; it names the arrays.
        """
        meta = self.read_meta(step)
        written = jax.tree.map_with_path(
            lambda path, leaf: leaf if wanted(_name(path)) else ocp.PLACEHOLDER,
            stacking.as_written(abstract_state, meta.config.get("mesh.virtual_stages", 1)),
        )
        with _reading(self.folder / str(step)):
            sums = self._read_digests(step, meta, abstract_state)
            if ocp.PLACEHOLDER in jax.tree.leaves(written):
                state = self._read_part(step, written, meta)
            else:
                items = ocp.args.Composite(state=ocp.args.StandardRestore(written))
                state = self._manager.restore(step, args=items)["state"]
        _check_digests(self.folder / str(step), state, sums)
        return jax.tree.map(
            lambda leaf, like: leaf if leaf is ocp.PLACEHOLDER else stacking.restacked(leaf, like),
            state,
            abstract_state,
        )

    def read_blocks(self, step: int, abstract_state: Any, name: str) -> Iterator[np.ndarray]:
        """Yield an array by its name, rows of its first dimension by rows; layers are `[L, ...]`.

        Raises:
            DamagedError: as `restore`; that a value was changed is known only after the last rows.
        """
        meta, path = self.read_meta(step), self.folder / str(step)
        with _reading(path):
            expected = self._read_digests(step, meta, abstract_state)[name]
        yield from _checked_blocks(path, name, meta, expected)

    def verify(self, step: int, abstract_state: Any, wanted: Iterable[str]) -> int:
        """Read arrays by their names, block by block, and compare them; return how many.

        Raises:
            DamagedError: what cannot be read, or the names of all arrays that were changed.
        """
        meta, path = self.read_meta(step), self.folder / str(step)
        with _reading(path):
            expected = self._read_digests(step, meta, abstract_state)
            missing = sorted(expected.keys() - {array.name for array in arrays(path)})
            if missing:
                raise ValueError(f"it does not have {', '.join(missing)}")
            # Through Orbax, which reads files of its own as well.
            self._read_part(step, _smallest_alone(abstract_state, meta), meta)
        changed = []
        for name in wanted:
            try:
                for _ in _checked_blocks(path, name, meta, expected[name]):
                    pass
            except _ChangedError:
                changed.append(name)
        if changed:
            raise _ChangedError(path, changed)
        return len(expected)

    def _read_digests(
        self, step: int, meta: metadata.Meta, abstract_state: Any
    ) -> dict[str, np.ndarray]:
        """Return the digests of a checkpoint by the names of its arrays."""
        found = self._read_digest_rows(step, len(names(abstract_state, meta)), abstract_state)
        return dict(zip(names(abstract_state, meta), found, strict=True))

    def _read_digest_rows(self, step: int, n_arrays: int, abstract_state: Any) -> np.ndarray:
        # Without a layout of ours Orbax asks for the devices that the checkpoint was written on.
        mesh = jax.tree.leaves(abstract_state)[0].sharding.mesh
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        leaves = jax.ShapeDtypeStruct((n_arrays, 2), jnp.uint32, sharding=whole)
        items = ocp.args.Composite(digests=ocp.args.StandardRestore({"leaves": leaves}))
        return np.asarray(self._manager.restore(step, args=items)["digests"]["leaves"])

    def _read_part(self, step: int, written: Any, meta: metadata.Meta) -> Any:
        # A standard item is read whole, and the manager keeps one reader for an item.
        item = {"params": written.params} if meta.only_params else written
        restore_args = ocp.checkpoint_utils.construct_restore_args(item)
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            args = ocp.args.PyTreeRestore(item, restore_args)
            found = reader.restore(self.folder / str(step) / "state", args=args)
        return dataclasses.replace(written, **found) if meta.only_params else found

    def set_aside(self, steps: list[int]) -> None:
        """Rename damaged checkpoints of our own, so that their steps can be saved again."""
        for step in steps if jax.process_index() == 0 and not self._read_only else ():
            names = (f"damaged-{step}" + (f"-{n}" if n else "") for n in itertools.count())
            free = next(name for name in names if not (self.folder / name).exists())
            (self.folder / str(step)).rename(self.folder / free)
        self._manager.reload()

    def close(self) -> None:
        """Wait for a save under way and free the manager's threads."""
        self.poll(wait=True)
        with contextlib.suppress(Exception):  # once more what poll reported
            self._manager.close()


def _steps_in(folder: pathlib.Path) -> set[int]:
    """Return the steps of the checkpoints that are in a folder now."""
    try:
        return {int(p.name) for p in folder.iterdir() if p.name.isdecimal() and p.is_dir()}
    except OSError:  # the store fails: the save that follows tells
        return set()


def choose_source(store: Checkpoints | None, load: str) -> Checkpoints | None:
    """Return where to start from: the run's own folder if it has a checkpoint, else `load`.

    Raises:
        UserError: `load` is needed and has none.
    """
    if store is not None and store.steps():
        return store
    if not load:
        return None
    loaded = Checkpoints(load, read_only=True) if pathlib.Path(load).is_dir() else None
    if loaded is None or not loaded.steps():
        raise errors.UserError(
            f"checkpoint.load={load} has no checkpoint: correct the folder, or leave the option "
            "out to start from random weights"
        )
    return loaded


class Array(NamedTuple):
    """An array of a checkpoint, as its files describe it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    n_bytes: int


def arrays(path: pathlib.Path) -> list[Array]:
    """Return the arrays of a checkpoint's folder; none is read.

    Raises:
        DamagedError: the files that describe them cannot be read.
    """
    with _reading(path):
        tree = json.loads((path / "state" / "_METADATA").read_text())["tree_metadata"]
        found = [
            ("/".join(key["key"] for key in leaf["key_metadata"]), leaf["value_metadata"])
            for leaf in tree.values()
        ]
        saved = sorted(name for name, value in found if value["value_type"] != "None")
        return [Array(name, *array_blocks.describe(path / "state", name)) for name in saved]


def _smallest_alone(abstract_state: Any, meta: metadata.Meta) -> Any:
    """Return the layout as written with only the smallest array in it."""
    written = stacking.as_written(abstract_state, meta.config.get("mesh.virtual_stages", 1))
    leaves = jax.tree_util.tree_leaves_with_path(written)
    saved = names(abstract_state, meta)
    sizes = {_name(p): leaf.size for p, leaf in leaves if _name(p) in saved}
    smallest = min(sizes, key=lambda name: sizes[name])
    return jax.tree.map_with_path(
        lambda path, leaf: leaf if _name(path) == smallest else ocp.PLACEHOLDER, written
    )


def names(abstract_state: Any, meta: metadata.Meta) -> list[str]:
    """Return the names of a checkpoint's arrays, in the order of their digests."""
    found = [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(abstract_state)]
    return [name for name in found if is_param(name)] if meta.only_params else found


def is_param(name: str) -> bool:
    """Tell by its name whether an array of a state is a parameter of the network."""
    return name.startswith("params/")


def check_same_model(cfg: schema.Config, meta: metadata.Meta) -> None:
    """Check that a checkpoint is of this config's network.

    Raises:
        UserError: it is of another one; the differences.
    """
    mine = schema.flatten(cfg)
    differ = [n for n in _IDENTITY if meta.config.get(n) != mine[n]]
    if mine["model.attention.pattern"] == "dense" and "model.attention.pattern" not in differ:
        differ = [n for n in differ if n != "model.attention.band"]
    if differ:
        table = "\n".join(f"  {n}: checkpoint {meta.config.get(n)}, here {mine[n]}" for n in differ)
        raise errors.UserError(
            f"the checkpoint of step {meta.step} is of another model:\n{table}\n"
            "use its values, or another checkpoint.dir"
        )


def check_same_order(cfg: schema.Config, meta: metadata.Meta, data_order: dict[str, Any]) -> None:
    """Check that a run with this data order may go on from a checkpoint.

    Raises:
        UserError: samples would come in another order; the differences.
    """
    before = {k: v for k, v in meta.data_order.items() if k in data_order}
    changed = [k for k in before if before[k] != data_order[k]]  # earlier versions wrote fewer
    if meta.consumed_samples and changed and not cfg.checkpoint.allow_new_data_order:
        table = "\n".join(f"  {k}: checkpoint {before[k]}, here {data_order[k]}" for k in changed)
        raise errors.UserError(
            f"after step {meta.step} samples would come in another order, some twice and some "
            f"never:\n{table}\nrestore these values, or accept it with "
            "--checkpoint.allow-new-data-order"
        )


def _save_args(state: Any) -> Any:
    """Return, for each array, how it is cut."""

    def one(node: Any) -> Any:
        axes = layouts.variable_axes(node) if layouts.is_variable(node) else ()
        n_stacked = axes.index("layers") + 1 if "layers" in axes else 0
        return jax.tree.map(lambda _: array_blocks.save_args(n_stacked), node)

    return jax.tree.map(one, state, is_leaf=layouts.is_variable)


def _check_digests(path: pathlib.Path, state: Any, expected: dict[str, np.ndarray]) -> None:
    read = [
        (_name(p), leaf)
        for p, leaf in jax.tree_util.tree_leaves_with_path(state)
        if leaf is not ocp.PLACEHOLDER
    ]
    found = np.asarray(array_digests.digests([leaf for _, leaf in read]))
    names = [n for (n, _), got in zip(read, found, strict=True) if (got != expected[n]).any()]
    if names:
        raise _ChangedError(path, names)


def _checked_blocks(
    path: pathlib.Path, name: str, meta: metadata.Meta, expected: np.ndarray
) -> Iterator[np.ndarray]:
    """Yield an array in blocks, and compare it with its digest after the last."""
    stacked_twice = meta.config.get("mesh.virtual_stages", 1) > 1
    n_stacked = (1 + stacked_twice) if "/blocks/" in name else 0
    found = np.zeros(2, np.uint32)
    with _reading(path):
        blocks = array_blocks.read(path / "state", name, n_stacked)
        for first, rows in blocks:
            found += array_digests.block_digest(blocks.shape, first, rows)
            yield rows
    if (found != expected).any():
        raise _ChangedError(path, [name])


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


@contextlib.contextmanager
def _reading(path: pathlib.Path) -> Iterator[None]:
    """Turn what Orbax raises on unreadable files into one line that names the checkpoint."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError, PermissionError):
        raise  # says nothing about the files
    except Exception as error:
        raise metadata.DamagedError(
            f"checkpoint {path} cannot be read: {_first_line(error)}"
        ) from None


def _silence_orbax() -> None:
    """Keep Orbax's threads from printing hundreds of lines on a failure that we report in one."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    shown, known = sys.unraisablehook, ("Event loop is closed", "error while reading array index")

    def hook(unraisable: Any) -> None:
        if not any(words in str(unraisable.exc_value) for words in known):
            shown(unraisable)

    sys.unraisablehook = hook


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"
