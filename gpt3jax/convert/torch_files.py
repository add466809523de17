"""Megatron's `torch` checkpoint format: one file for each tensor and pipeline rank.

The only module that imports torch, which is an extra. The files are pickles, which can run any
code. So torch's restricted reader reads them: it allows tensors, plain containers and the types
listed here, and refuses the rest. Classes that do nothing replace Megatron's own types.
"""

import argparse
import collections
import dataclasses
import importlib
import io
import pathlib
import re
import signal
import types
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gpt3jax import errors
from gpt3jax.convert import megatron_core, tensor_files

_PAGE = "from_megatron.md#checkpoints"
_TRACKER = "latest_checkpointed_iteration.txt"
_FILE = "model_optim_rng.pt"
_IGNORED = ("megatron.", "transformer_engine.")  # values of their types, such as enums in args
_NUMPY_CORES = ("_core", "core")  # in NumPy 2 and 1
_NAMESPACES = (argparse.Namespace, types.SimpleNamespace)
_POSIX_PATHS = ("PosixPath", "PurePosixPath")
_WINDOWS_PATHS = ("WindowsPath", "PureWindowsPath")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """The tensors of one tensor rank, for one part of the layers."""

    tensor_rank: int
    part: int
    """Number of the part, in the order of the layers: a pipeline stage or a virtual one."""
    tensors: Mapping[str, Callable[[], np.ndarray]]
    """For each name, a function that reads the tensor."""


def read(folder: pathlib.Path) -> tuple[pathlib.Path, megatron_core.Args, list[Shard]]:
    """Return the folder of the newest iteration, its arguments, and its shards.

    A tensor is read only when its function is called.

    Raises:
        UserError: torch is not installed, or files are missing, damaged, of another format, or
            contain types that a checkpoint does not need.
    """
    iteration = _newest(folder)
    ranks = _ranks(iteration)
    loaded = {rank: load(path) for rank, path in ranks.items()}
    args = {
        name: value.item() if isinstance(value, np.generic) else value
        for name, value in vars(loaded[0, 0]["args"]).items()
    }
    n_tensor, n_pipeline = (max(rank[i] for rank in ranks) + 1 for i in (0, 1))
    sizes = {"tensor_model_parallel_size": n_tensor, "pipeline_model_parallel_size": n_pipeline}
    for name, size in sizes.items():
        if len(ranks) != n_tensor * n_pipeline or args.get(name, size) != size:
            raise errors.UserError(
                f"{iteration}: files of {len(ranks)} ranks for {name}={args.get(name)}: some are "
                "missing, or belong to another checkpoint",
                page=_PAGE,
            )
    shards = []
    for (tensor_rank, stage), content in loaded.items():
        models = [content["model"]] if "model" in content else _virtual_stages(content)
        for i, model in enumerate(models):
            part = i * n_pipeline + stage
            tensors = _tensors(ranks[tensor_rank, stage], model)
            shards.append(Shard(tensor_rank=tensor_rank, part=part, tensors=tensors))
    return iteration, args, sorted(shards, key=lambda shard: (shard.part, shard.tensor_rank))


def write(
    folder: pathlib.Path,
    args: megatron_core.Args,
    rank: tuple[int, int],
    tensors: Mapping[str, np.ndarray | None],
) -> None:
    """Write the file of one (tensor, pipeline) rank into the release checkpoint of a folder."""
    torch = _torch()
    name = f"mp_rank_{rank[0]:02d}"
    if args["pipeline_model_parallel_size"] > 1:
        name += f"_{rank[1]:03d}"
    content = {
        "args": argparse.Namespace(**args, params_dtype=torch.float32),
        "checkpoint_version": 3.0,
        "iteration": 0,
        "model": collections.OrderedDict(
            (key, None if array is None else torch.from_numpy(array))
            for key, array in tensors.items()
        ),
    }
    path = folder / "release" / name / _FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)


def finish(folder: pathlib.Path) -> None:
    """Complete a folder after all its files are written, so that Megatron finds the checkpoint."""
    (folder / _TRACKER).write_text("release")


def check_installed() -> None:
    """Check that torch is installed.

    Raises:
        UserError: it is not.
    """
    _torch()


def _torch() -> types.ModuleType:
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise errors.UserError(
            f"Megatron's torch format needs torch ({error}): pip install 'gpt3jax[megatron]'",
            page=_PAGE,
        ) from error


def _newest(folder: pathlib.Path) -> pathlib.Path:
    tracker = folder / _TRACKER
    _check_format(folder)
    if list(folder.glob("mp_rank_*")):
        return folder
    if not tracker.is_file():
        raise errors.UserError(
            f"{folder} has neither {_TRACKER} nor mp_rank_* folders: give the folder of Megatron's "
            "--save, one of its iterations, or safetensors",
            page=_PAGE,
        )
    newest = tracker.read_text().strip()
    name = newest if newest == "release" else f"iter_{newest.zfill(7)}"
    iteration = folder / name
    _check_format(iteration)
    return iteration


def _check_format(iteration: pathlib.Path) -> None:
    if (iteration / ".metadata").is_file() or (iteration / "metadata.json").is_file():
        raise errors.UserError(
            f"{iteration} is not in the torch format: write it once more from Megatron with "
            "--ckpt-convert-format torch --ckpt-convert-save FOLDER",
            page=_PAGE,
        )


def _ranks(iteration: pathlib.Path) -> dict[tuple[int, int], pathlib.Path]:
    ranks = {}
    for path in sorted(iteration.glob("mp_rank_*")):
        match = re.fullmatch(r"mp_rank_(\d+)(?:_(\d+))?", path.name)
        if match is None:
            raise errors.UserError(
                f"{path} is of an expert-parallel checkpoint: ours has no mixture of experts",
                page=_PAGE,
            )
        ranks[int(match[1]), int(match[2] or 0)] = path / _FILE
    if (0, 0) not in ranks:
        raise errors.UserError(
            f"{iteration} has no mp_rank_00: the checkpoint is not complete", page=_PAGE
        )
    return ranks


def load(path: pathlib.Path) -> dict[str, Any]:
    """Return the content of one rank's file, read by the restricted reader.

    Raises:
        UserError: the file is damaged, needs a type that could run code, or has no arguments.
    """
    try:
        content = _read_restricted(path, _allowed())
    except OSError as error:
        raise errors.UserError(f"{path} cannot be read: {error}", page=_PAGE) from error
    except Exception as error:  # a damaged file makes torch raise anything
        name = _refused_type(error)
        if name:
            raise errors.UserError(
                f"{path} is not loaded: it needs {name}, which could run code and which weights do "
                "not need",
                page=_PAGE,
            ) from None
        line = str(error).strip().split("\n")[0]
        raise errors.UserError(f"{path} cannot be read: {line[:200]}", page=_PAGE) from None
    if not isinstance(content, dict) or not isinstance(content.get("args"), _NAMESPACES):
        raise errors.UserError(
            f"{path} has no args: it is not a checkpoint of Megatron's training", page=_PAGE
        )
    return content


def _read_restricted(path: pathlib.Path, allowed: list[Any]) -> Any:
    """Return the content of a file, with stand-ins for values of `_IGNORED` types."""
    torch = _torch()
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except Exception as error:  # torch has no class of its own for a refused type
        name = _refused_type(error)
        if not name.startswith(_IGNORED):
            raise
    return _read_restricted(path, [*allowed, (_stand_in(name), name)])


def _refused_type(error: Exception) -> str:
    match = re.search(r"GLOBAL (\S+)", str(error))
    return match[1] if match else ""


def _allowed() -> list[Any]:
    """Return the types, besides torch's own, that a file may contain: none of them runs code."""
    allowed: list[Any] = [*_NAMESPACES, signal.Signals, io.BytesIO]
    for module in ("pathlib", "pathlib._local"):  # the latter in Python 3.13
        allowed += [(pathlib.PurePosixPath, f"{module}.{name}") for name in _POSIX_PATHS]
        allowed += [(pathlib.PureWindowsPath, f"{module}.{name}") for name in _WINDOWS_PATHS]
    allowed += [np.ndarray, np.dtype, *{type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}]
    multiarray = importlib.import_module("numpy._core.multiarray")
    for name in ("_reconstruct", "scalar"):
        function = getattr(multiarray, name)
        allowed += [(function, f"numpy.{core}.multiarray.{name}") for core in _NUMPY_CORES]
    return allowed


def _virtual_stages(content: dict[str, Any]) -> list[object]:
    """Return the models of a rank's virtual stages: `model0`, `model1`, ..."""
    names = sorted(name for name in content if re.fullmatch(r"model\d+", name))
    return [content[name] for name in sorted(names, key=lambda name: int(name[5:]))]


def _tensors(path: pathlib.Path, model: object) -> dict[str, Callable[[], np.ndarray]]:
    torch = _torch()

    def reader(name: str, tensor: Any) -> Callable[[], np.ndarray]:
        # NumPy has no bfloat16; float32 represents each 16-bit value.
        tensor_files.check_format(path, name, str(tensor.dtype).removeprefix("torch."))
        return lambda: tensor.detach().to(torch.float32).numpy()

    tensors = {}
    for name, value in model.items() if isinstance(model, Mapping) else ():
        if torch.is_tensor(value) and not name.endswith("_extra_state"):
            tensors[name] = reader(name, value)
        elif isinstance(value, Mapping):
            raise errors.UserError(
                f"{path}: its model has {name}, as Megatron's legacy models do; convert it with "
                "Megatron's tools/checkpoint/convert.py to mcore first",
                page=_PAGE,
            )
    return tensors


def _stand_in(name: str) -> type:
    """Return a class that takes any arguments and does nothing."""
    return type(name.rpartition(".")[2], (), {"__new__": lambda cls, *_: object.__new__(cls)})
