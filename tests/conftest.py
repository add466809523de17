"""Emulated CPU devices or real GPUs, JAX's compilation cache, and fixtures that tests share."""

import os
import signal
import sys

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the numpy GPT is slower with more

import pathlib

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import corpus

REPOSITORY = pathlib.Path(__file__).parents[1]

# Tests look at what is in a recipe's folder: neither Python nor a child may write its caches there.
sys.dont_write_bytecode = True
os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored, in children too
jax.config.update("jax_compilation_cache_dir", str(REPOSITORY / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def pytest_configure(config):
    """Choose the devices: the GPUs that are here with `pytest -m gpu`, else the emulated ones."""
    if config.option.markexpr == "gpu":
        return
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", corpus.XLA_FLAGS, prepend=" ")
        jax.devices()  # XLA reads its flags here, once


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request):
    """Run a test on the emulated devices, and with `pytest -m gpu` on a GPU."""
    if request.param == "gpu" and request.config.option.markexpr != "gpu":
        pytest.skip("needs a GPU: make test-gpu")
    assert jax.default_backend() == request.param
    return request.param


@pytest.fixture
def full_precision(device):
    """Multiply float32 as such: by themselves, GPUs would round the factors to TF32."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture
def repository() -> pathlib.Path:
    return REPOSITORY


@pytest.fixture
def no_compilation_cache():
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)


@pytest.fixture
def no_rematerialization(capfd, no_compilation_cache):
    """Fail a test in which XLA gathers an array whole to go from one layout to another.

    XLA warns of it while it compiles, hence no cache. A program that needs it comes first, to see
    that the warning would be seen.
    """
    warning = "Involuntary full rematerialization"
    mesh = jax.make_mesh((2, 2, 2), ("a", "b", "c"), axis_types=(AxisType.Auto,) * 3)
    here, there = (NamedSharding(mesh, P("a", "b")), NamedSharding(mesh, P(("c", "b", "a"))))
    move = jax.jit(lambda x: jnp.cos(jnp.sin(x)), in_shardings=here, out_shardings=there)
    move.lower(jnp.ones((16, 16))).compile()
    assert warning in capfd.readouterr().err
    yield
    assert warning not in capfd.readouterr().err
