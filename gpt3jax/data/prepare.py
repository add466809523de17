"""`python -m gpt3jax.data.prepare`: from text to a corpus, as Megatron's `preprocess_data.py` does.

The main thread reads chunks of a MiB and writes their tokens, in order; `--workers` threads parse
and encode them (the tokenizers let other threads run meanwhile). A few chunks are in flight, so
memory does not depend on the size of the input.
"""

import collections
import dataclasses
import os
import pathlib
import sys
from collections.abc import Iterator
from concurrent import futures
from typing import Annotated, Any, Literal

import numpy as np
import tqdm
import tyro

from gpt3jax import errors
from gpt3jax.config import command, ranges, user_paths
from gpt3jax.data import documents, indexed, tokenizer

N_TOLD = 10  # bad records that are named one by one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What `gpt3jax.data.prepare` is asked to do."""

    input: tuple[user_paths.Path, ...]
    """Files, globs or folders (hidden files left out), read in this order: .jsonl or .json (one
    object a line), .txt (one document a file), each also with .gz or .zst, and .parquet."""
    output_prefix: user_paths.Path
    """The corpus becomes OUTPUT_PREFIX_KEY_document.bin and .idx."""
    json_key: str = "text"
    """Key of the text in a JSON object, or column of a Parquet file."""
    source: tyro.conf.OmitArgPrefixes[tokenizer.Source] = dataclasses.field(
        default_factory=tokenizer.Source
    )
    append_eod: bool = False
    """End each document that is not empty with the end-of-document token."""
    workers: Annotated[int, ranges.Range(1, 1000)] = len(os.sched_getaffinity(0))
    """Threads that encode."""
    on_bad_line: Literal["error", "skip"] = "error"
    """At a line without JSON, without the key, or that is not UTF-8: stop, or leave it out."""
    on_empty_document: Literal["keep", "skip", "error"] = "keep"
    """At a document without a token: keep its (empty) entry as Megatron does, leave it out, or
    stop."""
    max_document_mb: Annotated[int, ranges.Range(1, 10**6)] = 256
    """A larger document is bad; it bounds the memory (MiB). A .txt file may be of any size with a
    GPT-2 vocabulary."""


@dataclasses.dataclass(kw_only=True)
class Encoded:
    """The documents of a chunk as tokens, in the terms of `indexed.Writer.extend`."""

    chunk: documents.Chunk
    tokens: list[np.ndarray] = dataclasses.field(default_factory=list)
    lengths: list[int] = dataclasses.field(default_factory=list)
    sequences: list[int] = dataclasses.field(default_factory=list)
    bad: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    """Number of a bad record, and what is wrong with it."""
    empty: list[int] = dataclasses.field(default_factory=list)
    """Numbers of the documents without a token."""


@dataclasses.dataclass(kw_only=True)
class Report:
    """What became of the input."""

    prefix: str
    n_documents: int = 0
    n_tokens: int = 0
    n_empty: int = 0
    n_bad: int = 0
    bad: list[str] = dataclasses.field(default_factory=list)
    """The first bad ones, by file and line."""
    left_out: list[pathlib.Path] = dataclasses.field(default_factory=list)
    """Files of folders that are of an unknown kind."""
    drops_characters: bool = False
    """The tokenizer leaves out what it does not know."""


def prepare(options: Options) -> Report:
    """Write the corpus that the options ask for, under a progress bar.

    Raises:
        UserError: input, tokenizer or output that cannot be used, or a bad document that is not to
            be skipped. Nothing has the corpus's name then, unless it was there before.
    """
    left_out: list[pathlib.Path] = []
    files = documents.find(options.input, left_out)
    encoder = options.source.open()
    os.environ.setdefault("RAYON_NUM_THREADS", str(options.workers))  # of the library tokenizers
    report = Report(
        prefix=f"{options.output_prefix}_{options.json_key}_document",
        left_out=left_out,
        drops_characters=encoder.drops_characters,
    )
    max_bytes = options.max_document_mb << 20
    last_cut = tokenizer.last_cut if encoder.splits_at_blanks else None
    sizes = {path: path.stat().st_size for path in files}
    every = 0.5 if sys.stderr.isatty() else 30.0
    with (
        indexed.Writer(report.prefix, indexed.token_dtype(encoder.vocab_size)) as writer,
        tqdm.tqdm(
            total=sum(sizes.values()), desc="encoding", unit="B", unit_scale=True, mininterval=every
        ) as bar,
        futures.ThreadPoolExecutor(options.workers) as pool,
    ):
        done = 0
        for path in files:
            chunks = documents.read(path, options.json_key, max_bytes, last_cut)
            for encoded in _encode_in_order(chunks, encoder, options, pool):
                _write(encoded, writer, options, report)
                _show(bar, done + encoded.chunk.position, report)
            done += sizes[path]
        if not report.n_tokens:
            bad = f": {report.n_bad:,} bad lines, {report.bad[0]} first" if report.bad else ""
            raise errors.UserError(f"{' '.join(options.input)}: there is no text to encode{bad}")
    return report


def _encode_in_order(
    chunks: Iterator[documents.Chunk],
    encoder: tokenizer.Tokenizer,
    options: Options,
    pool: futures.ThreadPoolExecutor,
) -> Iterator[Encoded]:
    """Encode chunks side by side and yield them in their order, a few ahead of the consumer."""
    pending: collections.deque[futures.Future[Encoded]] = collections.deque()
    try:
        for chunk in chunks:
            pending.append(pool.submit(encode, chunk, encoder, options))
            if len(pending) > options.workers + 1:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


def encode(chunk: documents.Chunk, encoder: tokenizer.Tokenizer, options: Options) -> Encoded:
    """Return a chunk's documents as tokens, and the faults found."""
    out = Encoded(chunk=chunk)
    numbers, records = [], []
    for number, record in enumerate(chunk.records, chunk.first):
        try:
            texts = documents.text_of(record, options.json_key, options.max_document_mb << 20)
            records.append(texts)
            numbers.append(number)
        except documents.BadError as error:
            out.bad.append((number, str(error)))
    arrays = iter(encoder.encode_batch([text for texts in records for text in texts]))
    end = np.full(1, encoder.eod_id, np.uint32)
    for number, texts in zip(numbers, records, strict=True):
        sequences = [ids for ids in (next(arrays) for _ in texts) if len(ids)]
        if not sequences:
            out.empty.append(number)
            if options.on_empty_document == "skip":
                continue
        out.tokens += sequences
        out.lengths += map(len, sequences)
        if options.append_eod and sequences and chunk.ends:
            out.tokens.append(end)
            out.lengths[-1] += 1
        out.sequences.append(len(sequences))
    return out


def _write(encoded: Encoded, writer: indexed.Writer, options: Options, report: Report) -> None:
    path = encoded.chunk.path
    for number, problem in encoded.bad:
        told = f"{path}:{number}: {problem}"
        if options.on_bad_line == "error":
            raise errors.UserError(f"{told}; mend it, or leave such out with --on-bad-line skip")
        report.n_bad += 1
        if report.n_bad <= N_TOLD:
            report.bad.append(told)
    if encoded.empty and options.on_empty_document == "error":
        raise errors.UserError(
            f"{path}:{encoded.empty[0]}: an empty document; mend it, or set --on-empty-document"
        )
    report.n_empty += len(encoded.empty)
    if encoded.sequences:
        tokens = np.concatenate([*encoded.tokens, np.empty(0, np.uint32)])
        writer.extend(tokens, encoded.lengths, encoded.sequences, encoded.chunk.continues)
        report.n_tokens += len(tokens)
    report.n_documents = writer.n_documents


def _show(bar: "tqdm.tqdm[Any]", position: int, report: Report) -> None:
    bar.update(position - bar.n)
    seconds = max(bar.format_dict["elapsed"], 1e-3)
    n_documents, n_tokens = report.n_documents / seconds, report.n_tokens / seconds
    bar.set_postfix_str(f"{n_documents:,.0f} documents/s, {n_tokens:,.0f} tokens/s", refresh=False)


def _lines(report: Report, options: Options) -> list[str]:
    """Return what was written, for a terminal."""
    lines = [
        f"{report.prefix}.bin and .idx: {report.n_documents:,} documents, "
        f"{report.n_tokens:,} tokens, {pathlib.Path(report.prefix + '.bin').stat().st_size:,} bytes"
    ]
    if report.n_empty:
        lines.append(f"{report.n_empty:,} empty documents ({options.on_empty_document})")
    if report.left_out:
        n_files = f"{len(report.left_out):,} files in folders"
        lines.append(f"{n_files} are of other kinds and were left out, {report.left_out[0]} first")
    if report.drops_characters:
        lines.append(
            "WARNING: the tokenizer has neither a token for each byte nor one for what it does not "
            "know: characters outside of its vocabulary were left out"
        )
    if report.n_bad:
        lines += [f"{report.n_bad:,} bad lines were left out:", *report.bad]
    return lines


def main() -> int:
    """Parse, prepare, tell what was written; return the exit status."""
    return command.run(_prepare)


def _prepare() -> None:
    options = command.parse(Options, "data.prepare", __doc__)
    print("\n".join(_lines(prepare(options), options)))


if __name__ == "__main__":
    sys.exit(main())
