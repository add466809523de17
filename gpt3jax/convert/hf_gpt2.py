"""Hugging Face's GPT-2 folder: `config.json` and safetensors, as our model and parameters.

GPT-2 keeps linear weights as [in, out] and queries, keys and values side by side, as we do, so each
of its tensors is one of ours reshaped: a layer's slice, or the vocabulary's true rows.
"""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from gpt3jax import errors
from gpt3jax.config import schema, user_paths
from gpt3jax.convert import tensor_files

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
_PREFIX = "transformer."
_HEAD, _EMBEDDING = "lm_head.weight", "wte.weight"
_HEAD_ROWS = 4096  # compared at a time
# GPT2Config's defaults (transformers), for what a config.json leaves out.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 50_257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12,
    "n_inner": None, "activation_function": "gelu_new", "resid_pdrop": 0.1, "attn_pdrop": 0.1,
    "layer_norm_epsilon": 1e-5, "initializer_range": 0.02, "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False,
    "tie_word_embeddings": True, "eos_token_id": 50_256,
}  # fmt: skip
_GELU = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh", "gelu": "erf"}


def read_config(folder: pathlib.Path, own_eod: int | None) -> tuple[schema.Model, int]:
    """Return the model that a `config.json` describes, and its end-of-text token.

    Where it names none of the vocabulary, this is own_eod, that of the tokenizer; if there is none
    either, it is vocab_size, which no token is.

    Raises:
        UserError: there is none, or it is not a GPT-2 that our network can be.
    """
    path = folder / "config.json"
    found = _DEFAULTS | user_paths.read_json(path)
    kind = found.get("model_type")
    if kind != "gpt2":
        raise errors.UserError(f"{path}: model_type={kind!r} is not supported: only gpt2 is")
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
            raise errors.UserError(
                f"{path}: {name}={found[name]!r} is not supported: it must be "
                f"{' or '.join(map(repr, values))}"
            )
    model = schema.Model(
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
    return model, _eod_id(path, found["eos_token_id"], model.vocab_size, own_eod)


def _eod_id(path: pathlib.Path, eos: Any, vocab_size: int, own_eod: int | None) -> int:
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise errors.UserError(f"{path}: eos_token_id={eos!r} is not supported: it must be an id")
    known = [i for i in ids if i < vocab_size]
    if own_eod is not None and own_eod < vocab_size and (not known or own_eod in known):
        return own_eod
    if len(known) > 1:
        raise errors.UserError(
            f"{path}: eos_token_id={eos!r} is several tokens, of which the tokenizer names none as "
            "its eos_token: leave the one that ends a document"
        )
    return known[0] if known else vocab_size


def check(model: schema.Model) -> None:
    """Check that GPT-2's config can express a model.

    Raises:
        UserError: it cannot.
    """
    if model.attention.pattern != "dense":
        raise errors.UserError(
            f"model.attention.pattern={model.attention.pattern}: GPT-2's config has no banded "
            "attention, a reader would compute something else: only dense models can be exported"
        )


def write_config(
    folder: pathlib.Path, model: schema.Model, eod_id: int, special: Mapping[str, int]
) -> None:
    """Write the `config.json` of a model that passes `check`.

    `special` has the ids of the tokenizer's `bos_token` and `pad_token`, where it names them.
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
    """The tensors of a folder, in one safetensors file or in several with an index."""

    def __init__(self, folder: pathlib.Path, model: schema.Model):
        """Open the files and check that they hold the model's tensors and no others.

        Raises:
            UserError: a file is missing or damaged, or a tensor is missing, unknown or of another
                shape, or the head is not the embedding.
        """
        files = tensor_files.files(folder)
        if not files:
            raise errors.UserError(
                f"{folder} has neither {tensor_files.FILE} nor an index: give a folder that "
                "transformers' save_pretrained wrote, or a download of a GPT-2 repository with "
                "safetensors"
            )
        self._model, self._reader = model, tensor_files.Reader(files)
        self._stored = {name.removeprefix(_PREFIX): name for name in self._reader.shapes}
        self._check_names(folder)
        if _HEAD in self._stored:
            self._check_head()

    def rows(self, name: str, shape: tuple[int, ...], first: int, stop: int) -> np.ndarray:
        """Return rows of one of our parameters in fp32; rows beyond the vocabulary are zero.

        The first dimension is the layers' where there are any.

        Raises:
            UserError: a tensor has another shape than config.json says, a format that fp32 does not
                hold, or values that are not finite.
        """
        out = np.zeros((stop - first, *shape[1:]), np.float32)
        if name.startswith("blocks/"):
            for i in range(first, stop):
                found = self._tensor(NAMES[name].format(i), shape[1:])
                out[i - first] = found.reshape(shape[1:])
            return out
        end = self._model.vocab_size if name == "embedding_VD" else shape[0]
        n_rows = max(min(stop, end) - first, 0)
        if n_rows:
            out[:n_rows] = self._tensor(NAMES[name], (end, *shape[1:]), first, first + n_rows)
        return out

    def _tensor(
        self, name: str, shape: tuple[int, ...], first: int = 0, stop: int | None = None
    ) -> np.ndarray:
        stored, as_stored = self._stored[name], flat_shape(name, shape)
        found = self._reader.shapes[stored]
        if found != as_stored:
            raise errors.UserError(
                f"{self._reader.file(stored)}: {stored} has the shape {list(found)}, and "
                f"config.json says {list(as_stored)}"
            )
        array = self._reader.rows(stored, first, stop)
        return tensor_files.check_finite(str(self._reader.file(stored)), stored, array)

    def _check_names(self, folder: pathlib.Path) -> None:
        layers = range(self._model.n_layers)
        needed = {pattern.format(layer) for pattern in NAMES.values() for layer in layers}
        masks = {f"h.{i}.attn.{name}" for i in layers for name in ("bias", "masked_bias")}
        missing = needed - self._stored.keys()
        unknown = self._stored.keys() - needed - masks - {_HEAD}
        for problem, names in (("has no", missing), ("has an unknown", unknown)):
            if names:
                raise errors.UserError(
                    f"{folder} {problem} tensor {sorted(names)[0]} ({len(names)} such): it is not "
                    f"the GPT-2 with {self._model.n_layers} layers of its config.json"
                )

    def _check_head(self) -> None:
        shape = (self._model.vocab_size, self._model.d_model)
        for first in range(0, shape[0], _HEAD_ROWS):
            part = (shape, first, min(first + _HEAD_ROWS, shape[0]))
            if not np.array_equal(self._tensor(_HEAD, *part), self._tensor(_EMBEDDING, *part)):
                raise errors.UserError(
                    f"{self._reader.file(self._stored[_HEAD])}: {_HEAD} is not {_EMBEDDING}: this "
                    "GPT-2 has a head of its own, ours is tied to the embedding"
                )


def flat_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of GPT-2's tensor from that of our parameter, without its layers."""
    if name.endswith("attn.c_attn.weight"):
        return (shape[0], math.prod(shape[1:]))
    if name.endswith("attn.c_proj.weight"):
        return (math.prod(shape[:-1]), shape[-1])
    return (math.prod(shape),) if name.endswith("bias") else shape


def tensor_name(name: str, layer: int) -> str:
    """Return the name of GPT-2's tensor for a layer of one of our parameters."""
    return _PREFIX + NAMES[name].format(layer)
