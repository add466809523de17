"""A trained model for use: config and parameters of a checkpoint, without its optimizer."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from gpt3jax import checkpoint, config, step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """A checkpoint to read parameters from, on a mesh.

    Attributes:
        cfg: the config it was written with, but for dropout, remat and mesh, which are those of
            use without training.
        program: how a model of this config runs on the mesh.
    """

    store: checkpoint.Checkpoints
    cfg: config.Config
    program: step.Program
    step: int

    def params(self, wanted: Callable[[str], bool] = lambda name: True) -> Any:
        """Return the parameters (`model.GPT`), or some by name, with `...` in place of others.

        Raises:
            DamagedError: they cannot be read, or were changed since they were written.
        """

        def of_params(name: str) -> bool:
            return checkpoint.is_param(name) and wanted(short_name(name))

        state = self.store.restore(self.step, self.program.abstract_state, of_params)
        return state.params


def find(folder: str) -> tuple[checkpoint.Checkpoints, int, config.Config]:
    """Return the checkpoints of a folder, the newest one's step and the config in it.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    store = (
        checkpoint.Checkpoints(folder, read_only=True) if pathlib.Path(folder).is_dir() else None
    )
    if store is None or not store.steps():
        raise config.UserError(
            f"--checkpoint={folder} has no checkpoint: give the folder that a run's checkpoint.dir "
            "names, or one that gpt3jax.convert wrote"
        )
    newest = store.steps()[0]
    return store, newest, config.unflatten(config.Config, store.read_meta(newest).config)


def open_newest(folder: str, mesh: jax.sharding.Mesh, compute_dtype: Any = "float32") -> Trained:
    """Return the newest checkpoint of a folder, for use on a mesh.

    Raises:
        UserError: as `find`, or the model does not fit the mesh.
    """
    store, newest, cfg = find(folder)
    cfg = dataclasses.replace(
        cfg,
        model=dataclasses.replace(
            cfg.model,
            dropout=0.0,
            attention_dropout=0.0,
            remat="none",
            attention=dataclasses.replace(cfg.model.attention, implementation="auto"),
        ),
        mesh=config.Mesh(sequence_parallel=False),
        precision=dataclasses.replace(cfg.precision, compute_dtype=compute_dtype),
    )
    program = step.build(cfg, mesh, run_samples=1)
    return Trained(store=store, step=newest, cfg=cfg, program=program)


def short_name(name: str) -> str:
    """Return a parameter's name in the model from that of an array in the state."""
    return name.removeprefix("params/").removesuffix("/value")
