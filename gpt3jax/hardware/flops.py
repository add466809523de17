"""Closed forms: parameters of a model, its training FLOPs per token, and peak FLOP/s of GPUs.

Imports no JAX, so a plan can be made anywhere. A multiplication and its addition count as 2 FLOPs.
"""

import re

from gpt3jax import errors
from gpt3jax.config import schema

# Dense peaks in TFLOP/s by a pattern of JAX's device_kind: 16-bit tensor cores, TF32 tensor cores.
# For the H100 and later GPUs, NVIDIA's data sheets give peaks with 2:4 sparsity: twice these. The
# peak of 8 bits (FP8) is twice that of 16 bits; A100s have no such products.
_PEAK_TFLOPS = {
    r"\bA100\b": (312.0, 156.0),  # A100 data sheet, SXM and PCIe
    r"\bH100 NVL\b": (835.5, 417.7),  # H100 data sheet: 1,671 / 2 and 835.5 / 2
    r"\bH100 PCIe\b": (756.0, 378.0),  # H100 architecture white paper, table 2
    r"\bH100\b.*\b(HBM3|SXM\d?)\b": (989.4, 494.7),  # the same table
    r"\bH200 NVL\b": (835.5, 417.7),  # H200 data sheet
    r"\bH200\b": (989.4, 494.7),  # H200 data sheet: the SXM5 H100's cores, more memory
    r"\bB200\b": (2250.0, 1125.0),  # HGX B200: 36 and 18 PFLOP/s sparse over 8 GPUs
    r"\bGB200\b": (2500.0, 1250.0),  # GB200 NVL72: 360 and 180 PFLOP/s sparse over 72 GPUs
}


def n_params(model: schema.Model) -> int:
    """Return the number of trained values, with the padded vocabulary; the head is tied."""
    return sum(param_counts(model).values())


def param_counts(model: schema.Model) -> dict[str, int]:
    """Return the number of parameters of each part, over all layers, biases included."""
    layers, d, f = model.n_layers, model.d_model, model.d_ff
    return {
        "embedding": model.padded_vocab_size * d,
        "positions": model.seq_len * d,
        "attention": layers * (4 * d * d + 4 * d),  # QKV and the projection
        "mlp": layers * (2 * d * f + f + d),
        "norms": layers * 4 * d + 2 * d,  # scale and bias: two in a layer, one at the end
    }


def flops_per_token(model: schema.Model) -> float:
    """Return the FLOPs of training on one token: forward and backward, nothing recomputed.

    Megatron-LM's formula (`num_floating_point_operations` in megatron/training/training.py, after
    Narayanan et al. 2021, appendix), with half of the attention matrix counted, as it is causal:

        6 (L (4 D^2 + 2 D F) + D V) + 12 D (sum over layers of the mean number of positions seen)

    6 is 2 FLOPs x (1 forward + 2 backward); V is padded; 12 is 6 for scores and 6 for values. A
    token of a dense layer sees T/2 positions in the mean. A banded layer counts only the positions
    in its band, w - w^2/(2T), not those that a dense layer would compute; w >= T gives T/2 again.
    LayerNorm, GELU, softmax, dropout, biases and the optimizer are left out, as in Megatron.
    """
    layers, d, f = model.n_layers, model.d_model, model.d_ff
    products = layers * (4 * d * d + 2 * d * f) + d * model.padded_vocab_size
    # Layers 1, 3, 5, ... are banded: the larger half.
    n_banded = (layers + 1) // 2 if model.attention.pattern == "alternating" else 0
    band = min(model.attention.band, model.seq_len)
    seen = (layers - n_banded) * model.seq_len / 2
    seen += n_banded * (band - band**2 / (2 * model.seq_len))
    return 6.0 * products + 12.0 * d * seen


def product_dtype(precision: schema.Precision) -> str:
    """Return the format of the layers' products: float8, or `precision.compute_dtype`."""
    is_float8 = precision.matmul_dtype == "float8"
    return "float8" if is_float8 else precision.compute_dtype


def check_product_dtype(
    precision: schema.Precision, name: str, capability: tuple[int, int] | None
) -> None:
    """Check that a GPU of this name and compute capability has the layers' products; None: no GPU.

    Raises:
        UserError: they are in 8 bits, and it has none.
    """
    if product_dtype(precision) == "float8" and capability and capability < (8, 9):
        raise errors.UserError(
            f"precision.matmul_dtype=float8 needs GPUs from Hopper or Ada on, not {name}: use "
            "compute_dtype",
            page="training.md#8-bit-products",
        )


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Return the dense peak FLOP/s of a device by JAX's `device_kind`, None where unknown.

    float32 means TF32 tensor cores: JAX's default precision of fp32 products on these GPUs. A MIG
    slice is unknown because it is a part of a GPU.

    Raises:
        ValueError: no product has this format.
    """
    if dtype not in ("bfloat16", "float16", "float32", "float8"):
        raise ValueError(f"dtype={dtype!r}: use bfloat16, float16, float32 or float8")
    if re.search(r"\bMIG\b", device_kind) or (dtype == "float8" and "A100" in device_kind):
        return None
    for pattern, (half, tf32) in _PEAK_TFLOPS.items():
        if re.search(pattern, device_kind):
            return 1e12 * {"float8": 2 * half, "float32": tf32}.get(dtype, half)
    return None
