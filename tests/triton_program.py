"""Compiles attention by our kernels for a GPU that is not here, and writes the program out.

`python triton_program.py GPU DTYPE D_HEAD [split]`. Where it is split, it is over `context`, with
documents and a window. A process of its own: in others the kernels are interpreted.
"""

import sys

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from gpt3jax.hardware import gpus
from gpt3jax.model import attention, dropout, triton_attention
from gpt3jax.plan import compiler
from gpt3jax.sharding import meshes, rules

ROWS, LENGTH, HEADS = 4, 512, 4


def main():
    name, dtype, d_head, *split = sys.argv[1:]
    gpu = gpus.GPUS[name]
    triton_attention.assume_gpu(gpu.capability)
    sizes = dict.fromkeys(meshes.AXES, 1) | {"data": 2, "context" if split else "tensor": 2}
    mesh = compiler.target_mesh(gpus.target_text(gpu), sizes, 8)

    def abstract(shape, dtype, *axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, rules.spec(axes)))

    axes = "batch", "seq", "heads", None
    array = abstract((ROWS, LENGTH, HEADS, int(d_head)), dtype, *axes)
    options = attention.Options(
        implementation="triton", window=100 if split else None, dropout_rate=0.1
    )

    def both(q, k, v, d_out, samples, segments):
        noise = dropout.Noise(jax.random.key(0), samples)

        def attend(q, k, v):
            return attention.attend(q, k, v, options=options, segments_BT=segments, noise=noise)

        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(d_out)

    samples = abstract((ROWS,), jnp.int32, "batch")
    segments = abstract((ROWS, LENGTH), jnp.int32, "batch", "seq") if split else None
    with jax.set_mesh(mesh):
        traced = jax.jit(both).trace(array, array, array, array, samples, segments)
        text = traced.lower(lowering_platforms=("cuda",)).compile().as_text()
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
