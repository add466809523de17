"""Documents from files of text: JSON lines, plain text, Parquet; compressed or not.

Files are read in order, in chunks of about a MiB. JSON is parsed later, by the thread that encodes
the chunk, so that one reader can feed many threads.
"""

import codecs
import contextlib
import dataclasses
import glob
import gzip
import io
import json
import pathlib
import sys
import types
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any, TypeAlias

from gpt3jax import errors

_PAGE = "data.md#from-text"
CHUNK_BYTES = 1 << 20
FORMATS = (".jsonl", ".json", ".txt", ".parquet")
COMPRESSIONS = ("", ".gz", ".zst")
_BOM = codecs.BOM_UTF8  # it marks the encoding, and is not part of the text
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_WINDOW_LOG = 31  # the largest window that a zstd file can ask for (--long=31): 2 GiB
_ROWS = 16  # of a Parquet file, read at a time
_ONE_A_LINE = "the file must have one object a line"
KNOWN = ", ".join(FORMATS) + ", the first three also with .gz or .zst"

_Column: TypeAlias = Any  # a column of pyarrow, which has no types


class BadError(ValueError):
    """A record that is not a document; the message says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunk:
    """Consecutive records of a file, or a piece of a text file."""

    path: pathlib.Path
    records: Sequence[object]
    """JSON lines (bytes), texts (str, or a list of values), or faults (BadError)."""
    first: int
    """Number of the first record: a line or a row, from 1."""
    position: int
    """Bytes of the file, as stored, that are read up to the end of the chunk."""
    continues: bool = False
    """The only record continues the text of the chunk before."""
    ends: bool = True
    """The last record is complete."""


def find(inputs: Sequence[str], left_out: list[pathlib.Path]) -> list[pathlib.Path]:
    """Return the files that the inputs name, in order: files, globs, and folders with all below.

    In a folder, hidden files and folders (`.ipynb_checkpoints`) are left out, and so are files of
    an unknown kind, which are added to `left_out`.

    Raises:
        UserError: an input leads to no file, or to a file of an unknown kind.
    """
    files: list[pathlib.Path] = []
    for word in inputs:
        path = pathlib.Path(word)
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and not is_hidden(p, path))
            matches = [p for p in inside if _format(p)]
            left_out += [p for p in inside if not _format(p)]
        else:
            words = [word] if path.is_file() else sorted(glob.glob(word, recursive=True))
            matches = [path for path in map(pathlib.Path, words) if path.is_file()]
        if not matches:
            raise errors.UserError(f"--input {word}: no file there ({KNOWN})", page=_PAGE)
        for unknown in (p for p in matches if not _format(p)):
            raise errors.UserError(
                f"--input {unknown}: unknown kind of file; known are {KNOWN}", page=_PAGE
            )
        files += matches
    return files


def is_hidden(path: pathlib.Path, folder: pathlib.Path) -> bool:
    """Return whether a file in a folder is hidden, or lies in a hidden folder there."""
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def decode(content: bytes) -> str:
    """Return the text of a file, without the mark of UTF-8 (BOM) that may stand before it.

    Raises:
        UnicodeDecodeError: the file is not UTF-8.
    """
    return content.decode("utf-8-sig")


def text_lines(content: bytes) -> list[str]:
    """Return the lines of a file, which end in a line feed, or in CR LF, and in nothing else.

    Raises:
        UnicodeDecodeError: as `decode`.
    """
    return [line.removesuffix("\r") for line in decode(content).split("\n")]


def _format(path: pathlib.Path) -> str:
    """Return the format by the name of a file, "" if unknown."""
    name = path.name.lower()
    for compression in COMPRESSIONS:
        for known in FORMATS:
            if name.endswith(known + compression) and not (compression and known == ".parquet"):
                return known
    return ""


def read(
    path: pathlib.Path, key: str, max_bytes: int, last_cut: Callable[[str], int] | None
) -> Iterator[Chunk]:
    """Yield the chunks of a file.

    Args:
        path: a file that `find` returned.
        key: column of a Parquet file.
        max_bytes: size of the largest document; a larger one becomes a record that is cut there.
        last_cut: returns where a text may be cut in two that are encoded separately, so that a
            `.txt` file of any size can be read; None: such a file is read whole.

    Raises:
        UserError: the file cannot be read; the message names it.
    """
    kind = _format(path)
    try:
        if kind == ".parquet":
            yield from _rows(path, key)
            return
        if kind == ".txt":
            with path.open("rb") as raw, _decompressed(raw, path) as file:
                problem = _check_utf8(file)
            if problem:
                size = path.stat().st_size
                yield Chunk(path=path, records=[problem], first=1, position=size)
                return
        with path.open("rb") as raw, _decompressed(raw, path) as file:
            if kind == ".txt":
                yield from _texts(path, file, raw, max_bytes, last_cut)
            else:
                yield from _lines(path, file, raw, max_bytes)
    except (OSError, EOFError, zlib.error) as error:  # cut short, or not of the kind it is named
        raise errors.UserError(f"{path}: cannot be read: {error}", page=_PAGE) from error


def texts_of(record: object, key: str, max_bytes: int) -> list[str]:
    """Return the sequences of a record: its text, or the texts of a list.

    Raises:
        BadError: the record is not a document.
    """
    if isinstance(record, BadError):
        raise record
    value = _parse(record, key, max_bytes) if isinstance(record, bytes) else record
    values = value if isinstance(value, list) else [value]
    texts = [text for text in values if isinstance(text, str)]
    if len(texts) < len(values):
        raise BadError(f"{key!r} is not a string")
    if sum(map(len, texts)) > max_bytes:
        raise _too_large(max_bytes)
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise BadError(f"{key!r} has half a surrogate pair") from None
    return texts


def _too_large(max_bytes: int) -> BadError:
    return BadError(f"larger than --max-document-mb={max_bytes >> 20}")


def _parse(line: bytes, key: str, max_bytes: int) -> object:
    if not line.strip():
        raise BadError("a blank line")
    if line.lstrip().startswith(b"["):
        raise BadError(f"a JSON array; {_ONE_A_LINE}, which jq -c '.[]' FILE writes")
    if len(line) > max_bytes:
        raise _too_large(max_bytes)
    if line.strip() == b"{":
        raise BadError(f"not JSON: an object of several lines; {_ONE_A_LINE}, as jq -c . FILE does")
    try:
        entry = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise BadError(f"not UTF-8: {error.reason} at byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise BadError(f"not JSON: {error}") from None
    if not isinstance(entry, dict) or key not in entry:
        keys = f"; its keys are {', '.join(entry) or 'none'}" if isinstance(entry, dict) else ""
        raise BadError(f"no key {key!r}{keys}")
    return entry[key]


@contextlib.contextmanager
def _decompressed(raw: IO[bytes], path: pathlib.Path) -> Iterator[IO[bytes]]:
    compression = path.suffix.lower()
    if compression == ".gz":
        with gzip.open(raw) as file:
            yield io.BufferedReader(file, CHUNK_BYTES)
    elif compression == ".zst":
        zstd = _zstd(path)
        try:
            window = {zstd.DecompressionParameter.window_log_max: _WINDOW_LOG}
            with zstd.ZstdFile(raw, options=window) as file:
                yield io.BufferedReader(file, CHUNK_BYTES)
        except zstd.ZstdError as error:
            raise OSError(str(error)) from error
    else:
        yield raw


def _zstd(path: pathlib.Path) -> types.ModuleType:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        try:
            from backports import zstd
        except ImportError:
            raise _missing("backports.zstd", path) from None
    return zstd


def _missing(package: str, path: pathlib.Path) -> errors.UserError:
    return errors.UserError(f"{path} needs {package}: pip install 'gpt3jax[data]'", page=_PAGE)


def _lines(path: pathlib.Path, file: IO[bytes], raw: IO[bytes], max_bytes: int) -> Iterator[Chunk]:
    number = 1
    while True:
        lines: list[bytes] = []
        size = 0
        while size < CHUNK_BYTES and (line := file.readline(max_bytes + 1)):
            lines.append(line.removeprefix(_BOM) if number == 1 and not lines else line)
            size += len(line)
            if len(line) > max_bytes:
                while line and not line.endswith(b"\n"):
                    line = file.readline(max_bytes)
        if not lines:
            return
        yield Chunk(path=path, records=lines, first=number, position=raw.tell())
        number += len(lines)


def _texts(
    path: pathlib.Path,
    file: IO[bytes],
    raw: IO[bytes],
    max_bytes: int,
    last_cut: Callable[[str], int] | None,
) -> Iterator[Chunk]:
    """Yield pieces of a text file that end where it may be cut; or the whole text."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    text, continues = "", False
    while block := file.read(CHUNK_BYTES):
        text += decoder.decode(block)
        if cut := last_cut(text) if last_cut else 0:
            yield Chunk(
                path=path, records=[text[:cut]], first=1, position=raw.tell(),
                continues=continues, ends=False,
            )  # fmt: skip
            text, continues = text[cut:], True
        if len(text) > max_bytes:
            problem = f"{max_bytes >> 20} MB (--max-document-mb) without a place to cut it"
            if continues:
                raise errors.UserError(f"{path}: {problem}", page=_PAGE)
            yield Chunk(path=path, records=[BadError(problem)], first=1, position=raw.tell())
            return
    yield Chunk(path=path, records=[text], first=1, position=raw.tell(), continues=continues)


def _check_utf8(file: IO[bytes]) -> BadError | None:
    """Read a whole file: it can no longer be skipped once part of it is written."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        while block := file.read(CHUNK_BYTES):
            decoder.decode(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        is_utf16 = error.object.startswith(_UTF16)
        return BadError(f"not UTF-8: {'UTF-16' if is_utf16 else error.reason}")
    return None


def _rows(path: pathlib.Path, key: str) -> Iterator[Chunk]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise _missing("pyarrow", path) from None
    try:
        # Without pre-buffering and threads it is read page by page, not row group by row group.
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=CHUNK_BYTES) as file:
            if key not in file.schema_arrow.names:
                names = ", ".join(file.schema_arrow.names)
                raise errors.UserError(
                    f"{path}: no column {key!r} (--json-key); it has {names}", page=_PAGE
                )
            batches = file.iter_batches(batch_size=_ROWS, columns=[key], use_threads=False)
            columns = (_without_checks(batch.column(0)) for batch in batches)
            values = (value for column in columns for value in column.to_pylist())
            n_rows, size = file.metadata.num_rows, path.stat().st_size
            for first, rows in _grouped(values):
                position = size * (first - 1 + len(rows)) // n_rows
                yield Chunk(path=path, records=rows, first=first, position=position)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise OSError(str(error)) from error


def _without_checks(column: _Column) -> _Column:
    """Return a column of texts as bytes: nothing has checked that the texts are UTF-8."""
    import pyarrow

    types = pyarrow.types
    kind = column.type.value_type if types.is_dictionary(column.type) else column.type
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return column.cast(pyarrow.large_binary())
    return column


def _grouped(values: Iterator[object]) -> Iterator[tuple[int, list[object]]]:
    """Yield (number of the first, records): values in groups of about CHUNK_BYTES."""
    first, size = 1, 0
    rows: list[object] = []
    for value in values:
        rows.append(_as_text(value))
        parts = value if isinstance(value, list) else [value]
        size += sum(len(part) for part in parts if isinstance(part, str | bytes))
        if size >= CHUNK_BYTES:
            yield first, rows
            first, rows, size = first + len(rows), [], 0
    if rows:
        yield first, rows


def _as_text(value: object) -> object:
    """Return a value of a column, with bytes (also in a list) as text or as a `BadError`."""
    if isinstance(value, list):
        parts = [_as_text(part) for part in value]
        return next((part for part in parts if isinstance(part, BadError)), parts)
    try:
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError as error:
        return BadError(f"not UTF-8: {error.reason} at byte {error.start}")
