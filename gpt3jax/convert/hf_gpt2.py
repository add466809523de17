"""Hugging Face's GPT-2 folder: `config.json` and safetensors, read and written as our model.

GPT-2 stores linear weights as [in, out] and queries, keys and values side by side, as we do. So
each of its tensors is a reshaped slice of one of our parameters: a layer, or the vocabulary without
its padding.
"""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from gpt3jax import errors
from gpt3jax.config import schema, user_paths
from gpt3jax.convert import tensor_files

_PAGE = "converting.md#hugging-face"
Config: TypeAlias = dict[str, Any]  # the content of a config.json


class Tensor(NamedTuple):
    """A tensor of GPT-2."""

    name: str
    """Without the prefix "transformer."; {} stands for the number of the layer."""
    n_row_dims: int
    """How many leading dimensions of our parameter, without layers, are its rows (0: a vector)."""

    @property
    def in_layer(self) -> bool:
        """Return whether each layer has one."""
        return "{}" in self.name


TENSORS = {  # by the name of our parameter
    "embedding_VD": Tensor("wte.weight", 1),
    "positions_TD": Tensor("wpe.weight", 1),
    "blocks/norm_1/scale_D": Tensor("h.{}.ln_1.weight", 0),
    "blocks/norm_1/bias_D": Tensor("h.{}.ln_1.bias", 0),
    "blocks/attention/w_qkv_D3HK": Tensor("h.{}.attn.c_attn.weight", 1),
    "blocks/attention/b_qkv_3HK": Tensor("h.{}.attn.c_attn.bias", 0),
    "blocks/attention/w_out_HKD": Tensor("h.{}.attn.c_proj.weight", 2),
    "blocks/attention/b_out_D": Tensor("h.{}.attn.c_proj.bias", 0),
    "blocks/norm_2/scale_D": Tensor("h.{}.ln_2.weight", 0),
    "blocks/norm_2/bias_D": Tensor("h.{}.ln_2.bias", 0),
    "blocks/mlp/w_in_DF": Tensor("h.{}.mlp.c_fc.weight", 1),
    "blocks/mlp/b_in_F": Tensor("h.{}.mlp.c_fc.bias", 0),
    "blocks/mlp/w_down_FD": Tensor("h.{}.mlp.c_proj.weight", 1),
    "blocks/mlp/b_down_D": Tensor("h.{}.mlp.c_proj.bias", 0),
    "norm/scale_D": Tensor("ln_f.weight", 0),
    "norm/bias_D": Tensor("ln_f.bias", 0),
}
EMBEDDING = "embedding_VD"
_PREFIX = "transformer."
_HEAD = "lm_head.weight"
_HEAD_ROWS = 4096  # compared at a time
_DEFAULTS: Config = {  # of transformers' GPT2Config, for keys absent from config.json
    "vocab_size": 50_257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12,
    "n_inner": None, "activation_function": "gelu_new", "resid_pdrop": 0.1, "attn_pdrop": 0.1,
    "layer_norm_epsilon": 1e-5, "initializer_range": 0.02, "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False,
    "tie_word_embeddings": True, "eos_token_id": 50_256,
}  # fmt: skip
_GELU = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh", "gelu": "erf"}


def read_config(folder: pathlib.Path, own_eod: int | None) -> tuple[schema.Model, int]:
    """Return the model that a `config.json` describes, and its end-of-text token.

    If it names no token of the vocabulary, this is `own_eod`, the tokenizer's; without that either
    it is vocab_size, which is not a token.

    Raises:
        UserError: the file is absent, or describes a network that ours cannot express.
    """
    path = folder / "config.json"
    config = _DEFAULTS | user_paths.read_json(path, _PAGE)
    _check_supported(path, config)
    model = schema.Model(
        n_layers=config["n_layer"],
        d_model=config["n_embd"],
        n_heads=config["n_head"],
        seq_len=config["n_positions"],
        vocab_size=config["vocab_size"],
        dropout=config["resid_pdrop"],
        attention_dropout=config["attn_pdrop"],
        gelu="erf" if _GELU[config["activation_function"]] == "erf" else "tanh",
        init_std=config["initializer_range"],
        norm_eps=config["layer_norm_epsilon"],
    )
    return model, _eod_id(path, config["eos_token_id"], model.vocab_size, own_eod)


def _check_supported(path: pathlib.Path, config: Config) -> None:
    kind = config.get("model_type")
    if kind != "gpt2":
        raise errors.UserError(
            f"{path}: model_type={kind!r} is not supported: only gpt2 is", page=_PAGE
        )
    allowed: dict[str, tuple[object, ...]] = {
        "n_inner": (None, 4 * config["n_embd"]),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True,),
        "activation_function": tuple(_GELU),
    }
    for name, values in allowed.items():
        if config[name] not in values:
            raise errors.UserError(
                f"{path}: {name}={config[name]!r} is not supported: it must be "
                f"{' or '.join(map(repr, values))}",
                page=_PAGE,
            )


def _eod_id(path: pathlib.Path, eos: Any, vocab_size: int, own_eod: int | None) -> int:
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise errors.UserError(
            f"{path}: eos_token_id={eos!r} is not supported: it must be an id", page=_PAGE
        )
    tokens: list[int] = [i for i in ids if i < vocab_size]
    if own_eod is not None and own_eod < vocab_size and (not tokens or own_eod in tokens):
        return own_eod
    if len(tokens) > 1:
        raise errors.UserError(
            f"{path}: eos_token_id={eos!r} is several tokens, of which the tokenizer names none as "
            "its eos_token: leave the one that ends a document",
            page=_PAGE,
        )
    return tokens[0] if tokens else vocab_size


def check(model: schema.Model) -> None:
    """Check that GPT-2's config can express a model.

    Raises:
        UserError: it cannot.
    """
    if model.attention.pattern != "dense":
        raise errors.UserError(
            f"model.attention.pattern={model.attention.pattern}: GPT-2's config has no banded "
            "attention, so that other programs would compute something else: only dense models can "
            "be exported",
            page=_PAGE,
        )


def write_config(
    folder: pathlib.Path, model: schema.Model, eod_id: int, special: Mapping[str, int]
) -> None:
    """Write the `config.json` of a model that passes `check`.

    `special` has the ids of the tokenizer's `bos_token` and `pad_token`, if it has them.
    """
    eod = eod_id if eod_id < model.vocab_size else None
    special = {name: number for name, number in special.items() if number < model.vocab_size}
    padding = {"pad_token_id": special["pad_token"]} if "pad_token" in special else {}
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
        "bos_token_id": special.get("bos_token", eod),
        "eos_token_id": eod,
        **padding,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")


class Weights:
    """The tensors of a folder: one safetensors file, or several with an index."""

    def __init__(self, folder: pathlib.Path, model: schema.Model):
        """Open the files and check that they hold the model's tensors and no others.

        Raises:
            UserError: a file is missing or damaged, a tensor is missing, unknown or has another
                shape, or the head differs from the embedding.
        """
        files = tensor_files.files(folder)
        if not files:
            raise errors.UserError(
                f"{folder} has neither {tensor_files.FILE} nor an index: give a folder that "
                "transformers' save_pretrained wrote, or a download of a GPT-2 repository with "
                "safetensors",
                page=_PAGE,
            )
        self._model, self._reader = model, tensor_files.Reader(files)
        self._stored = {name.removeprefix(_PREFIX): name for name in self._reader.shapes}
        self._check_names(folder)
        if _HEAD in self._stored:
            self._check_head()

    def rows(self, name: str, shape: tuple[int, ...], first: int, stop: int) -> np.ndarray:
        """Return rows of one of our parameters in fp32; rows that pad the vocabulary are zero.

        The rows of a parameter of the blocks are its layers.

        Raises:
            UserError: a tensor's shape differs from config.json, fp32 cannot hold its format, or
                its values are not finite.
        """
        out = np.zeros((stop - first, *shape[1:]), np.float32)
        tensor = TENSORS[name]
        if tensor.in_layer:
            expected = flat_shape(name, shape[1:])
            for i in range(first, stop):
                layer = self._tensor(tensor.name.format(i), expected)
                out[i - first] = layer.reshape(shape[1:])
            return out
        end = self._model.vocab_size if name == EMBEDDING else shape[0]
        n_rows = max(min(stop, end) - first, 0)
        if n_rows:
            out[:n_rows] = self._tensor(tensor.name, (end, *shape[1:]), first, first + n_rows)
        return out

    def _tensor(
        self, name: str, expected: tuple[int, ...], first: int = 0, stop: int | None = None
    ) -> np.ndarray:
        """Return rows of a tensor of GPT-2 whose whole shape must be the expected one."""
        stored = self._stored[name]
        shape = self._reader.shapes[stored]
        if shape != expected:
            raise errors.UserError(
                f"{self._reader.file(stored)}: {stored} has the shape {list(shape)}, and "
                f"config.json says {list(expected)}",
                page=_PAGE,
            )
        array = self._reader.rows(stored, first, stop)
        return tensor_files.check_finite(str(self._reader.file(stored)), stored, array)

    def _check_names(self, folder: pathlib.Path) -> None:
        layers = range(self._model.n_layers)
        masks = {f"h.{i}.attn.{name}" for i in layers for name in ("bias", "masked_bias")}
        tensor_files.check_names(
            folder,
            self._stored.keys(),
            needed={tensor.name.format(i) for tensor in TENSORS.values() for i in layers},
            optional=masks | {_HEAD},
            network=f"GPT-2 with {self._model.n_layers} layers of its config.json",
        )

    def _check_head(self) -> None:
        shape = (self._model.vocab_size, self._model.d_model)
        table = TENSORS[EMBEDDING].name
        for first in range(0, shape[0], _HEAD_ROWS):
            part = (shape, first, min(first + _HEAD_ROWS, shape[0]))
            if not np.array_equal(self._tensor(_HEAD, *part), self._tensor(table, *part)):
                raise errors.UserError(
                    f"{self._reader.file(self._stored[_HEAD])}: {_HEAD} is not {table}: this "
                    "GPT-2 has a head of its own, ours is tied to the embedding",
                    page=_PAGE,
                )


def flat_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of GPT-2's tensor from that of our parameter, without its layers."""
    n = TENSORS[name].n_row_dims
    rows = (math.prod(shape[:n]),) if n else ()
    return (*rows, math.prod(shape[n:]))


def tensor_name(name: str, layer: int) -> str:
    """Return the name of GPT-2's tensor for a layer of one of our parameters."""
    return _PREFIX + TENSORS[name].name.format(layer)
