"""Show what is in a corpus, and which samples a run takes from it.

A document as text; samples of a corpus; the indices of a blend; what a step of a run reads:

    python -m gpt3jax.data.inspect PREFIX --document 7 --tokenizer tokenizer.json
    python -m gpt3jax.data.inspect PREFIX --seq-len 2048 --n-samples 1000 --samples 0:4
    python -m gpt3jax.data.inspect 0.7 PREFIX_1 0.3 PREFIX_2 --n-samples 1000 --dump indices.npz
    python -m gpt3jax.data.inspect --config runs/345m/logs/config.json --step 1200
"""

import dataclasses
import pathlib
import sys
from typing import Annotated, Literal

import numpy as np
import tyro

from gpt3jax import errors
from gpt3jax.config import (
    batch_schedule,
    command_line,
    ranges,
    recipe,
    schema,
    user_paths,
    validation,
)
from gpt3jax.data import (
    blend,
    indexed,
    samples,
    skipped_samples,
    splits,
    tokenizer,
    tokenizer_sources,
)

_PAGE = "data.md#inspecting-corpora-and-samples"
Path = user_paths.Path  # Options has a field named `config`
WHICH = {"train": "train", "valid": "validation", "test": "test"}
_SAMPLE_INDICES = ("document_index", "sample_index", "shuffle_index")
_BLEND_INDICES = ("dataset_index", "dataset_sample_index")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The options of `gpt3jax.data.inspect`."""

    paths: tyro.conf.Positional[tuple[Path, ...]] = ()
    """PREFIX of PREFIX.bin and .idx, or WEIGHT PREFIX WEIGHT PREFIX ..."""
    config: Path = ""
    """Use the data of a run: a recipe, the config.json in its log.dir, or a checkpoint folder.
    It replaces the paths and all options down to --reset-attention-mask, except --which."""
    split: str = "949,50,1"
    """Shares of documents for training, validation and test."""
    which: Literal["train", "valid", "test"] = "train"
    """The split to show samples of."""
    seq_len: Annotated[int, ranges.Range(1, 2**24)] = 2048
    """Length of a sample (tokens)."""
    n_samples: Annotated[int, ranges.Range(1, ranges.INT32), ranges.READS_COUNTS] | None = None
    """Samples of the run, as 300000 or 300K: they decide epochs and shuffles (None: one epoch)."""
    seed: ranges.Seed = 1234
    """Seed of the shuffles (train.seed)."""
    eod: Annotated[int, ranges.Range(0, 2**30)] = 50_256
    """The end-of-document token."""
    eod_mask_loss: bool = False
    """As data.eod_mask_loss."""
    reset_position_ids: bool = False
    """As data.reset_position_ids."""
    reset_attention_mask: bool = False
    """As data.reset_attention_mask."""
    samples: str = ""
    """Show samples A:B (A to B - 1), as text if there is a tokenizer."""
    step: ranges.Positive | None = None
    """With --config: show the samples of this training step (the first is 1)."""
    document: Annotated[int, ranges.Range(0, 2**63 - 1)] | None = None
    """Show this document of the first corpus."""
    dump: Path = ""
    """Write the indices, and the arrays of --samples or --step, to this .npz file."""
    source: tyro.conf.OmitArgPrefixes[tokenizer_sources.Source] = dataclasses.field(
        default_factory=tokenizer_sources.Source
    )


def main() -> int:
    """Parse the options and print what they ask for; return the exit status."""
    return command_line.run(
        lambda: print("\n".join(inspect(command_line.parse(Options, "data.inspect", __doc__))))
    )


def inspect(options: Options) -> list[str]:
    """Return lines about corpora, documents and samples; write the dump if one is asked for.

    Raises:
        UserError: corpora, recipe or options that cannot be used.
    """
    cfg = _config(options)
    data = cfg.data if cfg else _data(options)
    prefixes, _ = blend.parse(data.paths or data.train_paths)
    corpora = [indexed.IndexedCorpus(prefix) for prefix in prefixes]
    text = _tokenizer(options, data)
    lines = [line for corpus in corpora for line in describe(corpus)]
    if options.document is not None:
        if not corpora:
            raise errors.UserError("--document needs a corpus in files", page=_PAGE)
        lines += _document(corpora[0], options.document, text)
    if options.samples or options.dump or options.step is not None:
        source, numbers = _run_samples(cfg, options) if cfg else _samples(options, corpora)
        lines += _show_samples(source, numbers, data, text, options)
    return lines


def _config(options: Options) -> schema.Config | None:
    """Return the config that `--config` names, or None; check the options that exclude it."""
    cfg = recipe.load(options.config) if options.config else None
    if cfg:
        validation.validate(cfg)
    if bool(options.paths) == bool(cfg):
        raise errors.UserError(
            "give the prefix of a corpus, prefixes with weights, or --config", page=_PAGE
        )
    if options.step is not None and cfg is None:
        raise errors.UserError("--step needs --config", page=_PAGE)
    return cfg


def _tokenizer(options: Options, data: schema.Data) -> tokenizer.Tokenizer | None:
    if options.source != tokenizer_sources.Source():
        return options.source.open()
    if data.vocab_file or data.tokenizer:
        return tokenizer_sources.of_config(data)
    return None


def _show_samples(
    source: samples.SampleMap | blend.Blend,
    numbers: np.ndarray,
    data: schema.Data,
    text: tokenizer.Tokenizer | None,
    options: Options,
) -> list[str]:
    if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(source):
        raise errors.UserError(
            f"samples {numbers.min()} to {numbers.max()}: the {options.which} split has "
            f"{len(source)}",
            page=_PAGE,
        )
    lines = [f"{options.which} split: {len(source):,} samples"]
    arrays = samples.read(source, data, numbers) if len(numbers) else {}
    for i, number in enumerate(numbers):
        lines += [f"sample {number}: {_origin(source, number)}"]
        lines.append(_show(arrays["tokens"][i], text))
    if options.dump:
        _dump(options.dump, indices(source) | arrays)
        lines.append(f"wrote {options.dump}")
    return lines


def describe(corpus: indexed.IndexedCorpus) -> list[str]:
    """Return lines about a corpus: its size, and a histogram of its sequences' lengths."""
    n_documents = len(corpus.document_indices) - 1
    mean = corpus.n_tokens / max(1, len(corpus))
    lines = [
        f"{corpus.prefix}: {n_documents:,} documents, {len(corpus):,} sequences, "
        f"{corpus.n_tokens:,} tokens ({corpus.dtype}), {mean:,.1f} a sequence"
    ]
    powers = np.ceil(np.log2(np.maximum(corpus.lengths, 1))).astype(int)
    counts = np.bincount(powers) if len(powers) else np.zeros(0, int)
    for power, count in enumerate(counts):
        if count:
            bar = "#" * max(1, round(40 * count / np.max(counts)))
            lines.append(f"  up to {2**power:>10,} tokens: {count:>12,} {bar}")
    return lines


def indices(source: samples.SampleMap | blend.Blend) -> dict[str, np.ndarray]:
    """Return the index arrays of a map; those of a blend's parts are named `0.document_index`..."""
    if isinstance(source, samples.SampleMap):
        return {name: getattr(source, name) for name in _SAMPLE_INDICES}
    arrays = {name: getattr(source, name) for name in _BLEND_INDICES}
    for i, part in enumerate(source.maps):
        arrays |= {f"{i}.{name}": array for name, array in indices(part).items()}
    return arrays


def _data(options: Options) -> schema.Data:
    return schema.Data(
        paths=options.paths,
        split=options.split,
        eod_id=options.eod,
        eod_mask_loss=options.eod_mask_loss,
        reset_position_ids=options.reset_position_ids,
        reset_attention_mask=options.reset_attention_mask,
    )


def _samples(
    options: Options, corpora: list[indexed.IndexedCorpus]
) -> tuple[samples.SampleMap | blend.Blend, np.ndarray]:
    """Return the samples of corpora, and the numbers of those to show."""
    _, weights = blend.parse(options.paths)
    if weights is not None and options.n_samples is None:
        raise errors.UserError(
            "a weighted blend has no epoch of its own: give --n-samples", page=_PAGE
        )
    source = blend.Source(corpora, weights, options.split)
    request = samples.Request(
        seq_len=options.seq_len, seed=options.seed, n_samples=options.n_samples
    )
    split = splits.build(source, WHICH[options.which], _data(options), request)
    if split is None:
        raise errors.UserError(
            f"--split {options.split} leaves nothing for {options.which}", page=_PAGE
        )
    return split, _numbers(options.samples)


def _run_samples(
    cfg: schema.Config, options: Options
) -> tuple[samples.SampleMap | blend.Blend, np.ndarray]:
    """Return the samples of a run, and the numbers of those to show."""
    schedule = batch_schedule.from_config(cfg.batch, cfg.model.seq_len)
    opened = splits.open_splits(cfg, *schedule.end(cfg.train, cfg.model.seq_len))
    split = getattr(opened, WHICH[options.which])
    if split is None:
        raise errors.UserError(f"{options.config} has no {options.which} split", page=_PAGE)
    if options.step is None:
        return split, _numbers(options.samples)
    if options.which != "train" or options.samples:
        raise errors.UserError(
            "--step shows a training step: leave out --which and --samples", page=_PAGE
        )
    stream = skipped_samples.from_config(cfg.data)
    batches = stream.schedule(schedule)
    first = batches.consumed_after(options.step - 1)
    return split, stream.numbers(np.arange(first, first + batches.size(first)))


def _numbers(text: str) -> np.ndarray:
    if not text:
        return np.arange(0)
    return np.arange(*validation.stretch(text, "--samples", _PAGE))


def _document(
    corpus: indexed.IndexedCorpus, number: int, text: tokenizer.Tokenizer | None
) -> list[str]:
    n = len(corpus.document_indices) - 1
    if not 0 <= number < n:
        raise errors.UserError(
            f"--document {number}: {corpus.prefix} has {n}, from 0 on", page=_PAGE
        )
    first, stop = corpus.document_indices[number : number + 2]
    lines = [f"document {number}: {stop - first} sequence(s)"]
    return lines + [_show(corpus.read(i), text) for i in range(first, stop)]


def _show(tokens: np.ndarray, text: tokenizer.Tokenizer | None) -> str:
    return text.decode(tokens.tolist()) if text else " ".join(map(str, tokens))


def _origin(source: samples.SampleMap | blend.Blend, number: int) -> str:
    """Return where a sample comes from: its corpus, its sequences, and where it begins in them."""
    if isinstance(source, blend.Blend):
        part = source.maps[source.dataset_index[number]]
        return _origin(part, source.dataset_sample_index[number])
    flat = source.shuffle_index[number]
    (place, offset), (last, _) = source.sample_index[flat].tolist(), source.sample_index[flat + 1]
    documents = ", ".join(map(str, source.document_index[place : last + 1]))
    return f"{source.corpus.prefix}, sequence(s) {documents}, from token {offset} of the first"


def _dump(path: str, arrays: dict[str, np.ndarray]) -> None:
    try:
        pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
    except OSError as error:
        raise errors.UserError(f"--dump {path}: {error}", page=_PAGE) from error


if __name__ == "__main__":
    sys.exit(main())
