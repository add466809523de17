"""Training steps whose attention is our kernels, in Triton's interpreter."""

import dataclasses

import numpy as np
import pytest

from gpt3jax import step
from gpt3jax.model import triton_attention

import one_device
import tiny
import triton_interpreter


@pytest.fixture(autouse=True)
def as_on_gpus(monkeypatch):
    triton_interpreter.kernels()
    monkeypatch.setattr(triton_attention, "_call", triton_interpreter.call)
    monkeypatch.setattr(step, "platform", lambda mesh: "gpu")


def config_of(implementation, remat="mlp", **mesh):
    return tiny.make_config(
        model={
            "n_layers": 2, "n_heads": 4, "dropout": 0.1, "attention_dropout": 0.1, "remat": remat,
            "attention": dataclasses.replace(
                tiny.make_config().model.attention, implementation=implementation
            ),
        },
        precision={"compute_dtype": "bfloat16"},
        mesh=mesh,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("remat", "mesh"),
    [
        ("mlp", {"data": 1, "fsdp": 2, "context": 1, "tensor": 4}),
        pytest.param(
            "full", {"data": 2, "stage": 2, "fsdp": 1, "tensor": 2}, marks=pytest.mark.slower
        ),
    ],
)
def test_losses_do_not_depend_on_the_mesh(remat, mesh):
    cfg = config_of("auto", remat, **mesh)
    assert step.choose_compute(cfg, tiny.make_mesh(**mesh)).attention == "triton"
    one_device.check(cfg, 2, one_device.Steps(2), rtol=2e-3, weights=False)


@pytest.mark.slow
def test_losses_are_those_of_xlas_attention():
    """The same masks: with others the first loss would differ by more than a hundredth."""
    ours, xlas = (
        one_device.train(config_of(name), tiny.make_mesh(), 1, one_device.Steps(2)).metrics["loss"]
        for name in ("triton", "xla")
    )
    np.testing.assert_allclose(ours, xlas, rtol=1e-3)
