"""The samples of a run: the corpora of each split, and the values that decide their order."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from gpt3jax import errors
from gpt3jax.config import ranges, schema
from gpt3jax.data import blend, indexed, mock, samples, text_corpus


@dataclasses.dataclass(frozen=True, kw_only=True)
class Splits:
    """The samples of a run, the values that decide their order, and a line that describes them."""

    train: samples.Samples
    validation: samples.Samples | None
    test: samples.Samples | None
    order: dict[str, Any]
    description: str


def open_splits(cfg: schema.Config, n_steps: int, n_samples: int) -> Splits:
    """Open the corpora of a run of n_steps steps and n_samples training samples.

    Raises:
        UserError: files that are missing or damaged, tokens beyond the vocabulary, or a split
            without documents or samples.
    """
    text_corpus.check_vocabulary(cfg.data, cfg.model)
    sources = open_sources(cfg.data, cfg.model)
    maps = [
        _build_enough(source, name, cfg, n)
        for name, source, n in zip(
            samples.SPLITS, sources, _counts(cfg, n_steps, n_samples), strict=True
        )
    ]
    if maps[0] is None:
        raise errors.UserError(
            f"data.split={cfg.data.split!r} leaves nothing to train on: give its first weight a "
            "share",
            page="data.md#which-corpora-a-run-reads",
        )
    parts = maps[0].maps if isinstance(maps[0], blend.Blend) else [maps[0]]
    n_epochs = ", ".join(str(part.epochs.n) for part in parts)
    corpora, train = sources[0].corpora, cfg.train
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
        description=_describe(corpora, n_epochs),
    )


def open_sources(data: schema.Data, model: schema.Model) -> list[blend.Source]:
    """Open the corpora of the three splits, each file once.

    Raises:
        UserError: files that are missing or damaged, or tokens beyond the vocabulary.
    """
    if data.mock:
        corpus = mock.MockCorpus(model.vocab_size, data.eod_id)
        return [blend.Source([corpus], None, mock.SPLIT)] * 3
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
        sources.append(blend.Source([opened[prefix] for prefix in prefixes], weights, split))
    return sources


def build(
    source: blend.Source, name: str, data: schema.Data, request: samples.Request
) -> samples.SampleMap | blend.Blend | None:
    """Return the samples of a split by its name (`samples.SPLITS`); None if it has none.

    The switches of `data` complete the request.

    Raises:
        UserError: as `blend.build`.
    """
    if not source.corpora:
        return None
    keep_partial = name == "validation" and not data.drop_last_partial_validation_sequence
    request = dataclasses.replace(request, keep_partial=keep_partial, cache=data.index_cache)
    return blend.build(source, name, request)


def _counts(cfg: schema.Config, n_steps: int, n_samples: int) -> list[int]:
    """Return how many samples the run needs of each split.

    Raises:
        UserError: more validation samples than can be numbered.
    """
    train = cfg.train
    eval_size = train.eval_batches * cfg.batch.global_batch_size
    n_evals = n_steps // train.eval_interval + 1 if train.eval_interval else 0
    if n_evals * eval_size > ranges.INT32:
        raise errors.UserError(
            f"train.eval_batches={train.eval_batches} takes {n_evals * eval_size} samples in "
            f"{n_evals} evaluations, and their numbers must stay below 2^31: lower it, or evaluate "
            "less often (train.eval_interval)",
            page="reference/options.md#train",
        )
    return [n_samples, n_evals * eval_size, eval_size if n_evals else 0]


def _build_enough(
    source: blend.Source, name: str, cfg: schema.Config, n: int
) -> samples.SampleMap | blend.Blend | None:
    """Return the samples of a split, at least n.

    Raises:
        UserError: it has fewer, as may be with an unweighted blend, which is read only once.
    """
    request = samples.Request(seq_len=cfg.model.seq_len, seed=cfg.train.seed, n_samples=n)
    split = build(source, name, cfg.data, request)
    if split is not None and len(split) < n:
        prefixes = " ".join(corpus.prefix for corpus in source.corpora)
        raise errors.UserError(
            f"the run needs {n} {name} samples and {prefixes} has {len(split)}: "
            "give each prefix a weight, or "
            + ("shorten the run" if name == "train" else "lower train.eval_batches"),
            page="data.md#when-data-is-refused",
        )
    return split


def _describe(corpora: Sequence[indexed.Corpus], n_epochs: str) -> str:
    first_only = " (of the first)" * (len(corpora) > 1)
    return (
        f"{sum(c.n_tokens for c in corpora):,} tokens in {sum(map(len, corpora)):,} documents "
        f"of {' '.join(c.prefix for c in corpora)}, {n_epochs} epoch(s), unigram entropy "
        f"{text_corpus.unigram_entropy(corpora[0]):.3f} nats{first_only}"
    )


def _identity(corpus: indexed.Corpus) -> str:
    """Return a text that identifies a corpus, wherever its files are."""
    checksum = indexed.lengths_checksum(corpus)
    return f"{len(corpus)} sequences, {corpus.n_tokens} tokens, lengths {checksum:08x}"
