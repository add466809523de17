"""The sequence split over `context`: the same losses, gradients and weights as on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt3jax import errors, step
from gpt3jax.config import schema
from gpt3jax.model import attention, cudnn_attention, dropout
from gpt3jax.sharding import meshes, sequence

import one_device
import plain_kernels
import tiny

MESHES = {
    "context8": ({"data": 1, "context": 8}, 2),
    "context2-data2-tensor2": ({"data": 2, "context": 2, "tensor": 2}, 2),
    "context2-fsdp4": ({"data": 1, "context": 2, "fsdp": 4}, 1),
    "context4-fsdp2": ({"data": 1, "context": 4, "fsdp": 2}, 2),
}
MODELS = {
    "dense": {"attention": schema.Attention()},
    "alternating": {"attention": schema.Attention(pattern="alternating", band=5)},
}
N_STEPS = 5
N = 32  # positions, where attention is tested alone
slow = pytest.mark.slower


def config_of(model, **mesh):
    return tiny.make_config(model={"n_layers": 2, "n_loss_chunks": 2, **MODELS[model]}, mesh=mesh)


@pytest.mark.parametrize(
    ("mesh", "model", "documents"),
    [
        pytest.param("context8", "dense", True, marks=slow),
        pytest.param("context2-data2-tensor2", "alternating", False, marks=slow),
        pytest.param("context8", "alternating", False, marks=slow),
        pytest.param("context2-data2-tensor2", "dense", True, marks=slow),
        pytest.param("context2-fsdp4", "dense", True, marks=slow),
        pytest.param("context2-fsdp4", "alternating", True, marks=slow),
        pytest.param("context4-fsdp2", "dense", False, marks=slow),
        pytest.param("context4-fsdp2", "alternating", True, marks=slow),
    ],
)
def test_losses_and_weights_do_not_depend_on_the_split(mesh, model, documents):
    """Five steps with all dropouts; an evaluation comes last."""
    axes, n_microbatches = MESHES[mesh]
    steps = one_device.Steps(N_STEPS, documents=documents, evaluate=True)
    one_device.check(config_of(model, **axes), n_microbatches, steps)


def attend(axes, implementation="xla", dropout_rate=0.0, documents=False, window=None):
    """Return attention's output and the gradients of q, k and v, all in true order."""
    rng = np.random.default_rng(0)
    q, k, v, weights = rng.standard_normal((4, 2, N, 2, 8)).astype(np.float32)
    segments = np.cumsum(rng.random((2, N)) < 0.2, axis=1) if documents else None
    noise = dropout.Noise(jax.random.key(0), jnp.arange(2))
    with jax.set_mesh(tiny.make_mesh(**axes)):
        order = np.asarray(sequence.sequence_order(N))

        def weighted(q, k, v):
            options = attention.Options(
                implementation=implementation, window=window, dropout_rate=dropout_rate,
                gather_again=documents,
            )  # fmt: skip
            segments_BT = segments[:, order] if documents else None
            out = attention.attend(
                q, k, v, options=options, segments_BT=segments_BT, noise=noise
            )  # fmt: skip
            return (out * weights[:, order]).sum(), out

        gradients = jax.jit(jax.grad(weighted, argnums=(0, 1, 2), has_aux=True))
        grads, out = gradients(*(x[:, order] for x in (q, k, v)))
    assert sorted(order) == list(range(N))
    return [np.asarray(x)[:, np.argsort(order)] for x in (out, *grads)]


def assert_equal(split, whole):
    for name, a, b in zip(("out", "dq", "dk", "dv"), split, whole, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("window", "documents"), [(None, True), pytest.param(5, False, marks=slow), (20, True)]
)
def test_chunks_of_several_blocks_attend_as_one_device(monkeypatch, window, documents):
    case = {"dropout_rate": 0.2, "documents": documents, "window": window}
    whole = attend({}, **case)
    monkeypatch.setattr(attention, "QUERY_BLOCK", 5)
    assert_equal(attend({"data": 1, "context": 2, "tensor": 2, "fsdp": 2}, **case), whole)


@pytest.mark.parametrize("context", [2, 4])
@pytest.mark.parametrize("documents", [False, True])
def test_three_kernels_a_shard_attend_as_one_device(monkeypatch, context, documents):
    """The cuDNN path, with plain kernels in place of cuDNN's."""
    monkeypatch.setattr(cudnn_attention, "forward_kernel", plain_kernels.forward)
    monkeypatch.setattr(cudnn_attention, "backward_kernel", plain_kernels.backward)
    axes = {"data": 1, "fsdp": 2, "context": context, "tensor": 4 // context}
    assert_equal(attend(axes, "cudnn", documents=documents), attend({}, documents=documents))


@pytest.mark.parametrize("leading", [(), (3,)])
@pytest.mark.parametrize("documents", [False, True])
def test_cudnns_kernels_take_and_return_what_is_expected(monkeypatch, leading, documents):
    """Their module is private to JAX: this fails when it changes. Lowering needs no GPU."""
    monkeypatch.setattr(cudnn_attention.cudnn, "check_cudnn_version", lambda: 91300)
    monkeypatch.setattr(cudnn_attention.cudnn, "check_compute_capability", lambda _: True)
    q, k = (jnp.zeros((*leading, 2, n, 4, 64), jnp.bfloat16) for n in (16, 32))
    segments = [jnp.zeros((*leading, 2, n), jnp.int32) if documents else None for n in (16, 32)]

    def both():
        part = (q, k, k, *segments)
        out, sums = cudnn_attention.forward_kernel(part, causal=False)
        return out, sums, cudnn_attention.backward_kernel(part, sums, out, out, causal=False)

    lowered = jax.jit(both).trace().lower(lowering_platforms=("cuda",))
    out, sums, gradients = lowered.out_info
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    assert (sums.shape, sums.dtype) == ((*leading, 2, 4, 16), jnp.float32)
    assert [g.shape for g in gradients] == [q.shape, k.shape, k.shape]
    bias = "ScaleBias" if documents else ""
    for target in (f"__cudnn$fmha{bias}Softmax", f"__cudnn$fmha{bias}SoftmaxBackward"):
        assert f"@{target}(" in lowered.as_text()


def test_each_shard_has_an_early_and_a_late_chunk():
    with jax.set_mesh(tiny.make_mesh(data=1, context=4, tensor=2)):
        order = np.asarray(sequence.sequence_order(16)).reshape(4, 4)
    np.testing.assert_array_equal(order[1], [2, 3, 12, 13])
    assert len(set(order.sum(axis=1))) == 1, "a causal mask gives the shards unequal work"


def test_minus_one_on_context_is_checked_once_the_devices_are_known():
    cfg = tiny.make_config(model={"seq_len": 24}, mesh={"data": 1, "context": -1})
    with pytest.raises(errors.UserError, match=r"model.seq_len=24 must be a multiple of 16 for"):
        step.build(cfg, meshes.make_mesh(cfg.mesh), 320)


@slow
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.usefixtures("no_rematerialization")
def test_no_split_causes_an_involuntary_full_rematerialization(mesh):
    axes, n_microbatches = MESHES[mesh]
    cfg = config_of("alternating", **axes)
    tiny.run(cfg, tiny.make_mesh(**axes), n_microbatches, 1)
