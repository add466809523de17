"""Megatron-Core's GPT: names, layouts and cuts of its tensors, and its arguments as our model.

It keeps linear weights as [out, in]; rows of the fused QKV weight go head by head (q, k and v of
head 0, q of head 1, ...). Facts are those of Megatron-LM at commit d98e8a64dd.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from gpt3jax import errors
from gpt3jax.config import schema

# Our parameter: Megatron's name of it (`--transformer-impl local`), in layer {} where it has one.
NAMES = {
    "embedding_VD": "embedding.word_embeddings.weight",
    "positions_TD": "embedding.position_embeddings.weight",
    "blocks/norm_1/scale_D": "decoder.layers.{}.input_layernorm.weight",
    "blocks/norm_1/bias_D": "decoder.layers.{}.input_layernorm.bias",
    "blocks/attention/w_qkv_D3HK": "decoder.layers.{}.self_attention.linear_qkv.weight",
    "blocks/attention/b_qkv_3HK": "decoder.layers.{}.self_attention.linear_qkv.bias",
    "blocks/attention/w_out_HKD": "decoder.layers.{}.self_attention.linear_proj.weight",
    "blocks/attention/b_out_D": "decoder.layers.{}.self_attention.linear_proj.bias",
    "blocks/norm_2/scale_D": "decoder.layers.{}.pre_mlp_layernorm.weight",
    "blocks/norm_2/bias_D": "decoder.layers.{}.pre_mlp_layernorm.bias",
    "blocks/mlp/w_in_DF": "decoder.layers.{}.mlp.linear_fc1.weight",
    "blocks/mlp/b_in_F": "decoder.layers.{}.mlp.linear_fc1.bias",
    "blocks/mlp/w_down_FD": "decoder.layers.{}.mlp.linear_fc2.weight",
    "blocks/mlp/b_down_D": "decoder.layers.{}.mlp.linear_fc2.bias",
    "norm/scale_D": "decoder.final_layernorm.weight",
    "norm/bias_D": "decoder.final_layernorm.bias",
}
EMBEDDING = NAMES["embedding_VD"]
HEAD = "output_layer.weight"  # the embedding's copy on the last of several pipeline stages
EXTRA_STATE = "._extra_state"  # of fp8 layers; says nothing about weights
# Transformer Engine's fused layers keep the norm before them.
_TRANSFORMER_ENGINE = {
    ".input_layernorm.": ".self_attention.linear_qkv.layer_norm_",
    ".pre_mlp_layernorm.": ".mlp.linear_fc1.layer_norm_",
}
# The dimension of Megatron's tensor that tensor parallelism cuts; the rest is repeated.
_CUT = {
    "embedding_VD": 0,
    "blocks/attention/w_qkv_D3HK": 0,
    "blocks/attention/b_qkv_3HK": 0,
    "blocks/attention/w_out_HKD": 1,
    "blocks/mlp/w_in_DF": 0,
    "blocks/mlp/b_in_F": 0,
    "blocks/mlp/w_down_FD": 1,
}
# What another value of an argument means, and the values that GPT-3 has. Megatron's arguments
# come and go: one that is absent has the first value.
_NEEDED: dict[str, tuple[tuple[Any, ...], str]] = {
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
    """Return a tensor's name as without Transformer Engine, from either."""
    for local, fused in _TRANSFORMER_ENGINE.items():
        name = name.replace(fused, local)
    return name


def fused_name(name: str) -> str:
    """Return a tensor's name as with Transformer Engine, from `NAMES`."""
    for local, fused in _TRANSFORMER_ENGINE.items():
        name = name.replace(local, fused)
    return name


def extra_states(n_layers: int, has_head: bool, implementation: str) -> list[str]:
    """Return the names of entries without weights that a strict reader wants; they may be None."""
    parts = ["self_attention.linear_proj", "self_attention.linear_qkv"]
    parts += ["mlp.linear_fc1", "mlp.linear_fc2"]
    if implementation == "transformer_engine":
        parts.append("self_attention.core_attention")
    names = [f"decoder.layers.{i}.{part}" for i in range(n_layers) for part in parts]
    return [name + EXTRA_STATE for name in names + ["output_layer"] * has_head]


def cut_dim(name: str) -> int | None:
    """Return which dimension of the tensor of our parameter tensor parallelism cuts."""
    return _CUT.get(name)


def to_ours(name: str, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return our parameter, without its layers, from Megatron's tensor, as fp32.

    Raises:
        ValueError: it has not as many elements.
    """
    if "_qkv_" in name:
        _, h, k = shape[-3:]
        by_head = tensor.reshape(h, 3, k, *shape[:-3]).swapaxes(0, 1)
        tensor = np.moveaxis(by_head, -1, 0) if len(shape) == 4 else by_head
    elif "/w_" in name:
        tensor = tensor.T
    return np.ascontiguousarray(tensor.reshape(shape), np.float32)


def to_theirs(name: str, array: np.ndarray) -> np.ndarray:
    """Return Megatron's tensor from our parameter without its layers."""
    if "_qkv_" in name:
        by_head = np.moveaxis(array, 0, -1) if array.ndim == 4 else array
        by_head = by_head.swapaxes(0, 1)
        return np.ascontiguousarray(by_head.reshape(-1, *by_head.shape[3:]))
    if "/w_" in name:
        return np.ascontiguousarray(array.reshape(theirs_shape(name, array.shape)[::-1]).T)
    return array


def theirs_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of Megatron's tensor from that of our parameter without its layers."""
    n = int(np.prod(shape))
    if "/w_" in name:
        n_in = n // shape[-1] if name.endswith("HKD") else shape[0]
        return (n // n_in, n_in)
    return (n,) if "_qkv_" in name else shape


def model_of(where: str, args: Mapping[str, Any], vocab_size: int) -> tuple[schema.Model, int]:
    """Return the model that a checkpoint's arguments describe, and its end-of-document token.

    The latter is vocab_size, which no token is, where arguments do not tell.

    `vocab_size` is the true one, for arguments that do not say it (0: what they say).

    Raises:
        UserError: our network cannot be this one; it names the argument and the reason.
    """
    check(where, args)
    padded = _number(where, args, "padded_vocab_size")
    vocab_size = vocab_size or args.get("vocab_size") or _tokenizers_size(args, padded)
    if not 0 < vocab_size <= padded:
        raise errors.UserError(
            f"{where}: a vocabulary of {vocab_size} does not fit padded_vocab_size={padded}: give "
            "the true one with --vocab-size"
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


def check(where: str, args: Mapping[str, Any]) -> None:
    """Check that our network can be the one that a checkpoint's arguments describe.

    Raises:
        UserError: it cannot; it names the argument and the reason.
    """
    for name, (values, reason) in _NEEDED.items():
        if args.get(name, values[0]) not in values:
            raise errors.UserError(f"{where}: {name}={args[name]!r} is not supported: {reason}")
    width, heads = (_number(where, args, n) for n in ("hidden_size", "num_attention_heads"))
    wanted = {
        "ffn_hidden_size": (4 * width, "4 x hidden_size"),
        "kv_channels": (width // heads, "hidden_size / num_attention_heads"),
        "num_query_groups": (heads, "num_attention_heads"),
    }
    if not args.get("group_query_attention"):
        del wanted["num_query_groups"]  # it means nothing then
    for name, (size, told) in wanted.items():
        given = args.get(name)
        if given not in (None, size):
            raise errors.UserError(
                f"{where}: {name}={given} is not supported: in ours it is {told}, {size}"
            )


def args_of(
    model: schema.Model, eod_id: int, tensor: int, pipeline: int, implementation: str
) -> dict[str, Any]:
    """Return the arguments that a Megatron checkpoint of a model has, as far as they describe it.

    `implementation` is that of `--transformer-impl`.
    """
    banded = model.attention.pattern == "alternating"
    divisible = model.vocab_multiple % tensor == 0
    multiple = model.vocab_multiple if divisible else model.padded_vocab_size
    return {name: values[0] for name, (values, _) in _NEEDED.items()} | {
        "num_layers": model.n_layers,
        "hidden_size": model.d_model,
        "num_attention_heads": model.n_heads,
        "num_query_groups": model.n_heads,
        "ffn_hidden_size": model.d_ff,
        "kv_channels": model.d_head,
        "seq_length": model.seq_len,
        "max_position_embeddings": model.seq_len,
        "vocab_size": model.vocab_size,
        "padded_vocab_size": model.padded_vocab_size,
        "make_vocab_size_divisible_by": multiple // tensor,
        "null_tokenizer_eod_id": eod_id if eod_id < model.vocab_size else None,
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
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "virtual_pipeline_model_parallel_size": None,
        "transformer_impl": implementation,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        "skipped_train_samples": 0,
    }


def _attention(where: str, args: Mapping[str, Any]) -> schema.Attention:
    window, layers = args.get("window_size"), args.get("window_attn_skip_freq")
    if window is None:
        return schema.Attention()
    n = args["num_layers"]
    every_other = [int(i % 2 == 0) for i in range(n)]  # layers 1, 3, 5, ... of Megatron's count
    listed = layers if isinstance(layers, int) or layers is None else list(layers)
    if tuple(window)[1:] != (0,) or window[0] < 0 or listed not in (2, every_other):
        raise errors.UserError(
            f"{where}: window_size={window!r} with window_attn_skip_freq={layers!r} is not "
            "supported: ours can be banded (N, 0) in every other layer, the first included (2)"
        )
    return schema.Attention(pattern="alternating", band=window[0])


def _number(where: str, args: Mapping[str, Any], name: str) -> int:
    value = args.get(name, _ABSENT)
    if not isinstance(value, int) or value < 1:
        told = "is missing" if value is _ABSENT else f"is {value!r}"
        raise errors.UserError(f"{where}: {name} {told} in its arguments: is it a GPT checkpoint?")
    return value


def _tokenizers_size(args: Mapping[str, Any], padded: int) -> int:
    return 50_257 if args.get("tokenizer_type") == "GPT2BPETokenizer" else padded


def _eod_id(args: Mapping[str, Any], vocab_size: int) -> int:
    """Return the end-of-document token; vocab_size, which none is, where arguments do not tell."""
    eod = args.get("null_tokenizer_eod_id")
    if eod is not None:
        return eod
    ends_with_it = args.get("tokenizer_type") in ("GPT2BPETokenizer", "NullTokenizer")
    return vocab_size - 1 if ends_with_it else vocab_size


def _vocab_multiple(args: Mapping[str, Any], vocab_size: int, padded: int) -> int:
    multiple: int = args.get("make_vocab_size_divisible_by") or 128
    multiple *= args.get("tensor_model_parallel_size") or 1
    fits = -(-vocab_size // multiple) * multiple == padded
    return multiple if fits else padded
