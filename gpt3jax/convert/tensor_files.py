"""safetensors files, one or several with an index; the only file that imports safetensors."""

import contextlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from gpt3jax import errors
from gpt3jax.config import user_paths

FORMATS = ("float32", "bfloat16", "float16")  # of weights: fp32 holds each value of them
FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class Reader:
    """The tensors of some files by name.

    A file is opened for each tensor anew, since what is read of an open one stays in memory.
    """

    def __init__(self, files: list[pathlib.Path]):
        """Read which tensors the files hold.

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
            UserError: the file is missing or damaged by now, or the format is none of `FORMATS`.
        """
        with _opened(self._files[name]) as file:
            whole = first == 0 and stop is None
            found: np.ndarray = file.get_tensor(name) if whole else file.get_slice(name)[first:stop]
        check_format(self._files[name], name, str(found.dtype))
        return found


class Writer:
    """Writes tensors to files of bounded size, with an index if they are several."""

    def __init__(self, folder: pathlib.Path, max_bytes: int = 1 << 30):
        """Write into a folder that exists; a file is begun anew beyond max_bytes."""
        self._folder, self._max_bytes = folder, max_bytes
        self._shard: dict[str, np.ndarray] = {}
        self._parts: list[list[str]] = []
        self._n_bytes = 0

    def add(self, name: str, array: np.ndarray) -> None:
        """Write a tensor, some time before `close`."""
        if self._shard and sum(a.nbytes for a in self._shard.values()) + array.nbytes > (
            self._max_bytes
        ):
            self._flush()
        self._shard[name] = np.ascontiguousarray(array)
        self._n_bytes += array.nbytes

    def close(self) -> None:
        """Write the rest, and give the files their names."""
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
        path.chmod(0o644)  # the library writes for its own user alone
        self._parts.append(list(self._shard))
        self._shard = {}

    def _partial(self, i: int) -> pathlib.Path:
        return self._folder / f"model.{i}.partial"


def files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Return the safetensors files of a folder; none if it has neither one nor an index.

    Raises:
        UserError: the index cannot be read.
    """
    if (folder / FILE).is_file():
        return [folder / FILE]
    if (folder / _INDEX).is_file():
        names = user_paths.read_json(folder / _INDEX).get("weight_map", {}).values()
        return [folder / name for name in sorted(set(names))]
    return []


def check_format(path: pathlib.Path, name: str, found: str) -> None:
    """Check that fp32 can hold each value of a tensor.

    Raises:
        UserError: its format is none of `FORMATS`.
    """
    if found not in FORMATS:
        raise errors.UserError(
            f"{path}: {name} is {found}, which fp32 does not hold as it is: write it as one of "
            f"{', '.join(FORMATS)}"
        )


def check_finite(where: str, name: str, array: np.ndarray) -> np.ndarray:
    """Return a tensor, all of whose values are numbers.

    Raises:
        UserError: some are NaN or infinite; it names the tensor.
    """
    finite = np.isfinite(array)
    if not finite.all():
        raise errors.UserError(
            f"{where}: {name} has {array.size - finite.sum()} of {array.size} values that are NaN "
            "or infinite, so that the model computes nothing: take a checkpoint from before that"
        )
    return array


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[Any]:
    try:
        with safetensors.safe_open(path, "np") as file:
            yield file
    except (OSError, safetensors.SafetensorError) as error:
        raise errors.UserError(f"{path} cannot be read: {error}") from error
