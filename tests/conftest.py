"""8 emulated CPU devices, JAX's compilation cache, and fixtures that many tests share."""

import os
import signal

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the numpy GPT is slower with more

import pathlib

import jax
import pytest

import corpus

REPOSITORY = pathlib.Path(__file__).parents[1]

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored, in children too
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", str(REPOSITORY / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
with pytest.MonkeyPatch.context() as patch:
    patch.setenv("XLA_FLAGS", corpus.XLA_FLAGS, prepend=" ")
    jax.devices()  # XLA reads its flags here, once


@pytest.fixture
def repository() -> pathlib.Path:
    return REPOSITORY


@pytest.fixture
def no_compilation_cache():
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)
