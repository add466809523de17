"""Megatron's `torch` checkpoint format: one file for each tensor and pipeline rank.

The only file that imports torch, which is an extra. Files are pickles, which can name any code to
run; they are read by torch's restricted reader, which allows tensors, plain containers and what is
listed here, and refuses the rest.
"""

import argparse
import collections
import dataclasses
import importlib
import io
import pathlib
import re
import signal
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gpt3jax import config

_TRACKER = "latest_checkpointed_iteration.txt"
_FILE = "model_optim_rng.pt"
# Enums among the arguments of a checkpoint; their values are of no use here.
_ENUMS = (
    "megatron.core.enums.ModelType",
    "megatron.core.transformer.enums.AttnBackend",
    "megatron.core.transformer.enums.CudaGraphModule",
    "megatron.core.transformer.enums.CudaGraphScope",
    "megatron.core.transformer.enums.InferenceCudaGraphScope",
)
_NUMPY_CORES = ("_core", "core")  # as NumPy 2 and 1 name it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """What one tensor rank of one part of the layers holds; parts come in the layers' order.

    Attributes:
        tensors: name to a function that reads it, as NumPy.
    """

    tensor_rank: int
    part: int
    tensors: Mapping[str, Callable[[], np.ndarray]]


def read(folder: pathlib.Path) -> tuple[pathlib.Path, dict[str, Any], list[Shard]]:
    """Return the folder of the newest iteration, its arguments, and its shards.

    Tensors stay in their files until they are asked for.

    Raises:
        UserError: torch is not installed; files are missing, damaged, of another format, or hold
            what is no part of a checkpoint.
    """
    iteration = _newest(folder)
    ranks = _ranks(iteration)
    loaded = {rank: _load(path) for rank, path in ranks.items()}
    args = vars(loaded[0, 0]["args"])
    n_tensor, n_pipeline = (max(rank[i] for rank in ranks) + 1 for i in (0, 1))
    sizes = {"tensor_model_parallel_size": n_tensor, "pipeline_model_parallel_size": n_pipeline}
    for name, found in sizes.items():
        if len(ranks) != n_tensor * n_pipeline or args.get(name, found) != found:
            raise config.UserError(
                f"{iteration}: files of {len(ranks)} ranks for {name}={args.get(name)}: some are "
                "missing, or are of another checkpoint"
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
    args: dict[str, Any],
    rank: tuple[int, int],
    tensors: Mapping[str, np.ndarray | None],
) -> None:
    """Write the file of one (tensor, pipeline) rank of the release checkpoint of a folder."""
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
    """Complete a folder whose files are all written: Megatron finds the checkpoint from now on."""
    (folder / _TRACKER).write_text("release")


def check_installed() -> None:
    """Check that torch is there.

    Raises:
        UserError: it is not.
    """
    _torch()


def _torch() -> Any:
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise config.UserError(
            f"Megatron's torch format needs torch ({error}): pip install 'gpt3jax[megatron]'"
        ) from error


def _newest(folder: pathlib.Path) -> pathlib.Path:
    tracker = folder / _TRACKER
    if list(folder.glob("mp_rank_*")):
        return folder
    if not tracker.is_file():
        raise config.UserError(
            f"{folder} has neither {_TRACKER} nor mp_rank_* folders: give the folder of Megatron's "
            "--save, one of its iterations, or safetensors"
        )
    newest = tracker.read_text().strip()
    name = newest if newest == "release" else f"iter_{newest.zfill(7)}"
    iteration = folder / name
    if (iteration / ".metadata").is_file() or (iteration / "metadata.json").is_file():
        raise config.UserError(
            f"{iteration} is not in the torch format: write it once more from Megatron with "
            "--ckpt-convert-format torch --ckpt-convert-save FOLDER"
        )
    return iteration


def _ranks(iteration: pathlib.Path) -> dict[tuple[int, int], pathlib.Path]:
    found = {}
    for path in sorted(iteration.glob("mp_rank_*")):
        match = re.fullmatch(r"mp_rank_(\d+)(?:_(\d+))?", path.name)
        if match is None:
            raise config.UserError(
                f"{path} is of an expert-parallel checkpoint: ours has no mixture of experts"
            )
        found[int(match[1]), int(match[2] or 0)] = path / _FILE
    if (0, 0) not in found:
        raise config.UserError(f"{iteration} has no mp_rank_00: it is no whole checkpoint")
    return found


def _load(path: pathlib.Path) -> dict[str, Any]:
    torch = _torch()
    allowed: list[Any] = [argparse.Namespace, signal.Signals, io.BytesIO]
    allowed += [np.ndarray, np.dtype, np.dtypes.UInt32DType]  # of a random state
    reconstruct = importlib.import_module("numpy._core.multiarray")._reconstruct
    allowed += [(reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in _NUMPY_CORES]
    allowed += [(_stand_in(name), name) for name in _ENUMS]
    try:
        with torch.serialization.safe_globals(allowed):
            content = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except OSError as error:
        raise config.UserError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # a damaged file makes torch raise anything
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named:
            raise config.UserError(
                f"{path} is not loaded: it wants {named[1]}, which could run code, and which no "
                "weights need"
            ) from None
        lines = str(error).strip().splitlines() or [""]
        raise config.UserError(f"{path} cannot be read: {lines[0][:200]}") from None
    if not isinstance(content, dict) or not isinstance(content.get("args"), argparse.Namespace):
        raise config.UserError(f"{path} has no args: it is no checkpoint of Megatron's training")
    return content


def _virtual_stages(content: dict[str, Any]) -> list[Any]:
    """Return the models of a rank's virtual stages, `model0`, `model1`, ..."""
    names = sorted(name for name in content if re.fullmatch(r"model\d+", name))
    return [content[name] for name in sorted(names, key=lambda name: int(name[5:]))]


def _tensors(path: pathlib.Path, model: Any) -> dict[str, Callable[[], np.ndarray]]:
    torch = _torch()

    def reader(tensor: Any) -> Callable[[], np.ndarray]:
        # NumPy has no bfloat16; each 16-bit value is a float32 value.
        return lambda: tensor.detach().to(torch.float32).numpy()

    found = {}
    for name, value in model.items() if isinstance(model, Mapping) else ():
        if torch.is_tensor(value) and not name.endswith("_extra_state"):
            found[name] = reader(value)
        elif isinstance(value, Mapping):
            raise config.UserError(
                f"{path}: its model has {name}: it is of Megatron's legacy model; convert it with "
                "Megatron's tools/checkpoint/convert.py to mcore first"
            )
    return found


def _stand_in(name: str) -> type:
    """Return a class that takes any arguments and does nothing, for an enum of Megatron's."""
    return type(name.rpartition(".")[2], (), {"__new__": lambda cls, *_: object.__new__(cls)})
