"""A trained model for use: config, parameters and tokenizer of a checkpoint, no optimizer.

It also writes checkpoints of parameters alone.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Literal, TypeAlias

import jax
import numpy as np

from gpt3jax import errors, step
from gpt3jax.checkpoint import array_blocks, array_names, metadata, storage
from gpt3jax.config import layout, schema
from gpt3jax.data import tokenizer, tokenizer_files, tokenizer_sources
from gpt3jax.distributed import joining
from gpt3jax.model import gpt
from gpt3jax.sharding import layouts, meshes

ComputeDtype: TypeAlias = Literal["float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """A checkpoint to read parameters from, on a mesh.

    Attributes:
        cfg: the config that it was written with, except for dropout, remat and mesh, which are
            set for use without training.
        program: how a model of this config runs on the mesh.
    """

    store: storage.Checkpoints
    cfg: schema.Config
    program: step.Program
    step: int

    def params(self, wanted: Callable[[str], bool] = lambda name: True) -> gpt.GPT:
        """Return the parameters, or some by name, with `...` in place of the others.

        Raises:
            DamagedError: they cannot be read, or were changed since they were written.
        """

        def is_wanted(name: str) -> bool:
            return array_names.is_param(name) and wanted(array_names.in_model(name))

        state = self.store.restore(self.step, self.program.abstract_state, is_wanted)
        return state.params

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """Yield a parameter by its name, in blocks of rows: of layers, where it is `[L, ...]`.

        Raises:
            DamagedError: as `params`; that a value was changed is known only after the last rows.
        """
        layout = self.program.abstract_state
        return self.store.read_blocks(self.step, layout, array_names.in_state(name))

    def whole(self, name: str) -> np.ndarray:
        """Return a parameter by its name.

        Raises:
            DamagedError: as `params`.
        """
        leaves = dict(array_names.named_leaves(self.program.abstract_state))
        shape = leaves[array_names.in_state(name)].shape
        out, n = np.empty(shape, np.float32), 0  # joining a list would need the memory twice
        for rows in self.blocks(name):
            out[n : n + len(rows)] = rows
            n += len(rows)
        return out


def find(folder: str) -> tuple[storage.Checkpoints, int, schema.Config]:
    """Return the checkpoints of a folder, and step and config of the newest.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    store = storage.Checkpoints(folder, read_only=True) if pathlib.Path(folder).is_dir() else None
    if store is None or not store.steps():
        raise errors.UserError(
            f"--checkpoint={folder} has no checkpoint: give the folder that a run's checkpoint.dir "
            "names, or one that gpt3jax.convert wrote",
            page="checkpoints.md#looking-into-a-folder",
        )
    newest = store.steps()[0]
    return store, newest, schema.unflatten(schema.Config, store.read_meta(newest).config)


def open_newest(
    folder: str, mesh: jax.sharding.Mesh, compute_dtype: ComputeDtype = "float32"
) -> Trained:
    """Return the newest checkpoint of a folder, for use on a mesh.

    Raises:
        UserError: as `find`, or the model does not fit the mesh.
    """
    store, newest, cfg = find(folder)
    cfg = _without_training(cfg, compute_dtype)
    program = step.build(cfg, mesh, run_samples=1)
    return Trained(store=store, step=newest, cfg=cfg, program=program)


def abstract_state(cfg: schema.Config) -> step.TrainState:
    """Return the layout of a config's state on the first device, whatever mesh the config has."""
    mesh = meshes.make_mesh(schema.Mesh())
    return step.build(_without_training(cfg, "float32"), mesh, run_samples=1).abstract_state


def _without_training(cfg: schema.Config, compute_dtype: ComputeDtype) -> schema.Config:
    without = dataclasses.replace(
        cfg,
        model=dataclasses.replace(
            cfg.model,
            dropout=0.0,
            attention_dropout=0.0,
            remat="none",
            n_loss_chunks=1,
            attention=dataclasses.replace(cfg.model.attention, implementation="auto"),
        ),
        mesh=schema.Mesh(sequence_parallel=False),
        precision=dataclasses.replace(
            cfg.precision,
            compute_dtype=compute_dtype,
            matmul_dtype="compute_dtype",
            end_layers=0,
        ),
    )
    return layout.plain(without)


def open_for_use(
    folder: str, axes: schema.Mesh, compute_dtype: ComputeDtype | Literal["auto"]
) -> Trained:
    """Return the newest checkpoint of a folder, on the mesh that a command asks for.

    The devices of `stage` and `context` are added to `fsdp`. The format "auto" is float32 on a
    CPU, bfloat16 elsewhere.

    Raises:
        UserError: as `open_newest`, or the axes do not fit the devices.
    """
    joining.start(schema.Distributed(), axes)
    sizes = meshes.make_mesh(axes).shape
    fsdp = sizes["fsdp"] * sizes["stage"] * sizes["context"]
    mesh = meshes.make_mesh(schema.Mesh(data=sizes["data"], fsdp=fsdp, tensor=sizes["tensor"]))
    if compute_dtype == "auto":
        compute_dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return open_newest(folder, mesh, compute_dtype)


def open_tokenizer(
    folder: str, cfg: schema.Config, source: tokenizer_sources.Source
) -> tokenizer.Tokenizer:
    """Return the tokenizer that a command names, else the one that the folder's checkpoint names.

    Files that are no longer where the checkpoint says are looked for in its folder.

    Raises:
        UserError: none is named, it cannot be read, or it has more tokens than the model.
    """
    is_named = source.tokenizer or source.vocab_file or source.merge_file
    text = source.open() if is_named else _own_tokenizer(folder, cfg, source.eod_token)
    if text.vocab_size > cfg.model.vocab_size:
        raise errors.UserError(
            f"the tokenizer has {text.vocab_size} tokens and the model "
            f"model.vocab_size={cfg.model.vocab_size}: give the one it was trained with",
            page="data.md#when-data-is-refused",
        )
    return text


def _own_tokenizer(folder: str, cfg: schema.Config, eod_token: str) -> tokenizer.Tokenizer:
    data = tokenizer_files.moved(cfg.data, pathlib.Path(folder))
    if not (data.vocab_file or data.tokenizer):
        raise errors.UserError(
            f"--checkpoint={folder} names no tokenizer (data.vocab_file, data.tokenizer): give "
            "--vocab-file and --merge-file, or --tokenizer",
            page="data.md#when-data-is-refused",
        )
    return tokenizer_sources.of_config(data, eod_token)


def new_store(folder: str) -> storage.Checkpoints:
    """Return the checkpoints of a folder that has none yet.

    Raises:
        UserError: it has some.
    """
    store = storage.Checkpoints(folder)
    if store.steps():
        raise errors.UserError(
            f"--output={folder} has checkpoints: give a new folder", page="converting.md"
        )
    return store


def write(
    store: storage.Checkpoints,
    cfg: schema.Config,
    rows: Callable[[str, tuple[int, ...], int, int], np.ndarray],
) -> None:
    """Write a checkpoint of parameters alone at step 0, without ever holding a parameter whole.

    `rows` gets a parameter's name and shape and a range of its first dimension (layers, where it
    has them), and returns these rows in fp32. It is called twice for each range.

    Raises:
        UserError: the disk is full, or what `rows` raises.
    """
    program = step.build(cfg, meshes.make_mesh(schema.Mesh()), run_samples=1)

    def in_blocks(
        path: jax.tree_util.KeyPath[object], leaf: jax.ShapeDtypeStruct
    ) -> array_blocks.Blocks:
        name = array_names.in_model(layouts.name_of(path))
        return array_blocks.Blocks(leaf.shape, functools.partial(rows, name, leaf.shape))

    params = jax.tree.map_with_path(in_blocks, program.abstract_state.params)
    meta = metadata.Meta(step=0, consumed_samples=0, data_order={}, config=schema.flatten(cfg))
    store.save_params(params, meta)
    failure = store.poll(wait=True)
    store.close()
    if failure:
        raise errors.UserError(failure, page="checkpoints.md#saving")


def untrained(model: schema.Model, data: schema.Data) -> schema.Config:
    """Return the config of a checkpoint of parameters that no run of ours trained."""
    cfg = schema.Config(
        model=model,
        optimizer=schema.Optimizer(peak_lr=0.0),
        batch=schema.Batch(global_batch_size=1),
        data=data,
        precision=schema.Precision(compute_dtype="float32"),
    )
    return layout.plain(cfg)
