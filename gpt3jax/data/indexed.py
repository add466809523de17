"""Megatron's corpus format: tokens in PREFIX.bin, where each sequence lies in PREFIX.idx.

Little-endian, without padding: magic (9 bytes), version (u64, 1), type code (u8), number of
sequences (u64), number of document entries (u64), lengths (i32 each), byte offsets (i64 each),
document entries (i64 each: 0, then the number of sequences up to each document's end).
Source: Megatron-LM `megatron/core/datasets/indexed_dataset.py` at d98e8a64dd.
"""

import array
import mmap
import os
import pathlib
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from gpt3jax import config

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_HEADER = struct.Struct("<9sQBQQ")
_CHECK_AT_ONCE = 1 << 20  # sequences: bounds the memory of opening a corpus of any size


def token_dtype(vocab_size: int) -> type[np.generic]:
    """Return the type that Megatron writes tokens in: uint16 below 65,500 tokens, else int32."""
    return np.uint16 if vocab_size < 65_500 else np.int32


class IndexedCorpus:
    """A corpus, memory-mapped: nothing is copied until it is read.

    Attributes:
        prefix: path of both files without their extensions.
        dtype: of a token as stored.
        tokens: the whole .bin as one array.
        lengths: tokens of each sequence, int32.
        pointers: byte at which each sequence begins in the .bin, int64.
        document_indices: 0, then the number of sequences up to each document's end, int64.
        n_tokens: of all sequences.
    """

    def __init__(self, prefix: str):
        """Map both files, and check that each sequence begins where the one before it ends.

        Raises:
            UserError: a file is missing, cut, or not what it should be; it names file and fault.
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
        """Return tokens of a sequence, from an offset on, as a view of the map."""
        first = int(self.pointers[sequence]) // self.dtype.itemsize
        stop = first + int(self.lengths[sequence])
        start = first + offset
        return self.tokens[start : stop if length is None else min(stop, start + length)]

    def gather(self, sequences: np.ndarray, offsets: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Return pieces of sequences, one after another, as one array of all their tokens.

        Piece i is tokens `[offsets[i], offsets[i] + lengths[i])` of `sequences[i]`, int64 each.
        Its memory is 8 bytes a token, while it runs.
        """
        starts = self.pointers[sequences] // self.dtype.itemsize + offsets
        ends = np.cumsum(lengths)
        places = np.repeat(starts - (ends - lengths), lengths)
        places += np.arange(len(places))
        return self.tokens[places]

    def _count_tokens(self, path: pathlib.Path) -> int:
        size, end = self.dtype.itemsize, 0
        for low in range(0, len(self), _CHECK_AT_ONCE):
            lengths = self.lengths[low : low + _CHECK_AT_ONCE].astype(np.int64)
            if lengths.min() < 0:
                i = int(lengths.argmin())
                raise config.UserError(
                    f"{path}: sequence {low + i} has a negative length, {lengths[i]}: the file is "
                    "damaged; copy or prepare it again"
                )
            ends = end + np.cumsum(lengths * size)
            wrong = self.pointers[low : low + _CHECK_AT_ONCE] != ends - lengths * size
            if wrong.any():
                i = int(wrong.argmax())
                raise config.UserError(
                    f"{path}: sequence {low + i} begins at byte {self.pointers[low + i]} where the "
                    f"lengths before it end at {ends[i] - lengths[i] * size}: the file is damaged; "
                    "copy or prepare it again"
                )
            end = int(ends[-1])
        return end // size

    def _check_documents(self, path: pathlib.Path) -> None:
        ends = self.document_indices
        if not len(ends) or ends[0] or ends[-1] != len(self) or (ends[1:] < ends[:-1]).any():
            raise config.UserError(
                f"{path}: its documents do not cover its {len(self)} sequences: the file is "
                "damaged; copy or prepare it again"
            )


def _paths(prefix: str) -> tuple[pathlib.Path, pathlib.Path]:
    paths = pathlib.Path(prefix + ".idx"), pathlib.Path(prefix + ".bin")
    for path in paths:
        if not path.is_file():
            hint = f"data.paths takes the prefix of both files: {prefix[:-4]!r} in place of it"
            wrong = prefix.endswith((".bin", ".idx"))
            raise config.UserError(f"{path}: no such file" + (f"; {hint}" if wrong else ""))
    return paths


def _map(path: pathlib.Path) -> Any:
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                return b""
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise config.UserError(f"{path}: {error}") from error


def _read_header(index: Any, path: pathlib.Path) -> tuple[np.dtype[Any], int, int]:
    if index[: len(MAGIC)] != MAGIC:
        raise config.UserError(
            f"{path} is not an index of Megatron's: it begins with {bytes(index[:9])!r}, "
            f"not {MAGIC!r}"
        )
    if len(index) < _HEADER.size:
        raise config.UserError(f"{path} was cut: {len(index)} bytes are less than its header")
    _, version, code, n_sequences, n_documents = _HEADER.unpack(index[: _HEADER.size])
    if version != VERSION:
        raise config.UserError(f"{path} has version {version}; version {VERSION} is known")
    if code not in DTYPES:
        known = ", ".join(f"{c} ({np.dtype(d)})" for c, d in DTYPES.items())
        raise config.UserError(f"{path} has tokens of type code {code}; known are {known}")
    needed = _HEADER.size + 12 * n_sequences + 8 * n_documents
    if len(index) not in (needed, needed + n_sequences):  # the latter with modes, multimodal
        raise config.UserError(
            f"{path} has {len(index)} bytes where {n_sequences} sequences and {n_documents} "
            f"document entries make {needed}: it was cut or damaged"
        )
    return np.dtype(DTYPES[code]).newbyteorder("<"), n_sequences, n_documents


def _check_size(path: pathlib.Path, n_bytes: int, needed: int) -> None:
    if n_bytes != needed:
        fault = "it was cut" if n_bytes < needed else "it is too long"
        raise config.UserError(
            f"{path} has {n_bytes} bytes and its index needs {needed}: {fault}, or the two files "
            "are not of one corpus; copy or prepare them again"
        )


class Writer:
    """Writes a corpus; a context manager. Nothing has its final name until all is written."""

    def __init__(self, prefix: str, dtype: type[np.generic]):
        """Open `PREFIX.bin.partial`; the folder is made if need be."""
        self._prefix, self._dtype = prefix, np.dtype(dtype).newbyteorder("<")
        self._code = {np.dtype(d): code for code, d in DTYPES.items()}[np.dtype(dtype)]
        pathlib.Path(prefix).parent.mkdir(parents=True, exist_ok=True)
        self._partial = pathlib.Path(prefix + ".bin.partial")
        self._file = self._partial.open("wb")
        self._lengths = array.array("i")  # 4 bytes a sequence, where a list takes 36
        self._documents = array.array("q", [0])

    def add_document(self, sequences: Sequence[np.ndarray | Sequence[int]]) -> None:
        """Append a document of one or more sequences; without any it keeps its entry.

        Raises:
            UserError: a token does not fit the type.
        """
        for sequence in sequences:
            self._file.write(self._cast(sequence).tobytes())
            self._lengths.append(len(sequence))
        self._documents.append(len(self._lengths))

    @property
    def n_documents(self) -> int:
        """Documents so far."""
        return len(self._documents) - 1

    def _cast(self, sequence: np.ndarray | Sequence[int]) -> np.ndarray:
        tokens = np.asarray(sequence)
        if tokens.dtype != self._dtype and len(tokens):
            low, high = tokens.min(), tokens.max()
            limits = np.iinfo(self._dtype)
            if tokens.dtype.kind not in "iu" or low < limits.min or high > limits.max:
                raise config.UserError(
                    f"{self._prefix}.bin takes {self._dtype} tokens, {limits.min} to {limits.max}, "
                    f"not {low} to {high} ({tokens.dtype}): write it with a larger vocabulary"
                )
        return tokens.astype(self._dtype)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        if kind is not None:
            self._partial.unlink()
            return
        index = pathlib.Path(self._prefix + ".idx")
        partial = pathlib.Path(self._prefix + ".idx.partial")
        with partial.open("wb") as file:
            file.write(self._index())
            file.flush()
            os.fsync(file.fileno())
        index.unlink(missing_ok=True)  # an older corpus's must not stand beside the new tokens
        self._partial.replace(self._prefix + ".bin")
        partial.replace(index)  # last: without it there is no corpus

    def _index(self) -> bytes:
        lengths = np.asarray(self._lengths, "<i4")
        sizes = lengths.astype("<i8") * self._dtype.itemsize
        pointers = np.cumsum(sizes) - sizes
        documents = np.asarray(self._documents, "<i8")
        header = _HEADER.pack(MAGIC, VERSION, self._code, len(lengths), len(documents))
        return header + lengths.tobytes() + pointers.tobytes() + documents.tobytes()
