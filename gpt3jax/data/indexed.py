"""Megatron's corpus format: the tokens in PREFIX.bin, the places of the sequences in PREFIX.idx.

Little-endian, without padding: magic (9 bytes), version (u64, 1), type code (u8), number of
sequences (u64), number of document entries (u64), lengths (i32 each), byte offsets (i64 each),
document entries (i64 each: 0, then the number of sequences up to each document's end).
Source: Megatron-LM `megatron/core/datasets/indexed_dataset.py` at d98e8a64dd.
"""

import array
import contextlib
import mmap
import os
import pathlib
import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import IO, Protocol, TypeAlias

import numpy as np

from gpt3jax import errors

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPES: dict[int, type[np.integer]] = {
    1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16,
}  # fmt: skip
_HEADER = struct.Struct("<9sQBQQ")
CHECK_AT_ONCE = 1 << 20  # sequences: bounds the memory of opening a corpus of any size
COPY_AT_ONCE = 1 << 23  # tokens
_Mapped: TypeAlias = mmap.mmap | bytes  # bytes of an empty file, which cannot be mapped


def token_dtype(vocab_size: int) -> type[np.generic]:
    """Return the type that Megatron writes tokens in: uint16 below 65,500 tokens, else int32."""
    return np.uint16 if vocab_size < 65_500 else np.int32


class Corpus(Protocol):
    """Sequences of tokens, by number, from which samples are made."""

    prefix: str
    lengths: np.ndarray
    n_tokens: int

    def __len__(self) -> int: ...

    def gather(self, sequences: np.ndarray, offsets: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """As `IndexedCorpus.gather`."""

    def head(self, n: int) -> np.ndarray:
        """Return the first tokens, at most n."""


class IndexedCorpus:
    """A memory-mapped corpus: nothing is copied until it is read.

    Attributes:
        prefix: path of both files without their extensions.
        dtype: of a token as stored.
        tokens: the whole .bin as one array.
        lengths: tokens of each sequence, int32.
        pointers: byte at which each sequence begins in the .bin, int64.
        document_indices: 0, then the number of sequences up to each document's end, int64.
        n_tokens: number of tokens in all sequences.
    """

    def __init__(self, prefix: str):
        """Map both files, and check that each sequence begins where the one before it ends.

        Raises:
            UserError: a file is missing, cut or damaged; the message names the file and the fault.
        """
        self.prefix = prefix
        index_path, tokens_path = _paths(prefix)
        index = _map(index_path)
        self.dtype, n_sequences, n_documents = _read_header(index, index_path)
        arrays, at = [], _HEADER.size
        for count, kind in ((n_sequences, "<i4"), (n_sequences, "<i8"), (n_documents, "<i8")):
            arrays.append(np.frombuffer(index, kind, count, at))
            at += arrays[-1].nbytes
        self.lengths, self.pointers, self.document_indices = arrays
        self.n_tokens = self._count_tokens(index_path)
        self._check_documents(index_path)
        data = _map(tokens_path)
        _check_size(tokens_path, len(data), self.n_tokens * self.dtype.itemsize)
        self.tokens = np.frombuffer(data, self.dtype)

    def __len__(self) -> int:
        """Return the number of sequences; each is a document unless sentences were split."""
        return len(self.lengths)

    def read(self, sequence: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Return tokens of a sequence, starting at an offset, as a view of the map."""
        first = int(self.pointers[sequence]) // self.dtype.itemsize
        stop = first + int(self.lengths[sequence])
        start = first + offset
        return self.tokens[start : stop if length is None else min(stop, start + length)]

    def gather(self, sequences: np.ndarray, offsets: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Return the tokens of pieces of sequences, concatenated.

        Piece i is tokens `[offsets[i], offsets[i] + lengths[i])` of `sequences[i]`, int64 each.
        While it runs it needs 8 bytes a token.
        """
        starts = self.pointers[sequences] // self.dtype.itemsize + offsets
        ends = np.cumsum(lengths)
        places = np.repeat(starts - (ends - lengths), lengths)
        places += np.arange(len(places))
        return self.tokens[places]

    def head(self, n: int) -> np.ndarray:
        """Return the first tokens, at most n, as a view of the map."""
        return self.tokens[:n]

    def _count_tokens(self, path: pathlib.Path) -> int:
        size, end = self.dtype.itemsize, 0
        for low in range(0, len(self), CHECK_AT_ONCE):
            lengths = self.lengths[low : low + CHECK_AT_ONCE].astype(np.int64)
            if np.min(lengths) < 0:
                i = int(np.argmin(lengths))
                raise _refusal(
                    f"{path}: sequence {low + i} has a negative length, {lengths[i]}: the file is "
                    "damaged; copy or prepare it again"
                )
            ends = end + np.cumsum(lengths * size)
            wrong = self.pointers[low : low + CHECK_AT_ONCE] != ends - lengths * size
            if wrong.any():
                i = int(wrong.argmax())
                raise _refusal(
                    f"{path}: sequence {low + i} begins at byte {self.pointers[low + i]} where the "
                    f"lengths before it end at {ends[i] - lengths[i] * size}: the file is damaged; "
                    "copy or prepare it again"
                )
            end = int(ends[-1])
        return end // size

    def _check_documents(self, path: pathlib.Path) -> None:
        ends = self.document_indices
        if not len(ends) or ends[0] or ends[-1] != len(self) or (ends[1:] < ends[:-1]).any():
            raise _refusal(
                f"{path}: its documents do not cover its {len(self)} sequences: the file is "
                "damaged; copy or prepare it again"
            )


def tokens_checksum(corpus: Corpus) -> int:
    """Return a checksum of the first tokens of 64 sequences, evenly over the corpus."""
    sequences = np.linspace(0, len(corpus) - 1, 64).astype(np.int64)
    lengths = np.minimum(corpus.lengths[sequences], 1024)
    tokens = corpus.gather(sequences, np.zeros_like(sequences), lengths)
    return zlib.crc32(tokens.astype("<i8").tobytes())


def lengths_checksum(corpus: Corpus) -> int:
    """Return a checksum of the sequences' lengths, by which corpora are told apart."""
    return zlib.crc32(corpus.lengths.tobytes())


def check_tokens(corpus: IndexedCorpus, vocab_size: int) -> None:
    """Check that a vocabulary fits the type of the tokens, and a sample of the tokens.

    The sample is 256 stretches of 4,096 tokens over the whole corpus. Every batch is checked too,
    when it is read.

    Raises:
        UserError: the type cannot hold all of the vocabulary, or a token is beyond it.
    """
    largest = int(np.iinfo(corpus.dtype).max)
    if largest < vocab_size - 1:
        raise _refusal(
            f"{corpus.prefix}.bin has {corpus.dtype} tokens, up to {largest}, but model.vocab_size="
            f"{vocab_size}: it was tokenised with another vocabulary"
        )
    for start in np.linspace(0, max(0, corpus.n_tokens - 4096), 256, dtype=np.int64):
        tokens = corpus.tokens[start : start + 4096]
        bad = np.flatnonzero((tokens < 0) | (tokens >= vocab_size))
        if len(bad):
            place = start + bad[0]
            raise _refusal(
                f"{corpus.prefix}.bin has token {corpus.tokens[place]} at place {place}, outside "
                f"of model.vocab_size={vocab_size}: is it tokenised for this model?"
            )


def _paths(prefix: str) -> tuple[pathlib.Path, pathlib.Path]:
    paths = pathlib.Path(prefix + ".idx"), pathlib.Path(prefix + ".bin")
    for path in paths:
        if not path.is_file():
            raise _refusal(f"{path}: no such file{_hint(prefix)}")
    return paths


def _hint(prefix: str) -> str:
    """Return a guess at the mistake in a prefix that has no files, for a message."""
    if prefix.endswith((".bin", ".idx")):
        return f"; data.paths takes the prefix of both files: {prefix[:-4]!r} in place of it"
    try:
        float(prefix)
    except ValueError:
        return ""
    return (
        f"; {prefix} stands where a prefix is expected: a blend is WEIGHT PREFIX WEIGHT PREFIX "
        "..., each weight before its prefix"
    )


def _map(path: pathlib.Path) -> _Mapped:
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                return b""
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise _refusal(f"{path}: {error}") from error


def _read_header(index: _Mapped, path: pathlib.Path) -> tuple[np.dtype[np.integer], int, int]:
    if index[: len(MAGIC)] != MAGIC:
        raise _refusal(
            f"{path} is not an index of Megatron's: it begins with {bytes(index[:9])!r}, "
            f"not {MAGIC!r}"
        )
    if len(index) < _HEADER.size:
        raise _refusal(f"{path} was cut: {len(index)} bytes are less than its header")
    _, version, code, n_sequences, n_documents = _HEADER.unpack(index[: _HEADER.size])
    if version != VERSION:
        raise _refusal(f"{path} has version {version}; version {VERSION} is known")
    if code not in DTYPES:
        known = ", ".join(f"{c} ({np.dtype(d)})" for c, d in DTYPES.items())
        raise _refusal(f"{path} has tokens of type code {code}; known are {known}")
    needed = _HEADER.size + 12 * n_sequences + 8 * n_documents
    if len(index) not in (needed, needed + n_sequences):  # the latter with modes, multimodal
        raise _refusal(
            f"{path} has {len(index)} bytes where {n_sequences} sequences and {n_documents} "
            f"document entries make {needed}: it was cut or damaged"
        )
    return np.dtype(DTYPES[code]).newbyteorder("<"), n_sequences, n_documents


def _check_size(path: pathlib.Path, n_bytes: int, needed: int) -> None:
    if n_bytes != needed:
        fault = "it was cut" if n_bytes < needed else "it is too long"
        raise _refusal(
            f"{path} has {n_bytes} bytes and its index needs {needed}: {fault}, or the two files "
            "are not of one corpus; copy or prepare them again"
        )


class Writer:
    """A context manager that writes a corpus; its files get their names when all is written.

    It keeps 4 bytes a sequence and 8 a document in memory, and no tokens.
    """

    def __init__(self, prefix: str, dtype: type[np.generic]):
        """Open `PREFIX.bin.partial`; make the folder if it is absent.

        Raises:
            UserError: it cannot be written.
        """
        self._prefix, self._dtype = prefix, np.dtype(dtype).newbyteorder("<")
        self._code = {np.dtype(d): code for code, d in DTYPES.items()}[np.dtype(dtype)]
        self._lengths = array.array("i")
        self._documents = array.array("q", [0])
        self._partial = pathlib.Path(prefix + ".bin.partial")
        with _writing(self._partial):
            self._partial.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._partial.open("wb")

    @property
    def n_documents(self) -> int:
        """Number of documents so far."""
        return len(self._documents) - 1

    def add_document(self, sequences: Sequence[np.ndarray | Sequence[int]]) -> None:
        """Append a document of sequences; a document without any gets an entry too.

        Raises:
            UserError: a token does not fit the type; the disk is full.
        """
        arrays = [np.asarray(sequence) for sequence in sequences]
        tokens = np.concatenate([a for a in arrays if len(a)] or [np.empty(0, self._dtype)])
        self.extend(tokens, [len(a) for a in arrays], [len(arrays)])

    def extend(
        self,
        tokens: np.ndarray,
        lengths: Sequence[int],
        sequences: Sequence[int],
        *,
        continues: bool = False,
    ) -> None:
        """Append many documents at once, or one more piece of the last.

        Args:
            tokens: of all sequences, concatenated.
            lengths: number of tokens of each sequence.
            sequences: number of sequences of each document.
            continues: the first sequence continues the last sequence of the corpus.

        Raises:
            UserError: a token does not fit the type; a sequence has 2^31 tokens; the disk is full.
        """
        lengths, sequences = list(lengths), list(sequences)
        assert len(tokens) == sum(lengths) and len(lengths) == sum(sequences)
        cast = self._cast(tokens)
        with _writing(self._partial):
            self._file.write(cast.data)
        if continues:
            lengths[0] += self._lengths.pop()
            self._documents.pop()
        first = len(self._lengths)
        if lengths and max(lengths) > np.iinfo(np.int32).max:
            raise _refusal(
                f"{self._prefix}: document {self.n_documents} has {max(lengths):,} tokens in one "
                "sequence; the format counts them in 32 bits: split it"
            )
        self._lengths.extend(lengths)
        self._documents.extend((first + np.cumsum(sequences, dtype=np.int64)).tolist())

    def add_corpus(self, corpus: IndexedCorpus) -> None:
        """Append all documents of a corpus whose tokens have the same type, block by block."""
        assert corpus.dtype == self._dtype, (corpus.dtype, self._dtype)
        first = len(self._lengths)
        for low in range(0, corpus.n_tokens, COPY_AT_ONCE):
            with _writing(self._partial):
                self._file.write(corpus.tokens[low : low + COPY_AT_ONCE].data)
        self._lengths.frombytes(corpus.lengths.astype(np.int32).tobytes())
        documents = corpus.document_indices[1:].astype(np.int64) + first
        self._documents.frombytes(documents.tobytes())

    def _cast(self, tokens: np.ndarray) -> np.ndarray:
        if tokens.dtype != self._dtype and len(tokens):
            low, high = tokens.min(), tokens.max()
            limits = np.iinfo(self._dtype)
            if tokens.dtype.kind not in "iu" or low < limits.min or high > limits.max:
                raise _refusal(
                    f"{self._prefix}.bin takes {self._dtype} tokens, {limits.min} to {limits.max}, "
                    f"not {low} to {high} ({tokens.dtype}): write it with a larger vocabulary"
                )
        return np.ascontiguousarray(tokens, self._dtype)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        index = pathlib.Path(self._prefix + ".idx")
        partial = pathlib.Path(self._prefix + ".idx.partial")
        try:
            with _writing(self._partial):
                _close_durably(self._file)
            if kind is not None:
                return
            with _writing(partial), partial.open("wb") as file:
                lengths = np.frombuffer(self._lengths, np.int32)
                documents = np.frombuffer(self._documents, np.int64)
                write_index(file, self._code, lengths, documents)
                _close_durably(file)
            index.unlink(missing_ok=True)  # an old index must not stand beside the new tokens
            self._partial.replace(self._prefix + ".bin")
            partial.replace(index)  # last: without it there is no corpus
        finally:
            self._partial.unlink(missing_ok=True)
            partial.unlink(missing_ok=True)


def write_index(file: IO[bytes], code: int, lengths: np.ndarray, documents: np.ndarray) -> None:
    """Write the content of PREFIX.idx: type code of the tokens, lengths, document entries."""
    itemsize = np.dtype(DTYPES[code]).itemsize
    file.write(_HEADER.pack(MAGIC, VERSION, code, len(lengths), len(documents)))
    file.write(lengths.astype("<i4").tobytes())
    end = 0
    for low in range(0, len(lengths), CHECK_AT_ONCE):
        sizes = lengths[low : low + CHECK_AT_ONCE].astype("<i8") * itemsize
        ends = end + np.cumsum(sizes)
        file.write((ends - sizes).tobytes())
        end = int(ends[-1])
    file.write(documents.astype("<i8").tobytes())


def _close_durably(file: IO[bytes]) -> None:
    with file:
        file.flush()
        os.fsync(file.fileno())


def _refusal(message: str) -> errors.UserError:
    return errors.UserError(message, page="data.md#when-data-is-refused")


@contextlib.contextmanager
def _writing(path: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _refusal(f"{path}: {error.strerror}: nothing was written") from error
