"""The samples of a run: which corpora make each split, and what decides the samples' order."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from gpt3jax import errors
from gpt3jax.config import ranges, schema
from gpt3jax.data import blend, indexed, mock, samples, text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Splits:
    """The samples of a run, what decides their order, and a line about them."""

    train: samples.Samples
    validation: samples.Samples | None
    test: samples.Samples | None
    order: dict[str, Any]
    told: str


@dataclasses.dataclass(frozen=True)
class Source:
    """The corpora of a split, and their weights if they are a weighted blend."""

    corpora: Sequence[indexed.Corpus]
    weights: Sequence[float] | None
    split: str | None
    """Shares of documents; None: the split has corpora of its own, and all of them."""


def open_splits(cfg: schema.Config, n_steps: int, n_samples: int) -> Splits:
    """Map the corpora to the samples of a run of n_steps steps and n_samples training samples.

    Raises:
        UserError: files that are missing or damaged, tokens beyond the vocabulary, or a split
            without documents or samples.
    """
    data, train = cfg.data, cfg.train
    text.check_vocabulary(data, cfg.model)
    sources = open_sources(data, cfg.model)
    eval_size = train.eval_batches * cfg.batch.global_batch_size
    n_evals = n_steps // train.eval_interval + 1 if train.eval_interval else 0
    if n_evals * eval_size > ranges.INT32:
        raise errors.UserError(
            f"train.eval_batches={train.eval_batches} takes {n_evals * eval_size} samples in "
            f"{n_evals} evaluations, and their numbers must stay below 2^31: lower it, or evaluate "
            "less often (train.eval_interval)"
        )
    wanted = [n_samples, n_evals * eval_size, eval_size if n_evals else 0]
    maps = []
    for name, source, n in zip(samples.SPLITS, sources, wanted, strict=True):
        maps.append(build(source, data, name, cfg.model.seq_len, n, train.seed))
        if maps[-1] is not None and len(maps[-1]) < n:  # unweighted blends are read once only
            prefixes = " ".join(corpus.prefix for corpus in source.corpora)
            raise errors.UserError(
                f"the run needs {n} {name} samples and {prefixes} has {len(maps[-1])}: "
                "give each prefix a weight, or "
                + ("shorten the run" if name == "train" else "lower train.eval_batches")
            )
    if maps[0] is None:
        raise errors.UserError(
            f"data.split={data.split!r} leaves nothing to train on: give its first weight a share"
        )
    parts = maps[0].maps if isinstance(maps[0], blend.Blend) else [maps[0]]
    n_epochs = ", ".join(str(part.epochs.n) for part in parts)
    corpora = sources[0].corpora
    return Splits(
        train=maps[0],
        validation=maps[1],
        test=maps[2],
        order={  # the keys of `checkpoint.sample_order`
            "corpora": [_identity(corpus) for corpus in corpora],
            "tokens": [f"sample {indexed.tokens_checksum(corpus):08x}" for corpus in corpora],
            "weights": sources[0].weights,
            "split": sources[0].split,
            "seq_len": cfg.model.seq_len,
            "seed": train.seed,
            "n_epochs": n_epochs,
            "last_epoch_apart": [part.epochs.last_is_separate for part in parts],
        },
        told=f"{sum(c.n_tokens for c in corpora):,} tokens in {sum(map(len, corpora)):,} documents "
        f"of {' '.join(c.prefix for c in corpora)}, {n_epochs} epoch(s), unigram entropy "
        f"{text.unigram_entropy(corpora[0]):.3f} nats{' (of the first)' * (len(corpora) > 1)}",
    )


def open_sources(data: schema.Data, model: schema.Model) -> list[Source]:
    """Open the corpora of the three splits, each file once.

    Raises:
        UserError: files that are missing or damaged, or tokens beyond the vocabulary.
    """
    if data.mock:
        corpus = mock.MockCorpus(model.vocab_size, data.eod_id)
        return [Source([corpus], None, mock.SPLIT)] * 3
    fields = ("paths",) * 3 if data.paths else ("train_paths", "validation_paths", "test_paths")
    opened: dict[str, indexed.IndexedCorpus] = {}
    sources = []
    for field in fields:
        prefixes, weights = blend.parse(getattr(data, field), f"data.{field}")
        for prefix in prefixes:
            if prefix not in opened:
                opened[prefix] = indexed.IndexedCorpus(prefix)
                indexed.check_tokens(opened[prefix], model.vocab_size)
        split = data.split if data.paths else None
        sources.append(Source([opened[prefix] for prefix in prefixes], weights, split))
    return sources


def build(
    source: Source, data: schema.Data, name: str, seq_len: int, n_samples: int | None, seed: int
) -> "samples.SampleMap | blend.Blend | None":
    """Return the samples of a split by its name (`samples.SPLITS`); None if it has none.

    Raises:
        UserError: as `blend.build`.
    """
    if not source.corpora:
        return None
    return blend.build(
        source.corpora,
        source.weights,
        source.split,
        name,
        seq_len,
        n_samples,
        seed,
        keep_partial=name == "validation" and not data.drop_last_partial_validation_sequence,
        cache=data.index_cache,
    )


def _identity(corpus: indexed.Corpus) -> str:
    """Return what tells a corpus from another, wherever its files lie."""
    checksum = indexed.lengths_checksum(corpus)
    return f"{len(corpus)} sequences, {corpus.n_tokens} tokens, lengths {checksum:08x}"
