"""Which checkpoint a run starts from, and whether the run may go on from it."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from gpt3jax import errors
from gpt3jax.checkpoint import metadata, sample_order, storage
from gpt3jax.config import schema

# What must be equal for weights to mean the same network.
_MODEL_FIELDS = (
    "model.n_layers", "model.d_model", "model.n_heads", "model.seq_len", "model.vocab_size",
    "model.vocab_multiple", "model.mask_padded_vocab", "model.gelu", "model.norm_eps",
    "model.attention.pattern", "model.attention.band",
)  # fmt: skip


def choose_source(store: storage.Checkpoints | None, load: str) -> storage.Checkpoints | None:
    """Return where to start from: the run's own folder if it has a checkpoint, else `load`.

    Raises:
        UserError: `load` is needed and has none.
    """
    if store is not None and store.steps():
        return store
    if not load:
        return None
    source = storage.Checkpoints(load, read_only=True) if pathlib.Path(load).is_dir() else None
    if source is None or not source.steps():
        raise errors.UserError(
            f"checkpoint.load={load} has no checkpoint: correct the folder, or leave the option "
            "out to start from random weights",
            page="checkpoints.md#starting-from-another-run",
        )
    return source


def kept_layouts(checkpoint: schema.Checkpoint) -> dict[str, Any]:
    """Return the layouts that the newest readable checkpoint of a run has; empty if there are none.

    It reads files alone, in one process.
    """
    for folder in filter(None, (checkpoint.dir, checkpoint.load)):
        files = pathlib.Path(folder).glob("*/meta/metadata")
        steps = [file for file in files if file.parts[-3].isdecimal()]
        for file in sorted(steps, key=lambda file: -int(file.parts[-3])):
            try:
                return metadata.checked_meta(json.loads(file.read_text())).layouts
            except (OSError, ValueError, KeyError, TypeError):  # the restore says so
                continue
    return {}


def check_same_model(cfg: schema.Config, meta: metadata.Meta) -> None:
    """Check that a checkpoint is of this config's network.

    Raises:
        UserError: it is of another one; the message lists the differences.
    """
    fields = schema.flatten(cfg)
    differ = [name for name in _MODEL_FIELDS if meta.config.get(name) != fields[name]]
    if fields["model.attention.pattern"] == "dense" and "model.attention.pattern" not in differ:
        differ = [name for name in differ if name != "model.attention.band"]
    if differ:
        table = _differences(meta.config, fields, differ)
        raise errors.UserError(
            f"the checkpoint of step {meta.step} is of another model:\n{table}\n"
            "use its values, or another checkpoint.dir",
            page="checkpoints.md#resuming",
        )


def check_same_order(
    cfg: schema.Config, meta: metadata.Meta, data_order: Mapping[str, object]
) -> None:
    """Check that a run with this order of samples may go on from a checkpoint.

    Raises:
        UserError: samples would come in another order; the message lists the differences.
    """
    before, now = sample_order.in_words(meta.data_order), sample_order.in_words(data_order)
    # Earlier versions wrote fewer keys.
    differ = [name for name in before if name in now and before[name] != now[name]]
    if meta.consumed_samples and differ and not cfg.checkpoint.allow_new_data_order:
        table = _differences(before, now, differ)
        raise errors.UserError(
            f"after step {meta.step} the samples would come in another order, some twice and some "
            f"never:\n{table}\nrestore these values, or accept it with "
            "--checkpoint.allow-new-data-order",
            page="checkpoints.md#resuming",
        )


def _differences(before: Mapping[str, object], now: Mapping[str, object], names: list[str]) -> str:
    return "\n".join(f"  {name}: checkpoint {before.get(name)}, here {now[name]}" for name in names)
