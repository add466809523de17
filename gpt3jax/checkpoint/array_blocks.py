"""Arrays of a checkpoint, block by block: written and read without ever being whole in memory.

Orbax writes an array from memory. `Blocks` is an array that it asks for block by block instead, and
`read` reads one back in such blocks. Importing this module registers `Blocks` with Orbax. It is the
only one that imports TensorStore, in whose format (Zarr in OCDBT) Orbax keeps arrays.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterator

import numpy as np
import orbax.checkpoint as ocp
import tensorstore

BLOCK_BYTES = 64 << 20  # what is read or written at a time, unless one row has more
_CHUNK_BYTES = 16 << 20  # what is compressed at a time, of one device's shard


@dataclasses.dataclass(frozen=True, eq=False)
class Blocks:
    """A float32 array whose rows (of its first dimension) are made when they are asked for."""

    shape: tuple[int, ...]
    rows: Callable[[int, int], np.ndarray]  # (first, stop) -> [stop - first, ...]

    @property
    def dtype(self) -> "np.dtype[np.float32]":
        """Always float32."""
        return np.dtype(np.float32)

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array."""
        return self.size * self.dtype.itemsize

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, rows) from the first block to the last."""
        return self.in_multiples_of(1)

    def in_multiples_of(self, n_rows: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, rows) in blocks that begin at a multiple of n_rows."""
        for first, stop in _spans(self.shape, n_rows):
            yield first, self.rows(first, stop)


class _Handler(ocp.type_handlers.NumpyHandler):
    """Writes `Blocks`: one block of one array at a time, because nothing in it awaits."""

    def typestr(self) -> str:
        return "gpt3jax.Blocks"

    async def _open_and_write(
        self, value: Blocks, tspec: dict[str, object], ts_context: tensorstore.Context
    ) -> None:
        spec = tensorstore.Spec(tspec)
        array = tensorstore.open(spec, create=True, open=True, context=ts_context).result()
        [n_rows, *_] = array.chunk_layout.write_chunk.shape or (1,)
        assert n_rows is not None
        for first, rows in value.in_multiples_of(n_rows):
            array[first : first + len(rows)].write(rows).result()


ocp.type_handlers.register_type_handler(Blocks, _Handler(deepcopy_host_arrays=False))


def save_args(n_stacked: int) -> ocp.SaveArgs:
    """Return how Orbax cuts an array whose first `n_stacked` dimensions stack layers.

    Each chunk has one layer, so that layers can be read one by one, and no chunk is large.
    """
    return ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=tuple(range(n_stacked)))


def read(folder: pathlib.Path, name: str, n_stacked: int) -> Blocks:
    """Return an array of a folder that Orbax wrote; all stacked layers come as `[L, ...]`.

    Raises:
        ValueError: it is not there or, later, when rows are read, it is damaged.
    """
    array = _open(folder, name)
    if not array.shape:  # a number becomes one row
        return Blocks((1,), lambda first, stop: array.read().result()[None])
    per_row = math.prod(array.shape[1:n_stacked])

    def rows(first: int, stop: int) -> np.ndarray:
        if per_row == 1:
            values: np.ndarray = array[first:stop].read().result()
            return values.reshape(stop - first, *array.shape[max(n_stacked, 1) :])
        layers = (array[divmod(i, per_row)].read().result() for i in range(first, stop))
        return np.stack(list(layers))

    shape = (array.shape[0] * per_row, *array.shape[max(n_stacked, 1) :])
    return Blocks(shape, rows)


def describe(folder: pathlib.Path, name: str) -> tuple[tuple[int, ...], str, int]:
    """Return shape, type and bytes of an array of a folder that Orbax wrote.

    Raises:
        ValueError: it is not there.
    """
    array = _open(folder, name)
    dtype = array.dtype.numpy_dtype
    return tuple(array.shape), dtype.name, array.size * dtype.itemsize


def _open(folder: pathlib.Path, name: str) -> tensorstore.TensorStore:
    path = name.replace("/", ".") + "/"
    kvstore = {"driver": "ocdbt", "base": f"file://{folder.absolute()}/", "path": path}
    return tensorstore.open({"driver": "zarr", "kvstore": kvstore}, read=True).result()


def _spans(shape: tuple[int, ...], n_rows: int) -> Iterator[tuple[int, int]]:
    row_bytes = 4 * math.prod(shape[1:])
    step = n_rows * max(1, BLOCK_BYTES // (n_rows * row_bytes))
    for first in range(0, shape[0], step):
        yield first, min(first + step, shape[0])
