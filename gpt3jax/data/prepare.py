"""Turn text into a corpus of tokens, as Megatron's `preprocess_data.py` does.

The main thread reads chunks of about a MiB and writes their tokens in order; `--workers` threads
parse and encode the chunks. Only a few chunks are in memory at a time, so the memory that it needs
does not depend on the size of the input.
"""

import collections
import dataclasses
import os
import pathlib
import sys
from collections.abc import Iterator
from concurrent import futures
from typing import Annotated, Literal, Never, TypeAlias

import numpy as np
import tqdm
import tyro

from gpt3jax import errors
from gpt3jax.config import command_line, ranges, user_paths
from gpt3jax.data import documents, indexed, tokenizer, tokenizer_sources

_PAGE = "data.md#from-text"
N_BAD_SHOWN = 10  # bad records that the report names
_Bar: TypeAlias = "tqdm.tqdm[Never]"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The options of `gpt3jax.data.prepare`."""

    input: tuple[user_paths.Path, ...]
    """Files, globs or folders (without their hidden files), read in this order.
    .jsonl and .json have one object a line, .txt is one document a file, both also as .gz or .zst.
    .parquet has one document a row."""
    output_prefix: user_paths.Path
    """Write the corpus to OUTPUT_PREFIX_KEY_document.bin and .idx."""
    json_key: str = "text"
    """The key (or Parquet column) that holds the text."""
    source: tyro.conf.OmitArgPrefixes[tokenizer_sources.Source] = dataclasses.field(
        default_factory=tokenizer_sources.Source
    )
    append_eod: bool = False
    """End each document that is not empty with the end-of-document token."""
    workers: Annotated[int, ranges.Range(1, 1000)] = dataclasses.field(
        default_factory=lambda: len(os.sched_getaffinity(0))
    )
    """Number of threads that encode; by default, the number of CPUs that are free to use."""
    on_bad_line: Literal["error", "skip"] = "error"
    """Stop at a line that is not UTF-8, is not JSON or lacks the key; or skip it."""
    on_empty_document: Literal["keep", "skip", "error"] = "keep"
    """Keep an entry for a document without tokens, as Megatron does; or skip it; or stop."""
    max_document_mb: Annotated[int, ranges.Range(1, 10**6)] = 256
    """Treat a larger document as a bad line (MiB): this limits the memory.
    With a GPT-2 vocabulary a .txt file may be of any size."""


@dataclasses.dataclass(kw_only=True)
class Encoded:
    """The documents of a chunk as tokens: the arguments of `indexed.Writer.extend`."""

    chunk: documents.Chunk
    tokens: list[np.ndarray] = dataclasses.field(default_factory=list)
    lengths: list[int] = dataclasses.field(default_factory=list)
    sequences: list[int] = dataclasses.field(default_factory=list)
    bad: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    """(number, fault) of each bad record."""
    empty: list[int] = dataclasses.field(default_factory=list)
    """Numbers of the documents without tokens."""


@dataclasses.dataclass(kw_only=True)
class Report:
    """How much was written, and what was left out."""

    prefix: str
    n_documents: int = 0
    n_tokens: int = 0
    n_empty: int = 0
    n_bad: int = 0
    bad: list[str] = dataclasses.field(default_factory=list)
    """The first N_BAD_SHOWN bad records, as FILE:LINE: FAULT."""
    left_out: list[pathlib.Path] = dataclasses.field(default_factory=list)
    """Files in input folders whose format is not known."""
    drops_characters: bool = False
    """The tokenizer drops characters that are not in its vocabulary."""


def main() -> int:
    """Parse the options, prepare the corpus, print a report; return the exit status."""
    return command_line.run(_prepare_and_report)


def _prepare_and_report() -> None:
    options = command_line.parse(Options, "data.prepare", __doc__)
    print("\n".join(report_lines(prepare(options), options)))


def prepare(options: Options) -> Report:
    """Write the corpus that the options ask for, under a progress bar.

    Raises:
        UserError: the input, the tokenizer or the output cannot be used, or a bad document must not
            be skipped. A corpus of the same name that was there before stays as it was.
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
    with indexed.Writer(report.prefix, indexed.token_dtype(encoder.vocab_size)) as writer:
        _write_files(files, encoder, options, writer, report)
        if not report.n_tokens:
            bad = f": {report.n_bad:,} bad lines, first {report.bad[0]}" if report.bad else ""
            raise errors.UserError(
                f"{' '.join(options.input)}: there is no text to encode{bad}", page=_PAGE
            )
    return report


def _write_files(
    files: list[pathlib.Path],
    encoder: tokenizer.Tokenizer,
    options: Options,
    writer: indexed.Writer,
    report: Report,
) -> None:
    """Encode and write files one after another; the report and a progress bar follow."""
    sizes = {path: path.stat().st_size for path in files}
    max_bytes = options.max_document_mb << 20
    last_cut = tokenizer.last_cut if encoder.splits_at_blanks else None
    interval = 0.5 if sys.stderr.isatty() else 30.0
    with (
        tqdm.tqdm(
            total=sum(sizes.values()), desc="encoding", unit="B", unit_scale=True,
            mininterval=interval,
        ) as bar,
        futures.ThreadPoolExecutor(options.workers) as pool,
    ):  # fmt: skip
        done = 0
        for path in files:
            chunks = documents.read(path, options.json_key, max_bytes, last_cut)
            for encoded in _encode_in_order(chunks, encoder, options, pool):
                _write(encoded, writer, options, report)
                _show_progress(bar, done + encoded.chunk.position, report)
            done += sizes[path]


def _encode_in_order(
    chunks: Iterator[documents.Chunk],
    encoder: tokenizer.Tokenizer,
    options: Options,
    pool: futures.ThreadPoolExecutor,
) -> Iterator[Encoded]:
    """Encode chunks in parallel and yield them in order, a few chunks ahead of the caller."""
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
    """Return the documents of a chunk as tokens, and its faults."""
    out = Encoded(chunk=chunk)
    numbers, records = [], []
    for number, record in enumerate(chunk.records, chunk.first):
        try:
            texts = documents.texts_of(record, options.json_key, options.max_document_mb << 20)
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
    for number, fault in encoded.bad:
        message = f"{path}:{number}: {fault}"
        if options.on_bad_line == "error":
            raise errors.UserError(
                f"{message}; fix it, or leave out such lines with --on-bad-line skip", page=_PAGE
            )
        report.n_bad += 1
        if report.n_bad <= N_BAD_SHOWN:
            report.bad.append(message)
    if encoded.empty and options.on_empty_document == "error":
        raise errors.UserError(
            f"{path}:{encoded.empty[0]}: an empty document; fix it, or set --on-empty-document",
            page=_PAGE,
        )
    report.n_empty += len(encoded.empty)
    if encoded.sequences:
        tokens = np.concatenate([*encoded.tokens, np.empty(0, np.uint32)])
        writer.extend(tokens, encoded.lengths, encoded.sequences, continues=encoded.chunk.continues)
        report.n_tokens += len(tokens)
    report.n_documents = writer.n_documents


def _show_progress(bar: _Bar, position: int, report: Report) -> None:
    bar.update(position - bar.n)
    seconds = max(bar.format_dict["elapsed"], 1e-3)
    n_documents, n_tokens = report.n_documents / seconds, report.n_tokens / seconds
    bar.set_postfix_str(f"{n_documents:,.0f} documents/s, {n_tokens:,.0f} tokens/s", refresh=False)


def report_lines(report: Report, options: Options) -> list[str]:
    """Return the lines that say what was written and what was left out."""
    lines = [
        f"{report.prefix}.bin and .idx: {report.n_documents:,} documents, "
        f"{report.n_tokens:,} tokens, {pathlib.Path(report.prefix + '.bin').stat().st_size:,} bytes"
    ]
    if report.n_empty:
        lines.append(f"{report.n_empty:,} empty documents ({options.on_empty_document})")
    if report.left_out:
        lines.append(
            f"{len(report.left_out):,} files of other kinds in folders were left out, first "
            f"{report.left_out[0]}"
        )
    if report.drops_characters:
        lines.append(
            "WARNING: the tokenizer has neither a token for each byte nor one for unknown "
            "characters: characters outside its vocabulary were left out"
        )
    if report.n_bad:
        lines += [f"{report.n_bad:,} bad lines were left out:", *report.bad]
    return lines


if __name__ == "__main__":
    sys.exit(main())
