"""The loss of a run, and the losses of simple guesses at the very same tokens.

The guesses learn from what the run had read before: the same samples of the training split, or as
many of the first ones as `_MAX_TOKENS` has.
"""

import dataclasses

import numpy as np

from gpt3jax import errors
from gpt3jax.config import batch_schedule, schema
from gpt3jax.data import samples, skipped_samples, splits
from gpt3jax.summary import baselines, recorded_run

_MAX_TOKENS = 8_000_000  # a few seconds of counting


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """A loss of the run, and the samples that it was measured on.

    Attributes:
        loss: mean over tokens (nats).
        is_held_out: whether these are of the validation split.
        numbers: of the samples in `source`.
        n_read: samples of the training stream that the run had consumed before it read these.
    """

    loss: float
    step: int
    is_held_out: bool
    source: samples.Samples
    numbers: np.ndarray
    n_read: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learned:
    """A loss beside those of simple guesses at the same tokens (nats a token)."""

    measured: Measured
    unigram_loss: float
    bigram_loss: float


def compare(run: recorded_run.RecordedRun) -> Learned:
    """Return the run's last loss beside those of simple guesses.

    Raises:
        UserError: the run has no loss yet, or its corpus cannot be read.
    """
    schedule = batch_schedule.from_config(run.cfg.batch, run.cfg.model.seq_len)
    n_steps, n_samples = skipped_samples.run_length(run.cfg, schedule)
    # The limit in config.json may be lower than what the run has done: it can be changed.
    n_steps = max(n_steps, run.newest.step)
    n_samples = max(n_samples, run.newest.consumed_samples)
    opened = splits.open_splits(run.cfg, n_steps, n_samples)
    measured = _last_validation(run, opened) or _last_interval(run, opened)
    if measured is None:
        raise errors.UserError(
            f"{run.log_dir}/metrics.jsonl has no loss yet: train until one is logged "
            "(log.interval)",
            page="start.md#train",
        )
    learner = _learn(run.cfg, opened.train, measured.n_read)
    batch = samples.read(measured.source, run.cfg.data, measured.numbers)
    tokens, targets, mask = (batch[name] for name in ("tokens", "targets", "loss_mask"))
    return Learned(
        measured=measured,
        unigram_loss=float(np.average(learner.unigram_losses(targets), weights=mask)),
        bigram_loss=float(np.average(learner.bigram_losses(tokens, targets), weights=mask)),
    )


def _last_validation(run: recorded_run.RecordedRun, opened: splits.Splits) -> Measured | None:
    """Return the last evaluation; its samples are those that `train.evaluate` took."""
    entry, source = recorded_run.last_value(run, "validation_loss"), opened.validation
    if entry is None or source is None:
        return None
    train = run.cfg.train
    n_before = (entry["step"] - 1) // train.eval_interval
    n = train.eval_batches * run.cfg.batch.global_batch_size
    return Measured(
        loss=float(entry["validation_loss"]),
        step=entry["step"],
        is_held_out=True,
        source=source,
        numbers=np.arange(n_before * n, (n_before + 1) * n),
        n_read=entry["consumed_samples"],
    )


def _last_interval(run: recorded_run.RecordedRun, opened: splits.Splits) -> Measured | None:
    """Return the training loss of the last interval of the log, and the samples of its steps."""
    entry = recorded_run.last_value(run, "interval_loss")
    if entry is None:
        return None
    end = entry["consumed_samples"]
    logged = (e["consumed_samples"] for e in run.entries if "interval_loss" in e)
    start = max((n for n in logged if n < end), default=0)
    return Measured(
        loss=float(entry["interval_loss"]),
        step=entry["step"],
        is_held_out=False,
        source=opened.train,
        numbers=_stream_numbers(run.cfg.data, start, end),
        n_read=start,
    )


def _stream_numbers(data: schema.Data, start: int, end: int) -> np.ndarray:
    """Return the training samples between two positions, without those that the run skips."""
    stream = skipped_samples.from_config(data)
    return stream.numbers(np.arange(stream.n_kept(start), stream.n_kept(end)))


def _learn(cfg: schema.Config, train: samples.Samples, n_read: int) -> baselines.Baselines:
    most = max(1, _MAX_TOKENS // cfg.model.seq_len)
    tokens, _ = train.tokens(_stream_numbers(cfg.data, 0, n_read)[:most])
    return baselines.Baselines(tokens[:, :-1], tokens[:, 1:], cfg.model.vocab_size)
