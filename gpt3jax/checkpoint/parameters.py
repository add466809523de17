"""A trained model for use: config, parameters and tokenizer of a checkpoint, no optimizer."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from gpt3jax import errors, step
from gpt3jax.checkpoint import array_blocks, metadata, storage
from gpt3jax.config import schema
from gpt3jax.data import tokenizer, tokenizer_files, tokenizer_sources
from gpt3jax.distributed import joining
from gpt3jax.sharding import meshes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """A checkpoint to read parameters from, on a mesh.

    Attributes:
        cfg: the config it was written with, but for dropout, remat and mesh, which are those of
            use without training.
        program: how a model of this config runs on the mesh.
    """

    store: storage.Checkpoints
    cfg: schema.Config
    program: step.Program
    step: int

    def params(self, wanted: Callable[[str], bool] = lambda name: True) -> Any:
        """Return the parameters (`model.GPT`), or some by name, with `...` in place of others.

        Raises:
            DamagedError: they cannot be read, or were changed since they were written.
        """

        def of_params(name: str) -> bool:
            return storage.is_param(name) and wanted(short_name(name))

        state = self.store.restore(self.step, self.program.abstract_state, of_params)
        return state.params

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """Yield a parameter by its name, rows by rows, layers (`[L, ...]`) by layers.

        Raises:
            DamagedError: as `params`; that it was changed is known only after the last rows.
        """
        return self.store.read_blocks(self.step, self.program.abstract_state, long_name(name))

    def whole(self, name: str) -> np.ndarray:
        """Return a parameter by its name.

        Raises:
            DamagedError: as `params`.
        """
        [shape] = [
            leaf.shape
            for path, leaf in jax.tree_util.tree_leaves_with_path(
                self.program.abstract_state.params
            )
            if short_name(jax.tree_util.keystr(path, simple=True, separator="/")) == name
        ]
        out, n = np.empty(shape, np.float32), 0  # not joined from a list, which would need it twice
        for rows in self.blocks(name):
            out[n : n + len(rows)] = rows
            n += len(rows)
        return out


def find(folder: str) -> tuple[storage.Checkpoints, int, schema.Config]:
    """Return the checkpoints of a folder, the newest one's step and the config in it.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    store = storage.Checkpoints(folder, read_only=True) if pathlib.Path(folder).is_dir() else None
    if store is None or not store.steps():
        raise errors.UserError(
            f"--checkpoint={folder} has no checkpoint: give the folder that a run's checkpoint.dir "
            "names, or one that gpt3jax.convert wrote"
        )
    newest = store.steps()[0]
    return store, newest, schema.unflatten(schema.Config, store.read_meta(newest).config)


def open_newest(folder: str, mesh: jax.sharding.Mesh, compute_dtype: Any = "float32") -> Trained:
    """Return the newest checkpoint of a folder, for use on a mesh.

    Raises:
        UserError: as `find`, or the model does not fit the mesh.
    """
    store, newest, cfg = find(folder)
    cfg = _without_training(cfg, compute_dtype)
    program = step.build(cfg, mesh, run_samples=1)
    return Trained(store=store, step=newest, cfg=cfg, program=program)


def abstract_state(cfg: schema.Config) -> Any:
    """Return the layout of a config's state on the first device, whatever its own mesh."""
    mesh = meshes.make_mesh(schema.Mesh())
    return step.build(_without_training(cfg, "float32"), mesh, run_samples=1).abstract_state


def _without_training(cfg: schema.Config, compute_dtype: Any) -> schema.Config:
    return dataclasses.replace(
        cfg,
        model=dataclasses.replace(
            cfg.model,
            dropout=0.0,
            attention_dropout=0.0,
            remat="none",
            attention=dataclasses.replace(cfg.model.attention, implementation="auto"),
        ),
        mesh=schema.Mesh(sequence_parallel=False),
        precision=dataclasses.replace(cfg.precision, compute_dtype=compute_dtype),
    )


def open_for_use(folder: str, axes: schema.Mesh, compute_dtype: str) -> Trained:
    """Return the newest checkpoint of a folder, on the mesh that a command asks for.

    What `stage` and `context` ask for is added to `fsdp`. The format "auto" is float32 on a CPU,
    bfloat16 elsewhere.

    Raises:
        UserError: as `open_newest`, or the axes do not fit the devices.
    """
    joining.start(schema.Distributed(), axes)
    asked = meshes.make_mesh(axes).shape
    folded = asked["fsdp"] * asked["stage"] * asked["context"]
    mesh = meshes.make_mesh(schema.Mesh(data=asked["data"], fsdp=folded, tensor=asked["tensor"]))
    if compute_dtype == "auto":
        compute_dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return open_newest(folder, mesh, compute_dtype)


def open_tokenizer(
    folder: str, cfg: schema.Config, source: tokenizer_sources.Source
) -> tokenizer.Tokenizer:
    """Return the tokenizer that a command names, else the one that the folder's checkpoint does.

    Files that are no longer where the checkpoint says are looked for in its folder.

    Raises:
        UserError: none is named, it cannot be read, or it has more tokens than the model.
    """
    given = source.tokenizer or source.vocab_file or source.merge_file
    found = source.open() if given else _own_tokenizer(folder, cfg, source.eod_token)
    if found.vocab_size > cfg.model.vocab_size:
        raise errors.UserError(
            f"the tokenizer has {found.vocab_size} tokens and the model "
            f"model.vocab_size={cfg.model.vocab_size}: give the one it was trained with"
        )
    return found


def _own_tokenizer(folder: str, cfg: schema.Config, eod_token: str) -> tokenizer.Tokenizer:
    data = tokenizer_files.moved(cfg.data, pathlib.Path(folder))
    if not (data.vocab_file or data.tokenizer):
        raise errors.UserError(
            f"--checkpoint={folder} names no tokenizer (data.vocab_file, data.tokenizer): give "
            "--vocab-file and --merge-file, or --tokenizer"
        )
    return tokenizer_sources.of_config(data, eod_token)


def new_store(folder: str) -> storage.Checkpoints:
    """Return the checkpoints of a folder, which has none yet.

    Raises:
        UserError: it has.
    """
    store = storage.Checkpoints(folder)
    if store.steps():
        raise errors.UserError(f"--output={folder} has checkpoints: give a new folder")
    return store


def write(
    store: storage.Checkpoints,
    cfg: schema.Config,
    rows: Callable[[str, tuple[int, ...], int, int], np.ndarray],
) -> None:
    """Write a checkpoint of parameters alone at step 0, without ever holding one whole.

    `rows` gets a parameter's name and shape and a range of its first dimension (layers, where it
    has them), and returns these rows in fp32. It is asked for each twice.

    Raises:
        UserError: the disk is full, or what `rows` raises.
    """
    program = step.build(cfg, meshes.make_mesh(schema.Mesh()), run_samples=1)

    def one(path: Any, leaf: Any) -> array_blocks.Blocks:
        name = short_name(jax.tree_util.keystr(path, simple=True, separator="/"))
        return array_blocks.Blocks(leaf.shape, functools.partial(rows, name, leaf.shape))

    params = jax.tree.map_with_path(one, program.abstract_state.params)
    meta = metadata.Meta(step=0, consumed_samples=0, data_order={}, config=schema.flatten(cfg))
    store.save_params(params, meta)
    failure = store.poll(wait=True)
    store.close()
    if failure:
        raise errors.UserError(failure)


def untrained(model: schema.Model, data: schema.Data) -> schema.Config:
    """Return the config of a checkpoint that has a model's parameters from elsewhere."""
    return schema.Config(
        model=model,
        optimizer=schema.Optimizer(peak_lr=0.0),
        batch=schema.Batch(global_batch_size=1),
        data=data,
        precision=schema.Precision(compute_dtype="float32"),
    )


def long_name(name: str) -> str:
    """Return the name of an array in the state from a parameter's in the model."""
    return f"params/{name}/value"


def short_name(name: str) -> str:
    """Return a parameter's name in the model from that of an array in the state."""
    return name.removeprefix("params/").removesuffix("/value")
