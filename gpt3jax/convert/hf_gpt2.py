"""Hugging Face's GPT-2 folder: `config.json` and safetensors, as our model and parameters.

GPT-2 keeps linear weights as [in, out] and queries, keys and values side by side, as we do, so each
of its tensors is one of ours reshaped: a layer's slice, or the vocabulary's true rows.
"""

import contextlib
import json
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from gpt3jax import config

# Our parameter: GPT-2's name of it, in layer {} where it has one.
NAMES = {
    "embedding_VD": "wte.weight",
    "positions_TD": "wpe.weight",
    "blocks/norm_1/scale_D": "h.{}.ln_1.weight",
    "blocks/norm_1/bias_D": "h.{}.ln_1.bias",
    "blocks/attention/w_qkv_D3HK": "h.{}.attn.c_attn.weight",
    "blocks/attention/b_qkv_3HK": "h.{}.attn.c_attn.bias",
    "blocks/attention/w_out_HKD": "h.{}.attn.c_proj.weight",
    "blocks/attention/b_out_D": "h.{}.attn.c_proj.bias",
    "blocks/norm_2/scale_D": "h.{}.ln_2.weight",
    "blocks/norm_2/bias_D": "h.{}.ln_2.bias",
    "blocks/mlp/w_in_DF": "h.{}.mlp.c_fc.weight",
    "blocks/mlp/b_in_F": "h.{}.mlp.c_fc.bias",
    "blocks/mlp/w_down_FD": "h.{}.mlp.c_proj.weight",
    "blocks/mlp/b_down_D": "h.{}.mlp.c_proj.bias",
    "norm/scale_D": "ln_f.weight",
    "norm/bias_D": "ln_f.bias",
}
TOKENIZER_FILES = ("vocab.json", "merges.txt")
_PREFIX = "transformer."
_HEAD = "lm_head.weight"
_INDEX = "model.safetensors.index.json"
_FILE = "model.safetensors"
# GPT2Config's defaults (transformers), for what a config.json leaves out.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 50_257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12,
    "n_inner": None, "activation_function": "gelu_new", "resid_pdrop": 0.1, "attn_pdrop": 0.1,
    "layer_norm_epsilon": 1e-5, "initializer_range": 0.02, "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False,
    "tie_word_embeddings": True, "eos_token_id": 50_256,
}  # fmt: skip
_GELU = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh", "gelu": "erf"}


def read_config(folder: pathlib.Path) -> tuple[config.Model, int]:
    """Return the model that a `config.json` describes, and its end-of-text token.

    Raises:
        UserError: there is none, or it is not a GPT-2 that our network can be.
    """
    path = folder / "config.json"
    found = _DEFAULTS | _read_json(path)
    kind = found.get("model_type")
    if kind != "gpt2":
        raise config.UserError(f"{path}: model_type={kind!r} is not supported: only gpt2 is")
    width = found["n_embd"]
    needed = {
        "n_inner": (None, 4 * width),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True,),
        "activation_function": tuple(_GELU),
    }
    for name, values in needed.items():
        if found[name] not in values:
            raise config.UserError(
                f"{path}: {name}={found[name]!r} is not supported: it must be "
                f"{' or '.join(map(repr, values))}"
            )
    model = config.Model(
        n_layers=found["n_layer"],
        d_model=width,
        n_heads=found["n_head"],
        seq_len=found["n_positions"],
        vocab_size=found["vocab_size"],
        dropout=found["resid_pdrop"],
        attention_dropout=found["attn_pdrop"],
        gelu="erf" if _GELU[found["activation_function"]] == "erf" else "tanh",
        init_std=found["initializer_range"],
        norm_eps=found["layer_norm_epsilon"],
    )
    eos = found["eos_token_id"]
    return model, eos if isinstance(eos, int) else model.vocab_size - 1


def check(model: config.Model) -> None:
    """Check that GPT-2's config can express a model.

    Raises:
        UserError: it cannot.
    """
    if model.attention.pattern != "dense":
        raise config.UserError(
            f"model.attention.pattern={model.attention.pattern}: GPT-2's config has no banded "
            "attention, a reader would compute something else: only dense models can be exported"
        )


def write_config(folder: pathlib.Path, model: config.Model, eod_id: int) -> None:
    """Write the `config.json` of a model that passes `check`."""
    eod = eod_id if eod_id < model.softmax_size else None
    content = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": model.softmax_size,
        "n_positions": model.seq_len,
        "n_ctx": model.seq_len,
        "n_embd": model.d_model,
        "n_layer": model.n_layers,
        "n_head": model.n_heads,
        "n_inner": None,
        "activation_function": "gelu_new" if model.gelu == "tanh" else "gelu",
        "resid_pdrop": model.dropout,
        "embd_pdrop": model.dropout,
        "attn_pdrop": model.attention_dropout,
        "layer_norm_epsilon": model.norm_eps,
        "initializer_range": model.init_std,
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
        "bos_token_id": eod,
        "eos_token_id": eod,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")


class Weights:
    """The tensors of a folder, in one safetensors file or in several with an index."""

    def __init__(self, folder: pathlib.Path, model: config.Model):
        """Open the files and check that they hold the model's tensors and no others.

        Raises:
            UserError: a file is missing or damaged, or a tensor is missing or unknown.
        """
        self._model, self._where = model, {}
        for path in _files(folder):
            with _reading(path):
                file: Any = safetensors.safe_open(path, "np")
                for name in file.keys():  # noqa: SIM118 - not a dict
                    self._where[name.removeprefix(_PREFIX)] = (path, file, name)
        needed = {
            pattern.format(layer) for pattern in NAMES.values() for layer in range(model.n_layers)
        }
        masks = {
            f"h.{i}.attn.{name}" for i in range(model.n_layers) for name in ("bias", "masked_bias")
        }
        missing, unknown = (
            needed - self._where.keys(),
            self._where.keys() - needed - masks - {_HEAD},
        )
        for problem, names in (("has no", missing), ("has an unknown", unknown)):
            if names:
                raise config.UserError(
                    f"{folder} {problem} tensor {sorted(names)[0]} ({len(names)} such): it is not "
                    f"the GPT-2 with {model.n_layers} layers of its config.json"
                )

    def parameter(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Return one of our parameters in fp32, `[L, ...]` or `[...]`; padded rows are zero.

        Raises:
            UserError: a tensor has another shape than config.json says, or another head is found.
        """
        out = np.zeros(shape, np.float32)
        if name.startswith("blocks/"):
            for layer in range(self._model.n_layers):
                out[layer] = self._tensor(NAMES[name].format(layer), shape[1:])
            return out
        if name != "embedding_VD":
            out[...] = self._tensor(NAMES[name], shape)
            return out
        rows = (self._model.vocab_size, *shape[1:])
        out[: rows[0]] = self._tensor(NAMES[name], rows)
        if _HEAD in self._where and not np.array_equal(self._tensor(_HEAD, rows), out[: rows[0]]):
            raise config.UserError(
                f"{self._where[_HEAD][0]}: {_HEAD} is not {NAMES[name]}: this GPT-2 has a head of "
                "its own, ours is tied to the embedding"
            )
        return out

    def _tensor(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        path, file, name = self._where[name]
        with _reading(path):
            found: np.ndarray = file.get_tensor(name)
        as_stored = flat_shape(name, shape)
        if found.shape != as_stored:
            raise config.UserError(
                f"{path}: {name} has the shape {list(found.shape)}, and config.json says "
                f"{list(as_stored)}"
            )
        return found.astype(np.float32).reshape(shape)


def flat_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of GPT-2's tensor from that of our parameter, without its layers."""
    if name.endswith("attn.c_attn.weight"):
        return (shape[0], math.prod(shape[1:]))
    if name.endswith("attn.c_proj.weight"):
        return (math.prod(shape[:-1]), shape[-1])
    return (math.prod(shape),) if name.endswith("bias") else shape


def tensors(name: str, array: np.ndarray, model: config.Model) -> Iterator[tuple[str, np.ndarray]]:
    """Yield GPT-2's tensors of one of our parameters, `[L, ...]` or `[...]`, by their names."""
    if name.startswith("blocks/"):
        for layer in range(model.n_layers):
            theirs = _PREFIX + NAMES[name].format(layer)
            yield theirs, array[layer].reshape(flat_shape(theirs, array.shape[1:]))
        return
    yield _PREFIX + NAMES[name], array[: model.softmax_size] if name == "embedding_VD" else array


class Writer:
    """Writes tensors to safetensors files of bounded size, with an index if they are several."""

    def __init__(self, folder: pathlib.Path, max_bytes: int = 4 << 30):
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
        self._shard[name] = np.array(array, order="C")  # a copy: the whole may go
        self._n_bytes += array.nbytes

    def close(self) -> None:
        """Write the rest, and give the files their names."""
        self._flush()
        n = len(self._parts)
        index: dict[str, str] = {}
        for i, names in enumerate(self._parts):
            file = f"model-{i + 1:05d}-of-{n:05d}.safetensors" if n > 1 else _FILE
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


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    if (folder / _FILE).is_file():
        return [folder / _FILE]
    if (folder / _INDEX).is_file():
        names = _read_json(folder / _INDEX).get("weight_map", {}).values()
        return [folder / name for name in sorted(set(names))]
    raise config.UserError(
        f"{folder} has neither {_FILE} nor {_INDEX}: give a folder that transformers' "
        "save_pretrained wrote, or a download of a GPT-2 repository with safetensors"
    )


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise config.UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise config.UserError(f"{path} is not a JSON object")
    return content


@contextlib.contextmanager
def _reading(path: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        raise config.UserError(f"{path} cannot be read: {error}") from error
