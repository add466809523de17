"""Which implementation of attention a model gets, and what its user is told."""

import dataclasses

import pytest

from gpt3jax import errors
from gpt3jax.config import schema
from gpt3jax.model import attention, triton_attention

PLAIN = schema.Model(
    n_layers=2, d_model=128, n_heads=2, seq_len=128, dropout=0.0, attention_dropout=0.0
)
DROPS = dataclasses.replace(PLAIN, attention_dropout=0.1)
SMALL_HEADS = dataclasses.replace(DROPS, n_heads=16)
ODD_LENGTH = dataclasses.replace(DROPS, seq_len=120)


@pytest.fixture(params=[True, False], ids=["with the extra", "without it"])
def has_extra(request, monkeypatch):
    line = "" if request.param else "it needs the extra triton: pip install 'gpt3jax[triton]'"
    monkeypatch.setattr(triton_attention, "missing", lambda: line)
    return request.param


@pytest.mark.parametrize(
    ("model", "dtype", "platform", "n_shards", "chosen"),
    [
        (PLAIN, "bfloat16", "gpu", 1, "cudnn"),
        (PLAIN, "float16", "gpu", 4, "cudnn"),
        (PLAIN, "bfloat16", "cpu", 1, "xla"),
        (PLAIN, "float32", "gpu", 1, "xla"),
        (DROPS, "bfloat16", "gpu", 1, "triton"),
        (DROPS, "float16", "gpu", 4, "triton"),
        (DROPS, "float16", "gpu", 8, "xla"),  # 16 chunks of 8 positions
        (DROPS, "bfloat16", "cpu", 1, "xla"),
        (DROPS, "float32", "gpu", 1, "xla"),
        (SMALL_HEADS, "bfloat16", "gpu", 1, "xla"),
        (ODD_LENGTH, "bfloat16", "gpu", 1, "xla"),
    ],
)
def test_auto_is_the_fastest_that_serves(model, dtype, platform, n_shards, chosen, has_extra):
    serves = has_extra or chosen != "triton"
    expected = chosen if serves else "xla"
    assert attention.choose(model, dtype, platform, n_shards) == expected
    line = attention.missing_extra(model, dtype, platform, n_shards)
    assert bool(line) == (not serves)
    assert serves or "pip install 'gpt3jax[triton]'" in line


@pytest.mark.parametrize(
    ("name", "model", "dtype", "platform", "n_shards", "reason"),
    [
        ("cudnn", PLAIN, "bfloat16", "cpu", 1, "the devices are no GPUs, but cpu"),
        ("cudnn", DROPS, "bfloat16", "gpu", 1, "masks would depend on the mesh"),
        ("cudnn", PLAIN, "float32", "gpu", 1, "not in float32"),
        ("cudnn", dataclasses.replace(PLAIN, d_model=120), "bfloat16", "gpu", 1, "d_head=60 must"),
        ("triton", DROPS, "bfloat16", "cpu", 1, "the devices are no GPUs, but cpu"),
        ("triton", DROPS, "float32", "gpu", 1, "not in float32"),
        ("triton", SMALL_HEADS, "bfloat16", "gpu", 1, "d_head=8 must be a multiple of 8 from 16"),
        ("triton", ODD_LENGTH, "bfloat16", "gpu", 1, "120 consecutive positions on a GPU must be"),
        ("triton", DROPS, "bfloat16", "gpu", 8, "8 consecutive positions on a GPU must be"),
    ],
)
def test_what_is_asked_for_and_does_not_serve_is_an_error(
    name, model, dtype, platform, n_shards, reason, has_extra
):
    asked = dataclasses.replace(model, attention=schema.Attention(implementation=name))
    with pytest.raises(
        errors.UserError, match=f"implementation={name} does not serve here: .*{reason}.*use auto"
    ):
        attention.choose(asked, dtype, platform, n_shards)


def test_what_is_asked_for_without_its_extra_is_an_error(monkeypatch):
    asked = dataclasses.replace(DROPS, attention=schema.Attention(implementation="triton"))
    monkeypatch.setattr(triton_attention.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(errors.UserError, match=r"does not serve here: .*pip install 'gpt3jax\["):
        attention.choose(asked, "bfloat16", "gpu", 1)
