"""Which checkpoint a run starts from, and whether the run may go on from it."""

import pathlib
from collections.abc import Callable, Mapping
from typing import TypeAlias

from gpt3jax import errors
from gpt3jax.checkpoint import array_names, metadata, sample_order, storage
from gpt3jax.config import schema
from gpt3jax.distributed import messages

# What must be equal for weights to mean the same network.
_MODEL_FIELDS = (
    "model.n_layers", "model.d_model", "model.n_heads", "model.seq_len", "model.vocab_size",
    "model.vocab_multiple", "model.mask_padded_vocab", "model.gelu", "model.norm_eps",
    "model.attention.pattern", "model.attention.band",
)  # fmt: skip

Expect: TypeAlias = Callable[[metadata.Meta], tuple[array_names.PyTree, Mapping[str, object]]]
"""Returns the layout of the state, and the order of samples, of a run that goes on from there."""


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
            "out to start from random weights"
        )
    return source


def restore_newest(
    store: storage.Checkpoints, cfg: schema.Config, expect: Expect, *, only_params: bool = False
) -> tuple[array_names.PyTree, metadata.Meta, list[str]]:
    """Return state and meta of the newest checkpoint that is whole, and warnings.

    With `only_params` the order of samples is not compared, and `...` stands for the rest of the
    state; so it does where the checkpoint has parameters alone. Damaged checkpoints are named in
    the warnings and, if they are our own, set aside.

    Raises:
        UserError: the checkpoint is of another network or order of samples, or none is whole.
    """
    damaged: list[int] = []
    problems: list[str] = []
    for step in store.steps():
        problem = ""
        try:
            state, meta = _restore(store, step, cfg, expect, only_params=only_params)
        except metadata.DamagedError as error:
            problem = str(error)
        if not messages.on_any_process(bool(problem)):
            store.set_aside(damaged)
            return state, meta, [f"{problem}; going back to an older one" for problem in problems]
        problem = problem or f"checkpoint {store.path(step)}: another process cannot read it"
        damaged.append(step)
        problems.append(f"WARNING: {problem}")
    raise metadata.DamagedError(
        "\n".join([f"no whole checkpoint is left in {store.folder}:", *problems])
    )


def _restore(
    store: storage.Checkpoints, step: int, cfg: schema.Config, expect: Expect, *, only_params: bool
) -> tuple[array_names.PyTree, metadata.Meta]:
    meta = store.read_meta(step)
    _check_same_model(cfg, meta)
    abstract_state, data_order = expect(meta)
    if not only_params:
        _check_same_order(cfg, meta, data_order)
    wanted = array_names.is_param if only_params or meta.only_params else lambda name: True
    return store.restore(step, abstract_state, wanted), meta


def _check_same_model(cfg: schema.Config, meta: metadata.Meta) -> None:
    fields = schema.flatten(cfg)
    differ = [name for name in _MODEL_FIELDS if meta.config.get(name) != fields[name]]
    if fields["model.attention.pattern"] == "dense" and "model.attention.pattern" not in differ:
        differ = [name for name in differ if name != "model.attention.band"]
    if differ:
        table = _differences(meta.config, fields, differ)
        raise errors.UserError(
            f"the checkpoint of step {meta.step} is of another model:\n{table}\n"
            "use its values, or another checkpoint.dir"
        )


def _check_same_order(
    cfg: schema.Config, meta: metadata.Meta, data_order: Mapping[str, object]
) -> None:
    before, now = sample_order.in_words(meta.data_order), sample_order.in_words(data_order)
    # Earlier versions wrote fewer keys.
    differ = [name for name in before if name in now and before[name] != now[name]]
    if meta.consumed_samples and differ and not cfg.checkpoint.allow_new_data_order:
        table = _differences(before, now, differ)
        raise errors.UserError(
            f"after step {meta.step} the samples would come in another order, some twice and some "
            f"never:\n{table}\nrestore these values, or accept it with "
            "--checkpoint.allow-new-data-order"
        )


def _differences(before: Mapping[str, object], now: Mapping[str, object], names: list[str]) -> str:
    return "\n".join(f"  {name}: checkpoint {before.get(name)}, here {now[name]}" for name in names)
