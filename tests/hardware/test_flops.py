"""Closed forms against the real network's shapes, hand arithmetic and the data sheets."""

import pytest

from gpt3jax.config import schema
from gpt3jax.hardware import flops
from gpt3jax.model import gpt as network

import tiny


def gpt(n_layers, d_model, n_heads, seq_len, **fields):
    return schema.Model(
        n_layers=n_layers, d_model=d_model, n_heads=n_heads, seq_len=seq_len, **fields
    )


SIZES = {
    "64.1M": gpt(12, 512, 8, 1024),
    "355.9M": gpt(24, 1024, 16, 2048),
    "174.6B": gpt(96, 12_288, 96, 2048),
}


@pytest.mark.parametrize("size", SIZES)
def test_counts_are_those_of_the_papers_sizes(size):
    n = flops.n_params(SIZES[size])
    assert size == (f"{n / 1e9:.1f}B" if n > 1e9 else f"{n / 1e6:.1f}M")


@pytest.mark.parametrize("model", [SIZES["174.6B"], gpt(3, 24, 2, 7, vocab_size=50)])
def test_count_is_the_networks_own(model):
    assert flops.n_params(model) == tiny.count_params(model)


def test_counts_of_parts_follow_from_the_layers_shapes():
    # 2 layers of width 4, 3 positions, 5 tokens padded to 8.
    model = gpt(2, 4, 1, 3, vocab_size=5, vocab_multiple=8)
    assert flops.param_counts(model) == {
        "embedding": 8 * 4,
        "positions": 3 * 4,
        "attention": 2 * ((4 * 12 + 12) + (4 * 4 + 4)),
        "mlp": 2 * ((4 * 16 + 16) + (16 * 4 + 4)),
        "norms": 2 * (4 + 4 + 4 + 4) + (4 + 4),
    }


def test_flops_of_175b_are_megatrons_by_hand():
    products = 6 * 96 * 12 * 12_288**2  # 6 L (4 D^2 + 2 D 4D)        = 1,043,677,052,928
    head = 6 * 12_288 * 50_304  # 6 D V, 50,257 padded to 50,304      =     3,708,813,312
    attention = 6 * 96 * 12_288 * 2048  # 6 L D T, the causal half    =    14,495,514,624
    by_hand = 1_043_677_052_928 + 3_708_813_312 + 14_495_514_624
    assert products + head + attention == by_hand
    assert flops.flops_per_token(SIZES["174.6B"]) == by_hand


def test_flops_are_six_per_matrix_parameter_where_context_is_negligible():
    model = gpt(24, 1024, 16, 1)
    parts = flops.param_counts(model)
    matrices = parts["embedding"] + parts["attention"] + parts["mlp"]
    assert flops.flops_per_token(model) == pytest.approx(6 * matrices, rel=2e-3)


def test_banded_layers_count_what_their_band_holds():
    def seen(n_layers, pattern, band):
        attention = schema.Attention(pattern=pattern, band=band)
        model = gpt(n_layers, 8, 1, 512, attention=attention)
        products = 6 * (n_layers * 12 * 8**2 + 8 * model.padded_vocab_size)
        return (flops.flops_per_token(model) - products) / (12 * 8)

    # The mean of min(t, 32) over t in 0...512: 32 x 480/512 + 16 x 32/512 = 31.
    assert seen(1, "alternating", 32) == 31
    assert seen(3, "alternating", 32) == 31 + 256 + 31  # as in `model.layer_windows`
    assert network.layer_windows(
        gpt(3, 8, 1, 512, attention=schema.Attention(pattern="alternating", band=32))
    ) == (32, None)
    assert seen(3, "dense", 32) == 3 * 256
    assert seen(3, "alternating", 512) == seen(3, "alternating", 9999) == 3 * 256


@pytest.mark.parametrize(
    ("kind", "half", "tf32"),
    [
        ("NVIDIA A100-SXM4-40GB", 312, 156),
        ("NVIDIA A100-SXM4-80GB", 312, 156),
        ("NVIDIA A100 80GB PCIe", 312, 156),
        ("NVIDIA A100-PCIE-40GB", 312, 156),
        ("NVIDIA H100 80GB HBM3", 989.4, 494.7),
        ("NVIDIA H100 PCIe", 756, 378),
        ("NVIDIA H100 NVL", 835.5, 417.7),
        ("NVIDIA H200", 989.4, 494.7),
        ("NVIDIA H200 NVL", 835.5, 417.7),
        ("NVIDIA B200", 2250, 1125),
        ("NVIDIA GB200", 2500, 1250),
    ],
)
def test_peaks_are_the_dense_ones_of_the_data_sheets(kind, half, tf32):
    assert flops.peak_flops(kind, "bfloat16") == pytest.approx(half * 1e12)
    assert flops.peak_flops(kind, "float16") == pytest.approx(half * 1e12)
    assert flops.peak_flops(kind, "float32") == pytest.approx(tf32 * 1e12)
    in_8_bits = None if "A100" in kind else pytest.approx(2 * half * 1e12)
    assert flops.peak_flops(kind, "float8") == in_8_bits


@pytest.mark.parametrize(
    "kind",
    [
        "cpu",
        "TPU v4",
        "NVIDIA A10",
        "NVIDIA A100X",
        "NVIDIA GH200 480GB",
        "NVIDIA H100",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
    ],
)
def test_no_peak_is_invented(kind):
    assert flops.peak_flops(kind, "bfloat16") is None


def test_unknown_dtype_is_an_error():
    with pytest.raises(ValueError, match="float4"):
        flops.peak_flops("NVIDIA H200", "float4")
