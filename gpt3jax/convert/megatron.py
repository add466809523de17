"""Megatron-LM GPT checkpoints, to and from ours: the `torch` format, or safetensors."""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import tyro

from gpt3jax import errors
from gpt3jax.config import ranges, schema, user_paths, validation
from gpt3jax.convert import megatron_core, tensor_files, torch_files

_PAGE = "from_megatron.md#checkpoints"

if TYPE_CHECKING:
    from gpt3jax.checkpoint import parameters

_ARGS = "args.json"  # beside safetensors: the `args` of a torch file
_Shards = dict[str, list[Callable[[], np.ndarray]]]  # for each tensor, its shards by rank


@dataclasses.dataclass(frozen=True, kw_only=True)
class FromMegatron:
    """Convert a Megatron-LM GPT checkpoint of any tensor and pipeline size to a checkpoint."""

    folder: tyro.conf.Positional[user_paths.Path]
    """Megatron's --save folder (torch format); or safetensors, a file or folder, by its names."""
    output: user_paths.Path
    """Folder for the checkpoint."""
    vocab_size: Annotated[int, ranges.Range(0, 2**30)] = 0
    """Size of the vocabulary before padding, if the checkpoint has only the padded size (tokens; 0:
    the checkpoint's)."""
    n_heads: Annotated[int, ranges.Range(0, 2**20)] = 0
    """Attention heads in each layer, for safetensors without an args.json beside them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToMegatron:
    """Convert the newest checkpoint of a folder to Megatron-LM, for any tensor x pipeline size."""

    checkpoint: user_paths.Path
    """Folder of checkpoints, such as checkpoint.dir."""
    output: user_paths.Path
    """Folder to write to; it must be new or empty."""
    tensor: Annotated[int, ranges.Range(1, 2**20)] = 1
    """Megatron's --tensor-model-parallel-size."""
    pipeline: Annotated[int, ranges.Range(1, 2**16)] = 1
    """Megatron's --pipeline-model-parallel-size."""
    transformer_impl: Literal["local", "transformer_engine"] = "local"
    """Megatron's --transformer-impl, which determines the names of the tensors."""
    format: Literal["torch", "safetensors"] = "torch"
    """torch: Megatron's format; safetensors: with the arguments in args.json."""


def from_megatron(options: FromMegatron) -> str:
    """Write the checkpoint and return a line about it.

    Raises:
        UserError: a file is missing, damaged or of another kind, our network cannot express the
            model, or the output folder has checkpoints.
    """
    from gpt3jax.checkpoint import parameters  # after parsing: importing JAX takes seconds

    path = pathlib.Path(options.folder)
    if not path.exists():
        raise errors.UserError(f"{path} does not exist", page=_PAGE)
    files = [path] if path.is_file() else tensor_files.files(path)
    if files:
        reader = tensor_files.Reader(files)
        shards = _from_safetensors(reader)
        folder = path.parent if path.is_file() else path
        args = _safetensors_args(folder / _ARGS, reader, options.n_heads)
    else:
        path, args, files_of_ranks = torch_files.read(path)
        megatron_core.check(str(path), args)
        shards = _merged(path, files_of_ranks)
    model, eod_id = megatron_core.model_of(str(path), args, options.vocab_size)
    data = schema.Data(eod_id=eod_id)
    validation.check_model(model, data)
    _check_tensors(path, shards, model)
    store = parameters.new_store(options.output)
    parameters.write(store, parameters.untrained(model, data), _Rows(path, shards))
    return (
        f"{options.output}: Megatron's GPT of {model.n_layers} x {model.d_model} x "
        f"{model.n_heads}, a vocabulary of {model.vocab_size} padded to {model.padded_vocab_size}; "
        f"to train it, add --model.vocab-size {model.vocab_size} --model.vocab-multiple "
        f"{model.vocab_multiple} --model.no-mask-padded-vocab"
    )


def to_megatron(options: ToMegatron) -> str:
    """Write the checkpoint and return a line about it.

    Raises:
        UserError: there is no checkpoint or it is damaged, the sizes do not divide the model, torch
            is not installed, or the output folder is not empty.
    """
    from gpt3jax.checkpoint import parameters
    from gpt3jax.sharding import meshes

    output = pathlib.Path(options.output)
    source = parameters.open_newest(options.checkpoint, meshes.make_mesh(schema.Mesh()))
    model = parameters.find(options.checkpoint)[2].model  # with its dropout
    tensor_files.check_empty(output)
    _check_sizes(options, model)
    args = megatron_core.args_of(
        model, source.cfg.data.eod_id, options.tensor, options.pipeline, options.transformer_impl
    )
    if options.format == "torch":
        torch_files.check_installed()
        output.mkdir(parents=True, exist_ok=True)
        for stage in range(options.pipeline):
            _write_stage(output, options, args, source, stage)
        torch_files.finish(output)
    else:
        output.mkdir(parents=True, exist_ok=True)
        writer = tensor_files.Writer(output)
        for _, name, tensor in _tensors(source, range(model.n_layers)):
            writer.add(_their_name(name, options.transformer_impl), tensor)
        writer.close()
        (output / _ARGS).write_text(json.dumps(args, indent=2) + "\n")
    note = ""
    if model.mask_padded_vocab and model.vocab_size < model.padded_vocab_size:
        note = "; Megatron will include the padding of the vocabulary in the softmax"
    return (
        f"{output}: Megatron's GPT of step {source.step}; start Megatron with "
        f"--make-vocab-size-divisible-by {args['make_vocab_size_divisible_by']}{note}"
    )


def _check_sizes(options: ToMegatron, model: schema.Model) -> None:
    if options.format == "safetensors" and (options.tensor, options.pipeline) != (1, 1):
        raise errors.UserError(
            f"--tensor={options.tensor} and --pipeline={options.pipeline} have no effect with "
            "--format=safetensors, which is not split: leave them out",
            page=_PAGE,
        )
    sizes = {"n_heads": model.n_heads, "padded_vocab_size": model.padded_vocab_size}
    for field, size in sizes.items():
        if size % options.tensor:
            raise errors.UserError(
                f"--tensor={options.tensor} does not divide model.{field}={size}: use one of "
                f"{ranges.divisors(size)}",
                page=_PAGE,
            )
    if model.n_layers % options.pipeline:
        raise errors.UserError(
            f"--pipeline={options.pipeline} does not divide model.n_layers={model.n_layers}: use "
            f"one of {ranges.divisors(model.n_layers)}",
            page=_PAGE,
        )


class _Rows:
    """Rows of our parameters, from the shards of Megatron's tensors."""

    def __init__(self, path: pathlib.Path, shards: _Shards):
        self._path, self._shards = path, shards
        self._last: tuple[str, np.ndarray] = ("", np.zeros(0))

    def __call__(self, name: str, shape: tuple[int, ...], first: int, stop: int) -> np.ndarray:
        """Return rows of one of our parameters in fp32."""
        if megatron_core.TENSORS[name].in_layer:
            layers = (self._whole(name, shape[1:], i) for i in range(first, stop))
            return np.stack(list(layers))
        if self._last[0] != name:
            self._last = (name, self._whole(name, shape, 0))
        return self._last[1][first:stop]

    def _whole(self, name: str, shape: tuple[int, ...], layer: int) -> np.ndarray:
        theirs = megatron_core.TENSORS[name].name.format(layer)
        split_dim = megatron_core.TENSORS[name].split_dim
        tensor = joined(self._path, theirs, self._shards[theirs], split_dim)
        expected = megatron_core.theirs_shape(name, shape)
        if tensor.shape != expected:
            raise errors.UserError(
                f"{self._path}: {theirs} has the shape {list(tensor.shape)}, and its arguments say "
                f"{list(expected)}",
                page=_PAGE,
            )
        tensor_files.check_finite(str(self._path), theirs, tensor)
        return megatron_core.to_ours(name, tensor, shape)


def joined(
    path: pathlib.Path, name: str, shards: list[Callable[[], np.ndarray]], dim: int | None
) -> np.ndarray:
    """Return a tensor from its shards by tensor rank: split along `dim`, or replicated (None).

    Raises:
        UserError: the replicas are not equal.
    """
    arrays = [read() for read in shards]
    if dim is not None:
        return np.concatenate(arrays, axis=min(dim, arrays[0].ndim - 1))
    if not all(np.array_equal(array, arrays[0], equal_nan=True) for array in arrays):
        raise errors.UserError(
            f"{path}: {name} is not the same on all tensor ranks: the files are not of one "
            "checkpoint",
            page=_PAGE,
        )
    return arrays[0]


def _merged(path: pathlib.Path, files: list[torch_files.Shard]) -> _Shards:
    """Return the tensors of all files, with layers numbered over all pipeline stages."""
    shards: _Shards = {}
    n_before = 0
    for _, part in itertools.groupby(files, key=lambda file: file.part):
        n_layers = 0
        for file in part:
            for name, read in file.tensors.items():
                local = megatron_core.local_name(name)
                if local.startswith("decoder.layers."):
                    _, _, number, rest = local.split(".", 3)
                    n_layers = max(n_layers, int(number) + 1)
                    local = f"decoder.layers.{n_before + int(number)}.{rest}"
                shards.setdefault(local, []).append(read)
        n_before += n_layers
    counts = {len(ranks) for ranks in shards.values()}
    if len(counts) > 1:
        raise errors.UserError(f"{path}: its tensor ranks do not hold the same tensors", page=_PAGE)
    return shards


def _from_safetensors(reader: tensor_files.Reader) -> _Shards:
    def reads(name: str) -> Callable[[], np.ndarray]:
        return lambda: reader.rows(name).astype(np.float32)

    names = [name for name in reader.shapes if not name.endswith(megatron_core.EXTRA_STATE)]
    return {megatron_core.local_name(name): [reads(name)] for name in names}


def _safetensors_args(
    path: pathlib.Path, reader: tensor_files.Reader, n_heads: int
) -> megatron_core.Args:
    """Return the arguments beside safetensors; without the file, derive them from the shapes."""
    if path.is_file():
        return user_paths.read_json(path, _PAGE)
    if not n_heads:
        raise errors.UserError(
            f"{path} does not exist, and the tensors' shapes do not determine the number of "
            "attention heads: give --n-heads N",
            page=_PAGE,
        )
    shapes = {megatron_core.local_name(name): shape for name, shape in reader.shapes.items()}
    needed = [megatron_core.TENSORS[name].name for name in ("embedding_VD", "positions_TD")]
    missing = [name for name in needed if len(shapes.get(name, ())) != 2]
    if missing:
        raise errors.UserError(
            f"{path.parent} has no tensor {missing[0]}: it is not a GPT with learned positions",
            page=_PAGE,
        )
    (vocab, width), (positions, _) = (shapes[name] for name in needed)
    layers = [int(n.split(".")[2]) for n in shapes if n.startswith("decoder.layers.")]
    return {
        "num_layers": max(layers, default=-1) + 1,
        "hidden_size": width,
        "num_attention_heads": n_heads,
        "max_position_embeddings": positions,
        "padded_vocab_size": vocab,
    }


def _check_tensors(path: pathlib.Path, shards: _Shards, model: schema.Model) -> None:
    layers = range(model.n_layers)
    tensor_files.check_names(
        path,
        shards.keys(),
        needed={tensor.name.format(i) for tensor in megatron_core.TENSORS.values() for i in layers},
        optional={megatron_core.HEAD},
        network=f"GPT with {model.n_layers} layers of its arguments",
    )
    heads = zip(shards.get(megatron_core.HEAD, ()), shards[megatron_core.EMBEDDING], strict=False)
    if not all(np.array_equal(head(), table(), equal_nan=True) for head, table in heads):
        raise errors.UserError(
            f"{path}: {megatron_core.HEAD} is not {megatron_core.EMBEDDING}: this GPT has an "
            "output layer of its own, ours is tied to the embedding",
            page=_PAGE,
        )


def _tensors(source: "parameters.Trained", layers: range) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield (our name, Megatron's name, tensor) for these layers and for all outside the layers.

    All layers are read, so that damage is noticed.

    Raises:
        UserError: a tensor has values that are not finite.
    """
    where = str(source.store.folder)
    for name, tensor in megatron_core.TENSORS.items():
        theirs = tensor.name
        if not tensor.in_layer:
            yield name, theirs, tensor_files.check_finite(where, theirs, source.whole(name))
            continue
        for i, layer in enumerate(itertools.chain.from_iterable(source.blocks(name))):
            tensor_files.check_finite(where, theirs.format(i), layer)
            if i in layers:
                yield name, theirs.format(i - layers.start), megatron_core.to_theirs(name, layer)


def _write_stage(
    folder: pathlib.Path,
    options: ToMegatron,
    args: megatron_core.Args,
    source: "parameters.Trained",
    stage: int,
) -> None:
    """Write the files of a pipeline stage, which is in memory as a whole."""
    per_stage = source.cfg.model.n_layers // options.pipeline
    layers = range(stage * per_stage, (stage + 1) * per_stage)
    is_first, is_last = stage == 0, stage == options.pipeline - 1
    holds = {"first": is_first, "all": True, "last": is_last}
    ranks: list[dict[str, np.ndarray | None]] = [{} for _ in range(options.tensor)]
    for name, theirs, tensor in _tensors(source, layers):
        names = [theirs] if holds[megatron_core.TENSORS[name].stage] else []
        if theirs == megatron_core.EMBEDDING and is_last and not is_first:
            names.append(megatron_core.HEAD)
        for key in names:
            for rank, shard in zip(ranks, _split(name, tensor, options.tensor), strict=True):
                rank[_their_name(key, options.transformer_impl)] = shard
    for i, rank in enumerate(ranks):
        extra = dict.fromkeys(
            megatron_core.extra_states(per_stage, is_last, options.transformer_impl)
        )
        torch_files.write(folder, args, (i, stage), rank | extra)


def _split(name: str, tensor: np.ndarray, n: int) -> list[np.ndarray]:
    dim = megatron_core.TENSORS[name].split_dim
    if dim is None:
        return [tensor] * n
    return [np.ascontiguousarray(shard) for shard in np.split(tensor, n, axis=dim)]


def _their_name(name: str, implementation: str) -> str:
    return name if implementation == "local" else megatron_core.fused_name(name)
