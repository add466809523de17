"""A corpus made from a folder of text at its first use (`data.from_text`)."""

import hashlib
import itertools
import pathlib
import sys
import sysconfig
from collections.abc import Iterator

import numpy as np
import tqdm

from gpt3jax import errors
from gpt3jax.config import schema
from gpt3jax.data import (
    documents,
    file_lock,
    indexed,
    tokenizer,
    tokenizer_sources,
    tokenizer_training,
)

PYTHON = "python"  # data.from_text: the sources of Python's standard library
PYTHON_BYTES = 12_000_000  # of these: enough for a short run, some 20 s of work on a slow core
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
_ENCODE_AT_ONCE = 64  # files


def ensure_corpus(data: schema.Data, model: schema.Model) -> None:
    """Make the corpus `data.paths[0]` from `data.from_text`, unless it is there already.

    Each file becomes a document that ends with the end-of-document token. The tokenizer is
    `data.tokenizer`, or `data.vocab_file` and `data.merge_file`; if both of these files are absent
    it is trained first, with `model.vocab_size` tokens. If it is interrupted, the next run starts
    again. Of several processes on a machine, one makes the corpus and the others wait.

    Raises:
        UserError: there is no text, or the tokenizer does not fit the model.
    """
    if not data.from_text or _exists(data.paths[0]):
        return
    if not (data.vocab_file or data.tokenizer):
        raise errors.UserError(
            "data.from_text needs data.vocab_file and data.merge_file: the tokenizer, which is "
            "trained and written there if the files are absent; or data.tokenizer",
            page="data.md#which-corpora-a-run-reads",
        )
    files = text_files(data.from_text)
    lock = pathlib.Path(data.paths[0] + ".lock")
    with file_lock.held(lock, is_required=True):
        if not _exists(data.paths[0]):
            _make(files, data, model)
        lock.unlink(missing_ok=True)  # a process that still waits will see the corpus


def _make(files: list[pathlib.Path], data: schema.Data, model: schema.Model) -> None:
    """Train the tokenizer if need be, and write the corpus."""
    if data.vocab_file and not tokenizer_training.exists(data.vocab_file, data.merge_file):
        texts = read(files, "training the tokenizer", [])
        tokenizer_training.train(texts, model.vocab_size, data.vocab_file, data.merge_file)
    check_vocabulary(data, model)
    _write(files, data)


def _write(files: list[pathlib.Path], data: schema.Data) -> None:
    bpe = tokenizer_sources.of_config(data)
    left_out: list[pathlib.Path] = []
    texts = read(files, f"writing {data.paths[0]}", left_out)
    with indexed.Writer(data.paths[0], indexed.token_dtype(bpe.vocab_size)) as writer:
        while chunk := list(itertools.islice(texts, _ENCODE_AT_ONCE)):
            for ids in bpe.encode_batch(chunk):
                writer.add_document([[*ids, bpe.eod_id]])
        if not writer.n_documents:
            raise errors.UserError(
                f"data.from_text={data.from_text!r}: none of its {len(files)} files is UTF-8 text",
                page="data.md#which-corpora-a-run-reads",
            )
    if left_out:
        sys.stderr.write(
            f"WARNING: data.from_text={data.from_text!r}: {len(left_out)} of {len(files)} files "
            f"are not UTF-8 and were left out, {left_out[0]} among them\n"
        )


def _exists(prefix: str) -> bool:
    return all(pathlib.Path(prefix + end).is_file() for end in (".bin", ".idx"))


def text_files(source: str) -> list[pathlib.Path]:
    """Return the files of a folder in the order of a hash, so that all splits are alike.

    In the order of their paths the last files, test and validation, would differ from the first.
    Hidden files and folders are left out. Of Python's library it returns the first PYTHON_BYTES.

    Raises:
        UserError: the folder is missing or empty.
    """
    folder = pathlib.Path(sysconfig.get_paths()["stdlib"] if source == PYTHON else source)
    pattern = "*.py" if source == PYTHON else "*"
    files = [
        path
        for path in folder.rglob(pattern)
        if path.is_file()
        and not documents.is_hidden(path, folder)
        and not (source == PYTHON and _LEFT_OUT & set(path.relative_to(folder).parts))
    ]
    if not files:
        raise errors.UserError(
            f"data.from_text={source!r}: there are no files in {folder}: give a folder of text, "
            f"or {PYTHON!r}",
            page="data.md#which-corpora-a-run-reads",
        )
    files.sort(key=lambda p: hashlib.sha256(p.relative_to(folder).as_posix().encode()).digest())
    if source != PYTHON:
        return files
    sizes = np.cumsum([path.stat().st_size for path in files])
    return [path for path, size in zip(files, sizes, strict=True) if size <= PYTHON_BYTES]


def read(files: list[pathlib.Path], doing: str, left_out: list[pathlib.Path]) -> Iterator[str]:
    """Yield the text of each file that is UTF-8 and not empty, under a progress bar.

    Files that are not UTF-8 are added to `left_out`.

    Raises:
        UserError: a file cannot be read.
    """
    for path in tqdm.tqdm(files, desc=doing, unit=" files"):
        try:
            text = documents.decode(path.read_bytes())
        except UnicodeDecodeError:
            left_out.append(path)
            continue
        except OSError as error:
            raise errors.UserError(
                f"data.from_text: {path}: {error}", page="data.md#which-corpora-a-run-reads"
            ) from error
        if text:
            yield text


def check_vocabulary(data: schema.Data, model: schema.Model) -> None:
    """Check that the tokenizer, if one is named, fits `model.vocab_size` and `data.eod_id`.

    Raises:
        UserError: it does not fit; the message says what to set.
    """
    if not (data.vocab_file or data.tokenizer):
        return
    bpe = tokenizer_sources.of_config(data)
    if bpe.vocab_size > model.vocab_size:
        raise errors.UserError(
            f"{data.tokenizer or data.vocab_file} has {bpe.vocab_size} tokens, more than "
            f"model.vocab_size={model.vocab_size}: set model.vocab_size={bpe.vocab_size}",
            page="data.md#when-data-is-refused",
        )
    if bpe.eod_id != data.eod_id:
        raise errors.UserError(
            f"{data.tokenizer or data.vocab_file} has {tokenizer.END_OF_TEXT} as {bpe.eod_id}, but "
            f"data.eod_id={data.eod_id}: set data.eod_id={bpe.eod_id}",
            page="data.md#when-data-is-refused",
        )
    if data.tokenizer and bpe.added and data.eod_id not in bpe.added:
        known = ", ".join(f"{number} ({token})" for number, token in sorted(bpe.added.items())[:8])
        raise errors.UserError(
            f"data.eod_id={data.eod_id} is an ordinary token of data.tokenizer={data.tokenizer}: "
            f"set it to the token that ends a document, one of {known}",
            page="data.md#when-data-is-refused",
        )


def unigram_entropy(corpus: indexed.Corpus, n_tokens: int = 4_000_000) -> float:
    """Return the entropy (nats per token) of the frequencies of the first n_tokens tokens.

    It is the loss of a model that knows the frequency of each token and nothing else. 0 for no
    token.
    """
    _, counts = np.unique(corpus.head(n_tokens), return_counts=True)
    shares = counts / counts.sum()
    return abs(float((shares * np.log(shares)).sum()))  # without the sign of -0.0
