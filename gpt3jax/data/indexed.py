"""Megatron's corpus format: tokens in PREFIX.bin, where each sequence lies in PREFIX.idx.

Little-endian, without padding: magic (9 bytes), version (u64, 1), type code (u8), number of
sequences (u64), number of document entries (u64), lengths (i32 each), byte offsets (i64 each),
document entries (i64 each: 0, then the number of sequences up to each document's end).
Source: Megatron-LM `megatron/core/datasets/indexed_dataset.py` at d98e8a64dd.
"""

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


def token_dtype(vocab_size: int) -> type[np.generic]:
    """Return the type that Megatron writes tokens in: uint16 below 65,500 tokens, else int32."""
    return np.uint16 if vocab_size < 65_500 else np.int32


class IndexedCorpus:
    """A corpus, memory-mapped: nothing is copied until it is read.

    `tokens` is the whole .bin as one array; sequence i is `tokens[starts[i]:][:lengths[i]]`.
    """

    def __init__(self, prefix: str):
        """Map both files.

        Raises:
            UserError: a file is missing, cut, or not what it should be; it names file and fault.
        """
        self.prefix = prefix
        index_path, tokens_path = _paths(prefix)
        index = _map(index_path)
        dtype, n_sequences, n_documents = _read_header(index, index_path)
        arrays, at = [], _HEADER.size
        for count, kind in ((n_sequences, "<i4"), (n_sequences, "<i8"), (n_documents, "<i8")):
            arrays.append(np.frombuffer(index, kind, count, at))
            at += arrays[-1].nbytes
        self.lengths, self._offsets, self.document_indices = arrays
        data = _map(tokens_path)
        self.tokens = np.frombuffer(data, dtype, len(data) // dtype.itemsize)
        self._check(index_path, tokens_path, len(data))
        self.starts = self._offsets // dtype.itemsize

    def __len__(self) -> int:
        """Return the number of sequences; each is a document unless sentences were split."""
        return len(self.lengths)

    @property
    def n_tokens(self) -> int:
        """Tokens of all sequences."""
        return int(self.lengths.sum(dtype=np.int64))

    def read(self, sequence: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Return tokens of a sequence, from an offset on, as a view of the map."""
        start = int(self.starts[sequence]) + offset
        stop = int(self.starts[sequence]) + int(self.lengths[sequence])
        return self.tokens[start : stop if length is None else min(stop, start + length)]

    def _check(self, index_path: pathlib.Path, tokens_path: pathlib.Path, n_bytes: int) -> None:
        size = self.tokens.itemsize
        if len(self) and (self.lengths.min() < 0 or self._offsets.min() < 0):
            raise config.UserError(f"{index_path}: a sequence has a negative length or offset")
        if (self._offsets % size).any():
            raise config.UserError(f"{index_path}: an offset is not a multiple of {size} bytes")
        needed = int((self._offsets + self.lengths.astype(np.int64) * size).max(initial=0))
        if needed > n_bytes:
            raise config.UserError(
                f"{tokens_path} has {n_bytes} bytes and its index needs {needed}: it was cut, "
                "or the two files are not of one corpus"
            )
        ends = self.document_indices
        if len(ends) == 0 or ends[0] != 0 or ends[-1] != len(self) or (np.diff(ends) < 0).any():
            raise config.UserError(f"{index_path}: the documents do not cover its sequences")


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
    if index[:9] != MAGIC:
        raise config.UserError(f"{path} is not a Megatron index: it begins with {index[:9]!r}")
    if len(index) < _HEADER.size:
        raise config.UserError(f"{path} was cut: {len(index)} bytes are less than its header")
    _, version, code, n_sequences, n_documents = _HEADER.unpack(index[: _HEADER.size])
    if version != VERSION:
        raise config.UserError(f"{path} has version {version}; version {VERSION} is known")
    if code not in DTYPES:
        raise config.UserError(f"{path} has type code {code}; known are {sorted(DTYPES)}")
    needed = _HEADER.size + 12 * n_sequences + 8 * n_documents
    if len(index) not in (needed, needed + n_sequences):  # the latter with modes, multimodal
        raise config.UserError(
            f"{path} has {len(index)} bytes where {n_sequences} sequences and {n_documents} "
            f"document entries make {needed}: it was cut or damaged"
        )
    return np.dtype(DTYPES[code]).newbyteorder("<"), n_sequences, n_documents


class Writer:
    """Writes a corpus; a context manager. Nothing has its final name until all is written."""

    def __init__(self, prefix: str, dtype: type[np.generic]):
        """Open `PREFIX.bin.partial`; the folder is made if need be."""
        self._prefix, self._dtype = prefix, np.dtype(dtype).newbyteorder("<")
        pathlib.Path(prefix).parent.mkdir(parents=True, exist_ok=True)
        self._partial = pathlib.Path(prefix + ".bin.partial")
        self._file = self._partial.open("wb")
        self._lengths: list[int] = []
        self._documents = [0]

    def add_document(self, sequences: Sequence[np.ndarray | Sequence[int]]) -> None:
        """Append a document of one or more sequences; without any it keeps its entry."""
        for sequence in sequences:
            self._file.write(np.asarray(sequence, self._dtype).tobytes())
            self._lengths.append(len(sequence))
        self._documents.append(len(self._lengths))

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        if kind is not None:
            self._partial.unlink()
            return
        index = pathlib.Path(self._prefix + ".idx.partial")
        index.write_bytes(self._index())
        self._partial.replace(self._prefix + ".bin")
        index.replace(self._prefix + ".idx")  # last: without it there is no corpus

    def _index(self) -> bytes:
        lengths = np.asarray(self._lengths, "<i4")
        ends = np.cumsum(lengths, dtype="<i8") * self._dtype.itemsize
        offsets = np.concatenate([np.zeros(1, "<i8"), ends])[: len(lengths)]
        code = {np.dtype(d): c for c, d in DTYPES.items()}[self._dtype.newbyteorder("=")]
        header = _HEADER.pack(MAGIC, VERSION, code, len(lengths), len(self._documents))
        documents = np.asarray(self._documents, "<i8")
        return header + lengths.tobytes() + offsets.tobytes() + documents.tobytes()
