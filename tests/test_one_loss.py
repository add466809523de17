"""One loss on every mesh: the promise, on 8 emulated devices against one."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from gpt3jax.model import loss

import one_device
import tiny

MESHES = {
    "data8": ({"data": 8}, 2),
    "fsdp8": ({"data": 1, "fsdp": 8}, 2),
    "tensor8": ({"data": 1, "tensor": 8}, 2),
    "data2-fsdp2-tensor2": ({"data": 2, "fsdp": 2, "tensor": 2}, 1),
}
N_STEPS = 20


def config_of(dropout, **mesh):
    rates = {"dropout": dropout, "attention_dropout": dropout}
    return tiny.make_config(model=rates, mesh=mesh)


@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.slower), 0.1])
@pytest.mark.parametrize("sequence_parallel", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(mesh, marks=() if mesh == "data2-fsdp2-tensor2" else pytest.mark.slower)
        for mesh in MESHES
    ],
)
def test_losses_do_not_depend_on_the_mesh(mesh, sequence_parallel, dropout):
    axes, n_microbatches = MESHES[mesh]
    if not sequence_parallel and "tensor" not in axes:
        pytest.skip("sequence parallelism needs a tensor axis")
    cfg = config_of(dropout, **axes, sequence_parallel=sequence_parallel)
    # Over many steps rounding errors grow: the first step is compared more closely.
    steps = one_device.Steps(N_STEPS)
    one_device.check(cfg, n_microbatches, steps, rtol_later=1e-4, weights=False)


INITIAL = """
import jax, numpy as np
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
import tiny
from gpt3jax import step
def initial(**axes):
    cfg = tiny.make_config(model={"n_layers": 8, "d_model": 32, "n_heads": 8}, mesh=axes)
    return tiny.leaves(step.build(cfg, tiny.make_mesh(**axes), 320).init().params)
alone = initial()
for name, array in initial(data=1, tensor=8).items():
    np.testing.assert_array_equal(array, alone[name], err_msg=name)
"""


@pytest.mark.slow
def test_initial_weights_are_the_same_bits_where_llvm_optimizes(repository):
    """As in a run; the tests' own process compiles without. On jaxlib 0.12 they were not."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    paths = os.pathsep.join(str(path) for path in (repository, repository / "tests"))
    done = subprocess.run(
        [sys.executable, "-c", INITIAL], env=environment | {"PYTHONPATH": paths},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "n_microbatches",
    [
        pytest.param(4, marks=pytest.mark.slow),
        *(pytest.param(n, marks=pytest.mark.slower) for n in (2, 16)),
    ],
)
def test_microbatches_add_up_to_one_batch(n_microbatches):
    cfg = config_of(0.1)
    _, state, metrics = tiny.run(cfg, tiny.make_mesh(), n_microbatches, 3)
    _, whole, expected = tiny.run(cfg, tiny.make_mesh(), 1, 3)
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], expected["grad_norm"], rtol=1e-5)
    for name, array in tiny.leaves(state.params).items():
        np.testing.assert_allclose(array, tiny.leaves(whole.params)[name], atol=2e-5, err_msg=name)


@pytest.mark.parametrize(
    "n_microbatches",
    [pytest.param(1, marks=pytest.mark.slower), pytest.param(4, marks=pytest.mark.slow)],
)
def test_masked_tokens_count_alike_on_every_mesh(n_microbatches):
    cfg = config_of(0.0, data=2, fsdp=2, tensor=2)
    one_device.check(cfg, n_microbatches, one_device.Steps(3, masked=True))


@pytest.mark.slow
@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_more_tokens_than_vocabulary_entries_train_alike(sequence_parallel):
    """The partitioners of jaxlib 0.11 and 0.12 abort on a lookup that is left to them here."""
    mesh = {"data": 2, "fsdp": 2, "tensor": 2, "sequence_parallel": sequence_parallel}
    cfg = tiny.make_config(model={"n_layers": 1, "vocab_size": 100}, mesh=mesh)
    tokens_of_a_replica = 16 // 2 // 2 * cfg.model.seq_len
    assert tokens_of_a_replica >= cfg.model.padded_vocab_size
    one_device.check(cfg, 2, one_device.Steps(2))


def test_the_mean_of_microbatch_means_is_megatrons():
    """By hand: groups of microbatch_size sequences, each a mean, then the mean of the means."""
    mask = np.random.default_rng(0).random((2, 4, 8)) < 0.5
    losses = np.random.default_rng(1).random((2, 4, 8))
    groups = [(m, slice(r, r + 2)) for m in range(2) for r in (0, 2)]
    expected = np.mean([(losses[g] * mask[g]).sum() / mask[g].sum() for g in groups])
    weights = np.asarray(loss.token_weights(jax.numpy.asarray(mask), "microbatches", 2))
    np.testing.assert_allclose((weights * losses).sum(), expected, rtol=1e-6)
    assert not np.isclose((losses * mask).sum() / mask.sum(), expected, rtol=1e-4)


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(mesh, marks=() if mesh == "data2-fsdp2-tensor2" else pytest.mark.slower)
        for mesh in MESHES
    ],
)
@pytest.mark.usefixtures("no_rematerialization")
def test_no_mesh_causes_an_involuntary_full_rematerialization(mesh):
    axes, n_microbatches = MESHES[mesh]
    cfg = config_of(0.1, **axes)
    tiny.run(cfg, tiny.make_mesh(**axes), n_microbatches, 1)
