"""How a run goes on from a checkpoint that was written under another config, and what that changes.

The new config decides what the run does next. In the state it changes the loss scale alone.
"""

import dataclasses
import functools

import jax

from gpt3jax import optimizer, step
from gpt3jax.checkpoint import metadata, sample_order
from gpt3jax.config import batch_schedule, layout, schema
from gpt3jax.data import skipped_samples

# The folders of a run and the way it is started change nothing that it computes.
_WITHOUT_INFLUENCE = (
    "checkpoint.dir", "checkpoint.load", "checkpoint.only_params",
    "checkpoint.allow_new_data_order", "data.index_cache", "distributed.", "layouts",
    "log.dir", "mesh.cpu_devices", "train.replay_step",
)  # fmt: skip
_WIDTH = 60  # of a value in the table; config.json has the whole value


@dataclasses.dataclass(frozen=True)
class Change:
    """A value that was different when a checkpoint was written."""

    then: object
    now: object


def with_own_scale(
    cfg: schema.Config,
    meta: metadata.Meta,
    abstract_state: step.TrainState,
    state: step.TrainState,
) -> step.TrainState:
    """Return a checkpoint's state with the loss scale that this config goes on with."""
    then = schema.unflatten(schema.Precision, meta.config, "precision.")
    go_on = functools.partial(optimizer.resumed_loss_scale, then, cfg.precision)
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state.loss_scale)
    scale = jax.jit(go_on, out_shardings=shardings)(state.loss_scale)
    return dataclasses.replace(state, loss_scale=scale)


def changes(
    then: metadata.Meta, saved: step.TrainState, now: metadata.Meta, state: step.TrainState
) -> dict[str, Change]:
    """Return what differs between a checkpoint and the one that a resumed run would write there.

    Values that an earlier version did not write are not compared.
    """
    before, after = _facts(then, saved), _facts(now, state)
    both = {name: Change(before[name], after[name]) for name in after if name in before}
    return {name: change for name, change in both.items() if change.then != change.now}


def _facts(meta: metadata.Meta, state: step.TrainState) -> dict[str, object]:
    """Return the config of a run that goes on from here, and what it means for the next step."""
    cfg = schema.unflatten(schema.Config, meta.config)
    schedule = batch_schedule.from_config(cfg.batch, cfg.model.seq_len)
    start = (meta.step, meta.consumed_samples)
    _, n_samples = skipped_samples.run_length(cfg, schedule, *start)
    end = skipped_samples.from_config(cfg.data).end(schedule, *start, n_samples)
    schedules = (cfg.optimizer, n_samples, int(state.schedule_samples))
    size = schedule.size(meta.consumed_samples)
    fields = schema.flatten(cfg) | _layout_of(meta, size)
    compared = {
        name: value
        for name, value in fields.items()
        if not name.startswith(_WITHOUT_INFLUENCE)
        # What an earlier version had no name for was not `auto` there.
        and not (name in layout.FIELDS and value == schema.AUTO)
    }
    drops = cfg.model.dropout or cfg.model.attention_dropout
    next_step = {
        "batch size": size,
        "learning rate": float(optimizer.learning_rate(*schedules)),
        "weight decay": float(optimizer.weight_decay(*schedules)),
        "loss scale": float(state.loss_scale.scale),
    }
    return {
        **compared,
        **sample_order.in_words(meta.data_order),
        **({"dropout's generator": meta.dropout_generator} if drops else {}),
        **({"mesh": meta.mesh} if meta.mesh else {}),
        **({"jax": meta.jax_version} if meta.jax_version else {}),
        "gpt3jax": meta.version,
        "end of the run": "step {}, {} samples".format(*end),
        **{f"{name} of step {meta.step + 1}": value for name, value in next_step.items()},
    }


def _layout_of(meta: metadata.Meta, batch_size: int) -> dict[str, object]:
    """Return the fields of the layout in which a run goes on, as far as its checkpoint says."""
    rows = meta.layouts.get("by_size", {}).get(str(batch_size), ())
    fields: dict[str, object] = rows[0]["fields"] if rows else meta.layout
    return fields


def table(changed: dict[str, Change]) -> list[str]:
    """Return the lines of a table of changes; no lines if nothing changed."""
    if not changed:
        return []
    rows = [("changed since that checkpoint", "then", "now")]
    rows += [(name, _shown(change.then), _shown(change.now)) for name, change in changed.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    return [f"  {name:{widths[0]}}  {then:{widths[1]}}  {now}" for name, then, now in rows]


def _shown(value: object) -> str:
    if isinstance(value, tuple | list):
        text = " ".join(map(str, value))
    else:
        text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return (text if len(text) <= _WIDTH else f"{text[: _WIDTH - 4]} ...") or '""'


def history_entry(meta: metadata.Meta, changed: dict[str, Change]) -> list[dict[str, object]]:
    """Return what a start from this checkpoint adds to the run's history: nothing, or one entry."""
    if not changed:
        return []
    as_json = {name: dataclasses.asdict(change) for name, change in changed.items()}
    return [{"step": meta.step, "samples": meta.consumed_samples, "changes": as_json}]
