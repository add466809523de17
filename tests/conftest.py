"""8 emulated CPU devices, JAX's compilation cache, and fixtures that many tests share."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the numpy GPT is slower with more

import pathlib

import jax
import pytest

REPOSITORY = pathlib.Path(__file__).parents[1]

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", str(REPOSITORY / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
with pytest.MonkeyPatch.context() as patch:
    # Most of the tests' time is compiling, half of it in LLVM's optimizations, which no test is
    # about. XLA reads its flags once, at the first look at devices: processes that tests start
    # do not get this one.
    patch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0", prepend=" ")
    jax.devices()


@pytest.fixture
def repository() -> pathlib.Path:
    return REPOSITORY


@pytest.fixture
def no_compilation_cache():
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)
