"""Reads and writes safetensors files; the only module that imports safetensors."""

import contextlib
import json
import pathlib
from collections.abc import Collection, Iterator
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from gpt3jax import errors
from gpt3jax.config import user_paths

_PAGE = "converting.md"
FORMATS = ("float32", "bfloat16", "float16")  # of weights: fp32 represents each value exactly
FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class Reader:
    """Reads tensors by name from one or more files.

    A file is opened anew for each tensor, because an open file keeps what was read in memory.
    """

    def __init__(self, files: list[pathlib.Path]):
        """Read the names and shapes of the tensors.

        Raises:
            UserError: a file is missing or damaged.
        """
        self._files: dict[str, pathlib.Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for path in files:
            with _opened(path) as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    self._files[name] = path
                    self._shapes[name] = tuple(file.get_slice(name).get_shape())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name."""
        return self._shapes

    def file(self, name: str) -> pathlib.Path:
        """Return the file of a tensor."""
        return self._files[name]

    def rows(self, name: str, first: int = 0, stop: int | None = None) -> np.ndarray:
        """Return a tensor, or some rows of its first dimension, in its own format.

        Raises:
            UserError: the file is missing or damaged, or the format is not one of `FORMATS`.
        """
        with _opened(self._files[name]) as file:
            whole = first == 0 and stop is None
            tensor: np.ndarray = (
                file.get_tensor(name) if whole else file.get_slice(name)[first:stop]
            )
        check_format(self._files[name], name, str(tensor.dtype))
        return tensor


class Writer:
    """Writes tensors to files of bounded size, with an index if there is more than one file."""

    def __init__(self, folder: pathlib.Path, max_bytes: int = 1 << 30):
        """Write into an existing folder; begin a new file before one exceeds max_bytes."""
        self._folder, self._max_bytes = folder, max_bytes
        self._shard: dict[str, np.ndarray] = {}
        self._parts: list[list[str]] = []
        self._n_bytes = 0

    def add(self, name: str, array: np.ndarray) -> None:
        """Add a tensor; it is written at the latest by `close`."""
        if self._shard and sum(a.nbytes for a in self._shard.values()) + array.nbytes > (
            self._max_bytes
        ):
            self._flush()
        self._shard[name] = np.ascontiguousarray(array)
        self._n_bytes += array.nbytes

    def close(self) -> None:
        """Write the remaining tensors and give the files their final names."""
        self._flush()
        n = len(self._parts)
        index: dict[str, str] = {}
        for i, names in enumerate(self._parts):
            file = f"model-{i + 1:05d}-of-{n:05d}.safetensors" if n > 1 else FILE
            self._partial(i).replace(self._folder / file)
            index |= dict.fromkeys(names, file)
        if n > 1:
            content = {"metadata": {"total_size": self._n_bytes}, "weight_map": index}
            (self._folder / _INDEX).write_text(json.dumps(content, indent=2) + "\n")

    def _flush(self) -> None:
        path = self._partial(len(self._parts))
        safetensors.numpy.save_file(self._shard, path, metadata={"format": "pt"})
        path.chmod(0o644)  # the library makes it readable for its owner alone
        self._parts.append(list(self._shard))
        self._shard = {}

    def _partial(self, i: int) -> pathlib.Path:
        return self._folder / f"model.{i}.partial"


def files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Return the safetensors files of a folder; an empty list if it has neither file nor index.

    Raises:
        UserError: the index cannot be read.
    """
    if (folder / FILE).is_file():
        return [folder / FILE]
    if (folder / _INDEX).is_file():
        names = user_paths.read_json(folder / _INDEX, _PAGE).get("weight_map", {}).values()
        return [folder / name for name in sorted(set(names))]
    return []


def check_empty(output: pathlib.Path) -> None:
    """Check that a command's --output is new or empty.

    Raises:
        UserError: it is not.
    """
    if output.is_dir() and any(output.iterdir()):
        raise errors.UserError(f"--output={output} is not empty: give a new folder", page=_PAGE)


def check_names(
    where: pathlib.Path,
    names: Collection[str],
    *,
    needed: AbstractSet[str],
    optional: AbstractSet[str],
    network: str,
) -> None:
    """Check that files hold the tensors of a network, and no unknown ones.

    Raises:
        UserError: it names a tensor that is missing or unknown.
    """
    missing, unknown = needed - set(names), set(names) - needed - optional
    for problem, tensors in (("has no", missing), ("has an unknown", unknown)):
        if tensors:
            raise errors.UserError(
                f"{where} {problem} tensor {sorted(tensors)[0]} ({len(tensors)} such): it is not "
                f"the {network}",
                page=_PAGE,
            )


def check_format(path: pathlib.Path, name: str, dtype: str) -> None:
    """Check that fp32 can represent each value of a tensor.

    Raises:
        UserError: its format is not one of `FORMATS`.
    """
    if dtype not in FORMATS:
        raise errors.UserError(
            f"{path}: {name} is {dtype}, which fp32 cannot represent exactly: write it as one of "
            f"{', '.join(FORMATS)}",
            page=_PAGE,
        )


def check_finite(where: str, name: str, array: np.ndarray) -> np.ndarray:
    """Return a tensor after checking that all its values are finite.

    Raises:
        UserError: some are NaN or infinite; it names the tensor.
    """
    finite = np.isfinite(array)
    if not finite.all():
        raise errors.UserError(
            f"{where}: {name} has {array.size - finite.sum()} of {array.size} values that are NaN "
            "or infinite, so the model is useless: use an earlier checkpoint",
            page=_PAGE,
        )
    return array


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[Any]:
    try:
        with safetensors.safe_open(path, "np") as file:
            yield file
    except (OSError, safetensors.SafetensorError) as error:
        raise errors.UserError(f"{path} cannot be read: {error}", page=_PAGE) from error
