"""Megatron-LM GPT checkpoints in and out: the `torch` format, and safetensors of the same names."""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro

from gpt3jax import errors
from gpt3jax.config import ranges, schema, user_paths, validation
from gpt3jax.convert import mcore, tensor_files, torch_files
from gpt3jax.sharding import meshes

if TYPE_CHECKING:
    from gpt3jax.checkpoint import parameters

_ARGS = "args.json"  # beside safetensors: what a torch file has as `args`
_Pieces = dict[str, list[Callable[[], np.ndarray]]]  # a tensor's parts by tensor rank


@dataclasses.dataclass(frozen=True, kw_only=True)
class FromMegatron:
    """A Megatron-LM GPT checkpoint, whatever its tensor and pipeline size, becomes one of ours."""

    folder: tyro.conf.Positional[user_paths.Path]
    """Folder of Megatron's --save (torch format); or a safetensors file or folder of its names."""
    output: user_paths.Path
    """Folder for the checkpoint."""
    vocab_size: Annotated[int, ranges.Range(0, 2**30)] = 0
    """True vocabulary, where the checkpoint knows only the padded one (0: what it says)."""
    n_heads: Annotated[int, ranges.Range(0, 2**20)] = 0
    """Attention heads, for safetensors without an args.json beside them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToMegatron:
    """The newest checkpoint of a folder becomes a Megatron-LM one, for any tensor x pipeline."""

    checkpoint: user_paths.Path
    """Folder of checkpoints, as checkpoint.dir."""
    output: user_paths.Path
    """Folder to write; it must be new or empty."""
    tensor: Annotated[int, ranges.Range(1, 2**20)] = 1
    """Megatron's --tensor-model-parallel-size."""
    pipeline: Annotated[int, ranges.Range(1, 2**16)] = 1
    """Megatron's --pipeline-model-parallel-size."""
    transformer_impl: Literal["local", "transformer_engine"] = "local"
    """Names of the tensors, as Megatron's option of this name asks for them."""
    format: Literal["torch", "safetensors"] = "torch"
    """Megatron's torch format; or safetensors and args.json."""


def from_megatron(options: FromMegatron) -> str:
    """Write the checkpoint and return a line about it.

    Raises:
        UserError: a file that is missing, damaged or foreign, a model that ours cannot be, or an
            output that has checkpoints.
    """
    from gpt3jax.checkpoint import parameters  # after parsing: JAX takes seconds

    path = pathlib.Path(options.folder)
    if not path.exists():
        raise errors.UserError(f"{path} does not exist")
    files = [path] if path.is_file() else tensor_files.files(path)
    if files:
        reader = tensor_files.Reader(files)
        pieces = _from_safetensors(reader)
        folder = path.parent if path.is_file() else path
        args = _safetensors_args(folder / _ARGS, reader, options.n_heads)
    else:
        path, args, shards = torch_files.read(path)
        mcore.check(str(path), args)
        pieces = _merged(path, shards)
    model, eod_id = mcore.model_of(str(path), args, options.vocab_size)
    data = schema.Data(eod_id=eod_id)
    validation.check_model(model, data)
    _check_names(path, pieces, model)
    store = parameters.new_store(options.output)
    parameters.write(store, parameters.untrained(model, data), _Rows(path, pieces))
    return (
        f"{options.output}: Megatron's GPT of {model.n_layers} x {model.d_model} x "
        f"{model.n_heads}, a vocabulary of {model.vocab_size} padded to {model.padded_vocab_size}; "
        f"train on with --model.vocab-size {model.vocab_size} --model.vocab-multiple "
        f"{model.vocab_multiple} --model.no-mask-padded-vocab"
    )


def to_megatron(options: ToMegatron) -> str:
    """Write the checkpoint and return a line about it.

    Raises:
        UserError: no checkpoint, a damaged one, sizes that do not divide the model, torch is
            missing, or an output that is not empty.
    """
    from gpt3jax.checkpoint import parameters

    output = pathlib.Path(options.output)
    source = parameters.open_newest(options.checkpoint, meshes.make_mesh(schema.Mesh()))
    model = parameters.find(options.checkpoint)[2].model  # with its dropout
    if output.is_dir() and any(output.iterdir()):
        raise errors.UserError(f"--output={output} is not empty: give a new folder")
    _check_cut(options, model)
    args = mcore.args_of(
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
            writer.add(_named(name, options.transformer_impl), tensor)
        writer.close()
        (output / _ARGS).write_text(json.dumps(args, indent=2) + "\n")
    told = ""
    if model.mask_padded_vocab and model.vocab_size < model.padded_vocab_size:
        told = "; in Megatron its padded entries will take part in the softmax"
    return (
        f"{output}: Megatron's GPT of step {source.step}; start Megatron with "
        f"--make-vocab-size-divisible-by {args['make_vocab_size_divisible_by']}{told}"
    )


def _check_cut(options: ToMegatron, model: schema.Model) -> None:
    if options.format == "safetensors" and (options.tensor, options.pipeline) != (1, 1):
        raise errors.UserError(
            f"--tensor={options.tensor} and --pipeline={options.pipeline} have no effect with "
            "--format=safetensors, which is whole: leave them out"
        )
    sizes = {"n_heads": model.n_heads, "padded_vocab_size": model.padded_vocab_size}
    for field, size in sizes.items():
        if size % options.tensor:
            raise errors.UserError(
                f"--tensor={options.tensor} does not divide model.{field}={size}: use one of "
                f"{ranges.divisors(size)}"
            )
    if model.n_layers % options.pipeline:
        raise errors.UserError(
            f"--pipeline={options.pipeline} does not divide model.n_layers={model.n_layers}: use "
            f"one of {ranges.divisors(model.n_layers)}"
        )


class _Rows:
    """Rows of our parameters, from the parts of Megatron's tensors."""

    def __init__(self, path: pathlib.Path, pieces: _Pieces):
        self._path, self._pieces = path, pieces
        self._last: tuple[str, np.ndarray] = ("", np.zeros(0))

    def __call__(self, name: str, shape: tuple[int, ...], first: int, stop: int) -> np.ndarray:
        """Return rows of one of our parameters in fp32."""
        if name.startswith("blocks/"):
            layers = (self._whole(name, shape[1:], i) for i in range(first, stop))
            return np.stack(list(layers))
        if self._last[0] != name:
            self._last = (name, self._whole(name, shape, 0))
        return self._last[1][first:stop]

    def _whole(self, name: str, shape: tuple[int, ...], layer: int) -> np.ndarray:
        theirs = mcore.NAMES[name].format(layer)
        tensor = joined(self._path, theirs, self._pieces[theirs], mcore.cut_dim(name))
        expected = mcore.theirs_shape(name, shape)
        if tensor.shape != expected:
            raise errors.UserError(
                f"{self._path}: {theirs} has the shape {list(tensor.shape)}, and its arguments say "
                f"{list(expected)}"
            )
        tensor_files.check_finite(str(self._path), theirs, tensor)
        return mcore.to_ours(name, tensor, shape)


def joined(
    path: pathlib.Path, name: str, pieces: list[Callable[[], np.ndarray]], dim: int | None
) -> np.ndarray:
    """Return a tensor from its parts by tensor rank, cut along `dim` or repeated.

    Raises:
        UserError: parts that should be the same are not.
    """
    parts = [piece() for piece in pieces]
    if dim is not None:
        return np.concatenate(parts, axis=min(dim, parts[0].ndim - 1))
    if not all(np.array_equal(part, parts[0], equal_nan=True) for part in parts):
        raise errors.UserError(
            f"{path}: {name} is not the same on all tensor ranks: the files are not of one "
            "checkpoint"
        )
    return parts[0]


def _merged(path: pathlib.Path, shards: list[torch_files.Shard]) -> _Pieces:
    """Return the tensors of all shards, layers numbered through."""
    pieces: _Pieces = {}
    n_before = 0
    for _, part in itertools.groupby(shards, key=lambda shard: shard.part):
        n_layers = 0
        for shard in part:
            for name, read in shard.tensors.items():
                local = mcore.local_name(name)
                if local.startswith("decoder.layers."):
                    _, _, number, rest = local.split(".", 3)
                    n_layers = max(n_layers, int(number) + 1)
                    local = f"decoder.layers.{n_before + int(number)}.{rest}"
                pieces.setdefault(local, []).append(read)
        n_before += n_layers
    counts = {len(found) for found in pieces.values()}
    if len(counts) > 1:
        raise errors.UserError(f"{path}: its tensor ranks do not hold the same tensors")
    return pieces


def _from_safetensors(reader: tensor_files.Reader) -> _Pieces:
    def piece(name: str) -> Callable[[], np.ndarray]:
        return lambda: reader.rows(name).astype(np.float32)

    names = [name for name in reader.shapes if not name.endswith(mcore.EXTRA_STATE)]
    return {mcore.local_name(name): [piece(name)] for name in names}


def _safetensors_args(
    path: pathlib.Path, reader: tensor_files.Reader, n_heads: int
) -> dict[str, Any]:
    """Return the arguments beside safetensors, or what their shapes tell, and the heads given."""
    if path.is_file():
        return user_paths.read_json(path)
    if not n_heads:
        raise errors.UserError(
            f"{path} is not there, and shapes do not tell the attention heads: give --n-heads N"
        )
    shapes = {mcore.local_name(name): shape for name, shape in reader.shapes.items()}
    needed = [mcore.NAMES[name] for name in ("embedding_VD", "positions_TD")]
    missing = [name for name in needed if len(shapes.get(name, ())) != 2]
    if missing:
        raise errors.UserError(
            f"{path.parent} has no tensor {missing[0]}: it is not a GPT with learned positions"
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


def _check_names(path: pathlib.Path, pieces: _Pieces, model: schema.Model) -> None:
    layers = range(model.n_layers)
    needed = {name.format(layer) for name in mcore.NAMES.values() for layer in layers}
    missing, unknown = needed - pieces.keys(), pieces.keys() - needed - {mcore.HEAD}
    for problem, names in (("has no", missing), ("has an unknown", unknown)):
        if names:
            raise errors.UserError(
                f"{path} {problem} tensor {sorted(names)[0]} ({len(names)} such): it is not the "
                f"GPT with {model.n_layers} layers of its arguments"
            )
    heads = zip(pieces.get(mcore.HEAD, ()), pieces[mcore.EMBEDDING], strict=False)
    if not all(np.array_equal(head(), table(), equal_nan=True) for head, table in heads):
        raise errors.UserError(
            f"{path}: {mcore.HEAD} is not {mcore.EMBEDDING}: this GPT has an output layer of its "
            "own, ours is tied to the embedding"
        )


def _tensors(source: "parameters.Trained", layers: range) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield (our name, Megatron's, tensor) of these layers, and of what is outside of layers.

    All layers are read, so that what was damaged is noticed.

    Raises:
        UserError: a tensor has values that are not finite.
    """
    where = str(source.store.folder)
    for name, theirs in mcore.NAMES.items():
        if not name.startswith("blocks/"):
            yield name, theirs, tensor_files.check_finite(where, theirs, source.whole(name))
            continue
        for i, layer in enumerate(itertools.chain.from_iterable(source.blocks(name))):
            tensor_files.check_finite(where, theirs.format(i), layer)
            if i in layers:
                yield name, theirs.format(i - layers.start), mcore.to_theirs(name, layer)


def _write_stage(
    folder: pathlib.Path,
    options: ToMegatron,
    args: dict[str, Any],
    source: "parameters.Trained",
    stage: int,
) -> None:
    """Write the files of a pipeline stage, which is in memory as a whole."""
    per_stage = source.cfg.model.n_layers // options.pipeline
    layers = range(stage * per_stage, (stage + 1) * per_stage)
    is_first, is_last = stage == 0, stage == options.pipeline - 1
    ranks: list[dict[str, np.ndarray | None]] = [{} for _ in range(options.tensor)]
    for name, theirs, tensor in _tensors(source, layers):
        of_stage = {"embedding_VD": is_first, "positions_TD": is_first}
        of_stage |= {"norm/scale_D": is_last, "norm/bias_D": is_last}
        names = [theirs] if of_stage.get(name, True) else []
        if name == "embedding_VD" and is_last and not is_first:
            names.append(mcore.HEAD)
        for key in names:
            for rank, part in zip(ranks, _cut(name, tensor, options.tensor), strict=True):
                rank[_named(key, options.transformer_impl)] = part
    for i, rank in enumerate(ranks):
        extra = dict.fromkeys(mcore.extra_states(per_stage, is_last, options.transformer_impl))
        torch_files.write(folder, args, (i, stage), rank | extra)


def _cut(name: str, tensor: np.ndarray, n: int) -> list[np.ndarray]:
    dim = mcore.cut_dim(name)
    if dim is None:
        return [tensor] * n
    return [np.ascontiguousarray(part) for part in np.split(tensor, n, axis=dim)]


def _named(name: str, implementation: str) -> str:
    return name if implementation == "local" else mcore.fused_name(name)
