"""Megatron-Core's GPT: one table of its tensors, and its arguments as our model.

Facts are those of Megatron-LM at commit d98e8a64dd.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from gpt3jax import errors
from gpt3jax.config import schema

_PAGE = "from_megatron.md#checkpoints"
Args: TypeAlias = Mapping[str, Any]  # Megatron's command-line arguments, from its checkpoints
Layout = Literal["same", "linear", "qkv_weight", "qkv_bias"]
"""How Megatron stores a parameter.

same: as we do. linear: [out, in], ours is [in, out]; out or in may have several dimensions here.
qkv_weight, qkv_bias: rows go head by head (q, k and v of head 0, q of head 1, ...).
"""


class Tensor(NamedTuple):
    """A tensor of Megatron's GPT."""

    name: str
    """Under `--transformer-impl local`; {} stands for the number of the layer."""
    layout: Layout = "same"
    split_dim: int | None = None
    """The dimension of Megatron's tensor that tensor parallelism splits; None: it is replicated."""
    n_in_dims: int = 1
    """linear, qkv_weight: number of leading input dimensions of our parameter, without layers."""
    stage: Literal["first", "all", "last"] = "all"
    """The pipeline stages that hold it."""

    @property
    def in_layer(self) -> bool:
        """Return whether each layer has one."""
        return "{}" in self.name


_LAYER = "decoder.layers.{}."
TENSORS = {  # by the name of our parameter
    "embedding_VD": Tensor("embedding.word_embeddings.weight", split_dim=0, stage="first"),
    "positions_TD": Tensor("embedding.position_embeddings.weight", stage="first"),
    "blocks/norm_1/scale_D": Tensor(_LAYER + "input_layernorm.weight"),
    "blocks/norm_1/bias_D": Tensor(_LAYER + "input_layernorm.bias"),
    "blocks/attention/w_qkv_D3HK": Tensor(
        _LAYER + "self_attention.linear_qkv.weight", "qkv_weight", split_dim=0
    ),
    "blocks/attention/b_qkv_3HK": Tensor(
        _LAYER + "self_attention.linear_qkv.bias", "qkv_bias", split_dim=0
    ),
    "blocks/attention/w_out_HKD": Tensor(
        _LAYER + "self_attention.linear_proj.weight", "linear", split_dim=1, n_in_dims=2
    ),
    "blocks/attention/b_out_D": Tensor(_LAYER + "self_attention.linear_proj.bias"),
    "blocks/norm_2/scale_D": Tensor(_LAYER + "pre_mlp_layernorm.weight"),
    "blocks/norm_2/bias_D": Tensor(_LAYER + "pre_mlp_layernorm.bias"),
    "blocks/mlp/w_in_DF": Tensor(_LAYER + "mlp.linear_fc1.weight", "linear", split_dim=0),
    "blocks/mlp/b_in_F": Tensor(_LAYER + "mlp.linear_fc1.bias", split_dim=0),
    "blocks/mlp/w_down_FD": Tensor(_LAYER + "mlp.linear_fc2.weight", "linear", split_dim=1),
    "blocks/mlp/b_down_D": Tensor(_LAYER + "mlp.linear_fc2.bias"),
    "norm/scale_D": Tensor("decoder.final_layernorm.weight", stage="last"),
    "norm/bias_D": Tensor("decoder.final_layernorm.bias", stage="last"),
}
EMBEDDING = TENSORS["embedding_VD"].name
HEAD = "output_layer.weight"  # a copy of the embedding, on the last of several pipeline stages
EXTRA_STATE = "._extra_state"  # of fp8 layers; it has no weights
# Transformer Engine's fused layers contain the norm before them.
_TRANSFORMER_ENGINE = {
    ".input_layernorm.": ".self_attention.linear_qkv.layer_norm_",
    ".pre_mlp_layernorm.": ".mlp.linear_fc1.layer_norm_",
}
# For each argument, the values that our network supports, and why not others. Arguments differ
# between versions of Megatron: an absent one has the first value.
_SUPPORTED: dict[str, tuple[tuple[object, ...], str]] = {
    "position_embedding_type": (("learned_absolute",), "ours has learned positions only"),
    "use_rotary_position_embeddings": ((False, None), "ours has learned positions only"),
    "normalization": (("LayerNorm",), "ours has LayerNorm only"),
    "apply_layernorm_1p": ((False, None), "its LayerNorm weights are stored less 1"),
    "layernorm_zero_centered_gamma": ((False, None), "its LayerNorm weights are stored less 1"),
    "swiglu": ((False, None), "ours has GELU only"),
    "squared_relu": ((False, None), "ours has GELU only"),
    "quick_geglu": ((False, None), "ours has GELU only"),
    "use_te_activation_func": ((False, None), "its GELU is not known to be one of ours"),
    "multi_latent_attention": ((False, None), "ours has plain multi-head attention"),
    "qk_layernorm": ((False, None), "ours does not normalise queries and keys"),
    "qk_l2_norm": ((False, None), "ours does not normalise queries and keys"),
    "attention_output_gate": ((False, None), "ours has no gate behind attention"),
    "softmax_type": (("vanilla", None), "ours has the plain softmax"),
    "experimental_attention_variant": ((None,), "ours has plain multi-head attention"),
    "untie_embeddings_and_output_weights": ((False, None), "our output layer is the embedding"),
    "num_experts": ((None, 0), "ours has no mixture of experts"),
    "add_bias_linear": ((True, None), "ours has biases in every linear layer"),
    "apply_residual_connection_post_layernorm": ((False, None), "ours is pre-LayerNorm"),
    "mtp_num_layers": ((None, 0), "ours predicts one token at a time"),
    "is_hybrid_model": ((False, None), "ours has attention in every layer"),
    "hybrid_layer_pattern": ((None,), "ours has attention in every layer"),
    "heterogeneous_layers_config_path": ((None,), "all layers of ours are alike"),
    "enable_mhc_connections": ((False, None), "ours has one residual stream"),
    "use_mup": ((False, None), "ours has no multipliers"),
}
_ABSENT = object()


def local_name(name: str) -> str:
    """Return a tensor's name without Transformer Engine, from its name with or without it."""
    for local, fused in _TRANSFORMER_ENGINE.items():
        name = name.replace(fused, local)
    return name


def fused_name(name: str) -> str:
    """Return a tensor's name with Transformer Engine, from its name without it."""
    for local, fused in _TRANSFORMER_ENGINE.items():
        name = name.replace(local, fused)
    return name


def extra_states(n_layers: int, has_head: bool, implementation: str) -> list[str]:
    """Return the names of entries without weights that strict readers expect; they may be None."""
    parts = ["self_attention.linear_proj", "self_attention.linear_qkv"]
    parts += ["mlp.linear_fc1", "mlp.linear_fc2"]
    if implementation == "transformer_engine":
        parts.append("self_attention.core_attention")
    names = [f"decoder.layers.{i}.{part}" for i in range(n_layers) for part in parts]
    return [name + EXTRA_STATE for name in names + ["output_layer"] * has_head]


def to_ours(name: str, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return our parameter, without its layers, from Megatron's tensor, as fp32.

    Raises:
        ValueError: it has another number of elements.
    """
    layout = TENSORS[name].layout
    if layout == "qkv_weight":
        d, _, h, k = shape
        tensor = np.moveaxis(tensor.reshape(h, 3, k, d).swapaxes(0, 1), -1, 0)
    elif layout == "qkv_bias":
        _, h, k = shape
        tensor = tensor.reshape(h, 3, k).swapaxes(0, 1)
    elif layout == "linear":
        tensor = tensor.T
    return np.ascontiguousarray(tensor.reshape(shape), np.float32)


def to_theirs(name: str, array: np.ndarray) -> np.ndarray:
    """Return Megatron's tensor from our parameter without its layers."""
    layout, shape = TENSORS[name].layout, theirs_shape(name, array.shape)
    if layout == "qkv_weight":
        by_head = np.moveaxis(array, 0, -1).swapaxes(0, 1)
        return np.ascontiguousarray(by_head.reshape(shape))
    if layout == "qkv_bias":
        return np.ascontiguousarray(array.swapaxes(0, 1).reshape(shape))
    if layout == "linear":
        return np.ascontiguousarray(array.reshape(shape[::-1]).T)
    return array


def theirs_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of Megatron's tensor from that of our parameter without its layers."""
    tensor = TENSORS[name]
    if tensor.layout in ("linear", "qkv_weight"):
        n_in = math.prod(shape[: tensor.n_in_dims])
        return (math.prod(shape) // n_in, n_in)
    return (math.prod(shape),) if tensor.layout == "qkv_bias" else shape


def model_of(where: str, args: Args, vocab_size: int) -> tuple[schema.Model, int]:
    """Return the model that a checkpoint's arguments describe, and its end-of-document token.

    Without such an argument the token is vocab_size, which is not a token. `vocab_size` is the size
    before padding (0: the one in the arguments).

    Raises:
        UserError: our network cannot express this one; it names the argument and the reason.
    """
    check(where, args)
    padded = _number(where, args, "padded_vocab_size")
    vocab_size = vocab_size or args.get("vocab_size") or _tokenizer_size(args, padded)
    if not 0 < vocab_size <= padded:
        raise errors.UserError(
            f"{where}: a vocabulary of {vocab_size} does not fit padded_vocab_size={padded}: give "
            "its size before padding with --vocab-size",
            page=_PAGE,
        )
    exact = args.get("bias_gelu_fusion", True) is False and not args.get("openai_gelu")
    model = schema.Model(
        n_layers=_number(where, args, "num_layers"),
        d_model=_number(where, args, "hidden_size"),
        n_heads=_number(where, args, "num_attention_heads"),
        seq_len=_number(where, args, "max_position_embeddings"),
        vocab_size=vocab_size,
        vocab_multiple=_vocab_multiple(args, vocab_size, padded),
        mask_padded_vocab=False,
        dropout=args.get("hidden_dropout", 0.1),
        attention_dropout=args.get("attention_dropout", 0.1),
        gelu="erf" if exact else "tanh",
        init_std=args.get("init_method_std") or 0.02,
        norm_eps=args.get("layernorm_epsilon", args.get("norm_epsilon", 1e-5)),
        attention=_attention(where, args),
    )
    return model, _eod_id(args, vocab_size)


def check(where: str, args: Args) -> None:
    """Check that our network can express the one that a checkpoint's arguments describe.

    Raises:
        UserError: it cannot; the message names the argument and the reason.
    """
    for name, (values, reason) in _SUPPORTED.items():
        if args.get(name, values[0]) not in values:
            raise errors.UserError(
                f"{where}: {name}={args[name]!r} is not supported: {reason}", page=_PAGE
            )
    width, heads = (_number(where, args, n) for n in ("hidden_size", "num_attention_heads"))
    sizes = {
        "ffn_hidden_size": (4 * width, "4 x hidden_size"),
        "kv_channels": (width // heads, "hidden_size / num_attention_heads"),
        "num_query_groups": (heads, "num_attention_heads"),
    }
    if not args.get("group_query_attention"):
        del sizes["num_query_groups"]  # Megatron ignores it then
    for name, (size, formula) in sizes.items():
        value = args.get(name)
        if value not in (None, size):
            raise errors.UserError(
                f"{where}: {name}={value} is not supported: in ours it is {formula}, {size}",
                page=_PAGE,
            )


def args_of(
    model: schema.Model, eod_id: int, tensor: int, pipeline: int, implementation: str
) -> Args:
    """Return the arguments that describe a model in a Megatron checkpoint.

    `tensor` and `pipeline` are its parallel sizes; `implementation` is `--transformer-impl`.
    """
    divisible = model.vocab_multiple % tensor == 0
    multiple = model.vocab_multiple if divisible else model.padded_vocab_size
    return {
        **{name: values[0] for name, (values, _) in _SUPPORTED.items()},
        **_size_args(model),
        "vocab_size": model.vocab_size,
        "padded_vocab_size": model.padded_vocab_size,
        "make_vocab_size_divisible_by": multiple // tensor,
        "null_tokenizer_eod_id": eod_id if eod_id < model.vocab_size else None,
        **_detail_args(model),
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "virtual_pipeline_model_parallel_size": None,
        "transformer_impl": implementation,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        "skipped_train_samples": 0,
    }


def _size_args(model: schema.Model) -> Args:
    return {
        "num_layers": model.n_layers,
        "hidden_size": model.d_model,
        "num_attention_heads": model.n_heads,
        "num_query_groups": model.n_heads,
        "ffn_hidden_size": model.d_ff,
        "kv_channels": model.d_head,
        "seq_length": model.seq_len,
        "max_position_embeddings": model.seq_len,
    }


def _detail_args(model: schema.Model) -> Args:
    banded = model.attention.pattern == "alternating"
    return {
        "add_position_embedding": True,
        "add_qkv_bias": True,
        "bias_gelu_fusion": model.gelu == "tanh",
        "openai_gelu": False,
        "layernorm_epsilon": model.norm_eps,
        "init_method_std": model.init_std,
        "hidden_dropout": model.dropout,
        "attention_dropout": model.attention_dropout,
        "window_size": (model.attention.band, 0) if banded else None,
        "window_attn_skip_freq": 2 if banded else None,
    }


def _attention(where: str, args: Args) -> schema.Attention:
    window, layers = args.get("window_size"), args.get("window_attn_skip_freq")
    if window is None:
        return schema.Attention()
    n = args["num_layers"]
    every_other = [int(i % 2 == 0) for i in range(n)]  # layers 1, 3, 5, ..., counted from 1
    banded = layers if isinstance(layers, int) or layers is None else list(layers)
    if tuple(window)[1:] != (0,) or window[0] < 0 or banded not in (2, every_other):
        raise errors.UserError(
            f"{where}: window_size={window!r} with window_attn_skip_freq={layers!r} is not "
            "supported: ours can have bands of (N, 0) in every other layer from the first on (2)",
            page=_PAGE,
        )
    return schema.Attention(pattern="alternating", band=window[0])


def _number(where: str, args: Args, name: str) -> int:
    value = args.get(name, _ABSENT)
    if not isinstance(value, int) or value < 1:
        problem = "is missing" if value is _ABSENT else f"is {value!r}"
        raise errors.UserError(
            f"{where}: {name} {problem} in its arguments: is it a GPT checkpoint?", page=_PAGE
        )
    return value


def _tokenizer_size(args: Args, padded: int) -> int:
    return 50_257 if args.get("tokenizer_type") == "GPT2BPETokenizer" else padded


def _eod_id(args: Args, vocab_size: int) -> int:
    """Return the end-of-document token; vocab_size, which is not a token, if it is not stated."""
    eod: int | None = args.get("null_tokenizer_eod_id")
    if eod is not None:
        return eod
    is_last = args.get("tokenizer_type") in ("GPT2BPETokenizer", "NullTokenizer")
    return vocab_size - 1 if is_last else vocab_size


def _vocab_multiple(args: Args, vocab_size: int, padded: int) -> int:
    multiple: int = args.get("make_vocab_size_divisible_by") or 128
    multiple *= args.get("tensor_model_parallel_size") or 1
    fits = -(-vocab_size // multiple) * multiple == padded
    return multiple if fits else padded
