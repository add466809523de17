"""The checkpoints of a folder: open, list, save and restore, through Orbax.

A checkpoint holds the train state, or the parameters alone, a digest of each array, and the run's
position and config as JSON. Orbax writes it asynchronously and makes it appear under its final name
only when whole; but it restores flipped bits silently and reports a failed write only at the next
save (0.12.8), so the digests are checked at restore, and `poll` looks for the file after each save.
"""

import contextlib
import dataclasses
import itertools
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from gpt3jax import errors
from gpt3jax.checkpoint import (
    array_blocks,
    array_digests,
    array_names,
    layer_stacking,
    metadata,
    orbax_errors,
    partial_reading,
    retention,
)
from gpt3jax.config import schema, user_paths
from gpt3jax.distributed import messages, node_speaker
from gpt3jax.sharding import moving, spreading

State = TypeVar("State")
_DEFAULTS = schema.Checkpoint()


@dataclasses.dataclass(kw_only=True)
class _Save:
    """The last save of a process: under way, ended, or counted by all processes."""

    step: int | None = None
    """None: nothing was saved yet."""
    n_failed: int = 0
    """Saves in a row that failed: without this one until it is counted."""
    failure: str = ""
    """Why it could not begin."""
    outcome: str | None = None
    """None: under way. "": it succeeded. Otherwise why it failed."""
    is_counted: bool = False
    """All processes know how it ended."""


class Checkpoints:
    """The checkpoints of one folder, by step."""

    def __init__(
        self,
        folder: str,
        max_to_keep: int | None = None,
        *,
        read_only: bool = False,
        keep_period: int = 0,
        before: int | None = None,
        save_timeout: int = _DEFAULTS.save_timeout,
        lost: Callable[[], str] = lambda: "",
    ):
        """Open a folder, made if need be; each save keeps the `max_to_keep` newest checkpoints.

        It also keeps those whose steps are multiples of `keep_period` (0: none), and what an
        earlier start kept for good. `read_only` is for another run's folder: nothing in it is
        changed. Only checkpoints of steps before `before` are listed (None: all). A save fails
        after `save_timeout` seconds. `lost` returns why the run may no longer write to the folder,
        "" while it may.

        Raises:
            UserError: the folder cannot be made or read, or is itself a checkpoint.
        """
        self.folder = pathlib.Path(folder).absolute()
        self._read_only, self._before, self._lost = read_only, before, lost
        self._save_timeout = save_timeout
        self._last_save = _Save(outcome="", is_counted=True)
        orbax_errors.silence()
        user_paths.check_not_a_step(self.folder)
        keep = retention.Keep(self.folder, max_to_keep, keep_period)
        try:
            if not read_only:
                self.folder.mkdir(parents=True, exist_ok=True)
            self._manager = _manager(self.folder, keep, save_timeout, read_only=read_only)
        except OSError as error:
            raise errors.UserError(
                f"checkpoint folder {folder}: {error}", page="operations.md#by-symptom"
            ) from error
        self._known_steps = set(self._manager.all_steps())  # there, or written since by this run
        if not read_only and jax.process_index() == 0:
            keep.mark(self._known_steps)

    @property
    def n_failed(self) -> int:
        """How many saves in a row failed, as of the last `wait`."""
        return self._last_save.n_failed

    def path(self, step: int) -> pathlib.Path:
        """Return the folder of the checkpoint of a step."""
        return self.folder / str(step)

    def steps(self) -> list[int]:
        """Return the steps that have a whole checkpoint, newest first."""
        self._manager.reload()
        steps = sorted(self._manager.all_steps(), reverse=True)
        return [step for step in steps if self._before is None or step < self._before]

    def check_alone(self) -> None:
        """Check before a save that no other run writes to the folder; all processes must call it.

        Raises:
            UserError: another run has taken over the folder, or has written a checkpoint there.
        """
        problem = self._lost()
        if not problem and jax.process_index() == 0:
            foreign = _steps_in(self.folder) - self._known_steps
            if foreign:
                problem = (
                    f"{self.folder} has a checkpoint of step {max(foreign)}, which this run did "
                    "not write: another run is in its folder. Find out which, move what is not of "
                    "this run elsewhere, and start again"
                )
        messages.refuse_together(problem, page="operations.md#one-run-in-a-folder")

    def save(self, state: array_names.PyTree, meta: metadata.Meta) -> float:
        """Start to save; arrays are copied before this returns, files are written behind it.

        Returns the seconds that it took, in which no step can be dispatched. All processes must
        call it. `poll` and `wait` report a failure.
        """
        begin = time.monotonic()
        self.wait()
        self._start(
            ocp.args.StandardSave(state, _save_args(state)), array_digests.digests(state), meta
        )
        return time.monotonic() - begin

    def save_params(self, params: array_names.PyTree, meta: metadata.Meta) -> None:
        """Save parameters alone, a tree of `array_blocks.Blocks`; each block is made twice.

        Raises:
            UserError: what the blocks raise, before anything is written.
        """
        digests = [array_digests.digest_of_blocks(leaf) for leaf in jax.tree.leaves(params)]
        state = {"params": params}
        self._start(
            ocp.args.PyTreeSave(state, _save_args(state)),
            np.stack(digests),
            dataclasses.replace(meta, only_params=True),
        )

    def _start(
        self,
        state: ocp.args.CheckpointArgs,
        digests: jax.Array | np.ndarray,
        meta: metadata.Meta,
    ) -> None:
        save = self._last_save = _Save(step=meta.step, n_failed=self.n_failed)
        self._known_steps.add(meta.step)
        save.failure = self._unwritable()
        if save.failure:
            return
        items = ocp.args.Composite(
            state=state,
            digests=ocp.args.StandardSave({"leaves": digests}),
            meta=ocp.args.JsonSave(metadata.with_checksum(dataclasses.asdict(meta))),
        )
        # Orbax raises here what an earlier save left behind, each error once. With several
        # processes, of which some may not have failed, a second call would meet the barriers of
        # their first.
        for _ in range(3 if jax.process_count() == 1 else 1):
            try:
                self._manager.save(meta.step, args=items)
                save.failure = ""
                return
            except Exception as error:  # as in poll
                save.failure = self._reason(error)

    def _unwritable(self) -> str:
        """Return why a process cannot write in the folder, "" if all can.

        Orbax has barriers without a time limit in a save: a process that fails before them leaves
        the others waiting. So all of them try first (in a large run one of each node), and none
        begins where one would fail.
        """
        if jax.process_count() == 1:
            return ""
        failure, trial = "", self.folder / f"write-test-{jax.process_index()}"
        if node_speaker.speaks():
            try:
                trial.mkdir(exist_ok=True)
                (trial / "file").write_bytes(bytes(4096))
            except OSError as error:
                failure = orbax_errors.first_line(error)
            shutil.rmtree(trial, ignore_errors=True)
        anywhere = messages.on_any_process(bool(failure))
        return failure or ("another process cannot write there" if anywhere else "")

    def is_saving(self) -> bool:
        """Return whether files of a save are still being written."""
        return bool(self._manager.is_saving_in_progress())

    def poll(self, *, wait: bool = False) -> str | None:
        """Return once how the last save ended, "" for success or why it failed; else None.

        A failed save leaves nothing behind: its partial files are removed, so that they do not
        fill a full disk.
        """
        save = self._last_save
        if save.outcome is not None or (not wait and self.is_saving()):
            return None
        assert save.step is not None
        failure = save.failure
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # whatever the storage raises; reported, training goes on
            failure = failure or self._reason(error)
        if self.path(save.step).is_dir():
            save.outcome = ""
        else:
            self._clean_up()
            reason = failure or "it is not there"
            save.outcome = f"step {save.step} was not saved in {self.folder}: {reason}"
        return save.outcome

    def _reason(self, error: Exception) -> str:
        """Return in a line why a save failed."""
        if orbax_errors.is_time_limit(error):
            return (
                f"it was not written within checkpoint.save_timeout={self._save_timeout} s: raise "
                "that, and watchdog.slow_phase_seconds with it, or use a faster store"
            )
        return orbax_errors.first_line(error)

    def wait(self) -> str:
        """Wait for the last save; return "" or why it failed, and count failures in `n_failed`.

        All processes must call it, at the same place: a save that failed for one failed for all.
        """
        self.poll(wait=True)
        save = self._last_save
        if not save.is_counted:
            save.is_counted = True
            failed = messages.on_any_process(bool(save.outcome))
            save.n_failed = save.n_failed + 1 if failed else 0
            if failed:
                save.outcome = save.outcome or "another process could not save"
        return save.outcome or ""

    def _clean_up(self) -> None:
        """Remove the files of a failed save, and what Orbax would raise for it in the next one."""
        for path in self.folder.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(path, ignore_errors=True)
        for check in (self._manager.wait_until_finished, self._manager.check_for_errors) * 2:
            with contextlib.suppress(Exception):
                check()
        self._manager.reload()  # else it lists the step, and removes an older one in its favour

    def read_meta(self, step: int) -> metadata.Meta:
        """Return what the checkpoint of a step says besides the state.

        Raises:
            DamagedError: it cannot be read.
        """
        with orbax_errors.named(self.path(step)):
            return metadata.read(self.path(step))

    def read_meta_together(self, step: int) -> metadata.Meta:
        """Return the same in all processes, which must all call it.

        Raises:
            DamagedError: one of them cannot read it.
        """
        with _same_for_all(self.path(step)):
            return self.read_meta(step)

    def read_digests(
        self, step: int, meta: metadata.Meta, abstract_state: array_names.PyTree
    ) -> dict[str, np.ndarray]:
        """Return the digests of a checkpoint by the names of its arrays."""
        names = array_names.saved_names(abstract_state, meta)
        # Without a layout of ours Orbax looks for the devices that the checkpoint was written on.
        mesh = jax.tree.leaves(abstract_state)[0].sharding.mesh
        replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        leaves = jax.ShapeDtypeStruct((len(names), 2), jnp.uint32, sharding=replicated)
        read = partial_reading.read_tree(self.path(step) / "digests", {"leaves": leaves})
        return dict(zip(names, np.asarray(read["leaves"]), strict=True))

    def restore(
        self,
        step: int,
        abstract_state: State,
        wanted: Callable[[str], bool] = lambda name: True,
    ) -> State:
        """Return the state of a step in a layout: shapes, types, shardings.

        Layers that were stacked for another number of virtual stages are read as they were written
        and stacked anew, array by array. Arrays whose names (`params/norm/scale_D/value`) are not
        `wanted` are not read: the state has `...` in their places. Of an array that several devices
        are to have, each reads a share, and gets the others' over the network. All processes must
        call it.

        Raises:
            DamagedError: files are missing, cut or changed, here or for another process; it names
                the arrays.
        """
        meta, path = self.read_meta_together(step), self.path(step)
        layout = partial_reading.only(
            layer_stacking.as_written(abstract_state, meta.config_as_laid_out), wanted
        )
        with _same_for_all(path), orbax_errors.named(path):
            expected = self.read_digests(step, meta, abstract_state)
            shares = partial_reading.read_state(path, _map_read(spreading.spread, layout), meta)
        state = _map_read(spreading.gather, shares, layout)
        partial_reading.check_digests(path, state, expected)
        return _map_read(moving.move_array, state, abstract_state)

    def read_blocks(
        self, step: int, abstract_state: array_names.PyTree, name: str
    ) -> Iterator[np.ndarray]:
        """Yield an array by its name, in blocks of rows; layers are `[L, ...]`.

        Raises:
            DamagedError: as `restore`; that a value was changed is known only after the last rows.
        """
        meta, path = self.read_meta(step), self.path(step)
        with orbax_errors.named(path):
            expected = self.read_digests(step, meta, abstract_state)[name]
        n_stacked = layer_stacking.stacked_by_name(abstract_state, meta.config_as_laid_out)[name]
        yield from partial_reading.read_blocks(path, name, n_stacked, expected)

    def set_aside(self, steps: list[int]) -> None:
        """Rename damaged checkpoints of our own, so that their steps can be saved again."""
        for step in steps if jax.process_index() == 0 and not self._read_only else ():
            names = (f"damaged-{step}" + (f"-{n}" if n else "") for n in itertools.count())
            free = next(name for name in names if not (self.folder / name).exists())
            self.path(step).rename(self.folder / free)
        self._manager.reload()

    def close(self) -> None:
        """Wait for a save under way and free the manager's threads."""
        self.poll(wait=True)
        with contextlib.suppress(Exception):  # poll reported it
            self._manager.close()


def _map_read(function: Callable[..., Any], *states: array_names.PyTree) -> array_names.PyTree:
    """Return a state with `function` called for each array, but for those that are not read."""

    def call(leaf: Any, *others: Any) -> Any:  # an array, or what stands for one
        return leaf if leaf is partial_reading.NOT_READ else function(leaf, *others)

    return jax.tree.map(call, *states)


@contextlib.contextmanager
def _same_for_all(path: pathlib.Path) -> Iterator[None]:
    """Let all processes fail where one finds damage: they read different parts of a checkpoint.

    Raises:
        DamagedError: this process's own, or that another one has some.
    """
    problem: metadata.DamagedError | None = None
    try:
        yield
    except metadata.DamagedError as error:
        problem = error
    if messages.on_any_process(problem is not None):
        raise problem or metadata.DamagedError(
            f"checkpoint {path}: another process cannot read its part of it"
        )


def _manager(
    folder: pathlib.Path, keep: retention.Keep, save_timeout: int, *, read_only: bool
) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
        folder,
        options=ocp.CheckpointManagerOptions(
            preservation_policy=keep,
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
            async_options=ocp.options.AsyncOptions(
                timeout_secs=save_timeout,
                # Else a folder that cannot be made leaves threads that wait for it 5 minutes.
                create_directories_asynchronously=False,
            ),
        ),
        item_names=("state", "digests", "meta"),
    )


def _steps_in(folder: pathlib.Path) -> set[int]:
    """Return the steps of the checkpoints that are in a folder now."""
    try:
        return {int(p.name) for p in folder.iterdir() if p.name.isdecimal() and p.is_dir()}
    except OSError:  # the store fails: the save that follows reports it
        return set()


def _save_args(state: array_names.PyTree) -> array_names.PyTree:
    """Return, for each array, how it is cut."""
    return jax.tree.map(array_blocks.save_args, layer_stacking.stacked_dims(state))
