"""Logits and gradients of Megatron-Core and Hugging Face, in each format (tests/golden)."""

import dataclasses

import jax
import numpy as np

from gpt3jax.config import schema
from gpt3jax.distributed import joining
from gpt3jax.model import attention, gpt

import numpy_gpt
import tiny

MEGATRON = schema.Model(
    n_layers=3, d_model=64, n_heads=4, seq_len=32, vocab_size=251, mask_padded_vocab=False,
    dropout=0.0, attention_dropout=0.0, remat="none", n_loss_chunks=1,
)  # fmt: skip
HUGGING_FACE = dataclasses.replace(MEGATRON, vocab_size=257, seq_len=64, mask_padded_vocab=True)
BANDED = schema.Attention(pattern="alternating", band=8)
MODELS = {
    "tanh": MEGATRON,
    "erf": dataclasses.replace(MEGATRON, gelu="erf"),
    "reset": MEGATRON,
    "window": dataclasses.replace(MEGATRON, attention=BANDED),
    "hf": HUGGING_FACE,
}
# Name: format, precision of products, limit of the relative errors. TF32 rounds as float16 does.
# On a CPU the largest are 4e-6 in float32, 0.008 in float16 and 0.08 in bfloat16.
FORMATS = {
    "float32 highest": ("float32", "highest", 1e-5),
    "float32 (TF32)": ("float32", "default", 0.02),
    "float16": ("float16", "default", 0.02),
    "bfloat16": ("bfloat16", "default", 0.2),
}
TINY = {"float32 highest": "hf", "float32 (TF32)": "erf", "float16": "reset", "bfloat16": "window"}


def compare(task):
    """Yield, for each format and network, the largest relative error of logits and gradients."""
    joining.start(schema.Distributed(), schema.Mesh(cpu_devices=1 if task.tiny else 0))
    for name, (dtype, precision, limit) in FORMATS.items():
        for variant in [TINY[name]] if task.tiny else MODELS:
            with jax.default_matmul_precision(precision):
                yield {f"{variant} {name}": {**errors_of(variant, dtype), "limit": limit}}


def errors_of(variant, dtype):
    """Return the largest relative error of an array, which array that is, and the attention."""
    model = MODELS[variant]
    weights, inputs, expected = (
        numpy_gpt.load_hf(model.padded_vocab_size)
        if variant == "hf"
        else numpy_gpt.load_megatron(variant)
    )
    implementation = attention.choose(model, dtype, jax.default_backend(), 1)
    compute = gpt.Compute(dtype=dtype, attention=implementation)
    logits, loss, grads = tiny.network(tiny.params_from_numpy(weights, model), inputs, compute)
    n = expected["logits_BTV"].shape[-1]
    errors = numpy_gpt.relative_errors(
        {"logits": np.asarray(logits, np.float64)[..., :n], "loss": loss},
        {"logits": expected["logits_BTV"], "loss": expected["loss"]},
    )
    errors |= numpy_gpt.relative_errors(tiny.to_numpy_names(grads), expected["grads"])
    worst = max(errors, key=errors.get)
    return {"error": errors[worst], "in": worst, "attention": implementation}
