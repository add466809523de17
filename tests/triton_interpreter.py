"""Runs the Triton kernels on the CPU, in Triton's interpreter, in place of jax-triton's call."""

import functools
import os
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt3jax.model import triton_attention

_LOCK = threading.Lock()  # the interpreter's state is global, and devices call from many threads
_NAMES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "int32": "i32", "uint32": "u32"}


class _Pointer:
    """A NumPy array, as much like a torch tensor as the interpreter needs."""

    def __init__(self, array):
        self.array, self.dtype = array, _NAMES[str(array.dtype)]

    def data_ptr(self):
        return self.array.ctypes.data

    def _self(self, *_, **__):
        return self

    untyped_storage = cpu = new_empty = storage_offset = size = stride = set_ = copy_ = _self


@functools.cache
def kernels():
    """Return the module of the kernels, interpreted; skip the test where Triton is missing."""
    if triton_attention.missing():
        pytest.skip("needs the extra triton")
    assert "triton" not in sys.modules, "Triton was imported to compile, not to interpret"
    # Read while Triton and the kernels are imported. Processes that tests start must not see it.
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        import triton
        from triton.runtime import interpreter

        from gpt3jax.model import triton_kernels
    finally:
        del os.environ["TRITON_INTERPRET"]
    triton.knobs.propagate_env = False
    triton.knobs.runtime.interpret = True
    _add_bfloat16(interpreter, triton.language.bfloat16)
    return triton_kernels


def _add_bfloat16(interpreter, bfloat16):
    """Multiply and round bfloat16 as GPUs do: the interpreter multiplies bits, and truncates."""
    builder = interpreter.InterpreterBuilder
    dot, cast = builder.create_dot, builder.cast_impl

    def widened(handle):
        if handle.dtype.scalar != bfloat16:
            return handle
        data = handle.data.view(jnp.bfloat16).astype(np.float32)
        return interpreter.TensorHandle(data, interpreter.tl.float32)

    def create_dot(self, a, b, *others):
        return dot(self, widened(a), widened(b), *others)

    def cast_impl(self, source, target):
        if target.scalar == bfloat16 and source.dtype.scalar == interpreter.tl.float32:
            data = source.data.astype(jnp.bfloat16).view(np.uint16)
            return interpreter.TensorHandle(data, bfloat16)
        return cast(self, source, target)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl


def run(kernel, arrays, outputs, grid, constants):
    """Run a kernel on NumPy arrays; it writes the outputs."""
    pointers = [_Pointer(array) for array in (*arrays, *outputs)]
    with _LOCK, np.errstate(all="ignore"):
        kernel[grid](*pointers, **constants)


def call(kernel, arrays, out_shapes, grid, tile, constants):
    """Do what `triton_attention._call` does."""

    def on_host(*arrays):
        outputs = [np.full(x.shape, 77, x.dtype) for x in out_shapes]  # not what any memory holds
        arrays = [np.ascontiguousarray(x) for x in arrays]
        run(getattr(kernels(), kernel), arrays, outputs, grid, constants)
        return outputs

    return jax.pure_callback(on_host, out_shapes, *arrays)
