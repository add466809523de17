"""Attention's implementations beside XLA's in float32, the reference: errors, and times.

Where there is no GPU, our kernels run in Triton's interpreter, and cuDNN's are left out, or plain
ones stand in for them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np

from gpt3jax.config import schema
from gpt3jax.distributed import joining
from gpt3jax.hardware import flops
from gpt3jax.model import attention, cudnn_attention, dropout, triton_attention
from gpt3jax.preflight import speed

RATE = 0.1
NAMES = ("out", "d_q", "d_k", "d_v")


@dataclasses.dataclass(frozen=True)
class Case:
    """A batch, and who sees whom in it."""

    d_head: int
    window: int | None = None
    documents: bool = False
    rate: float = 0.0
    dtype: str = "bfloat16"
    rows: int = 4
    length: int = 2048
    heads: int = 16

    def __str__(self):
        """Return the case in a few words."""
        what = [f"band {self.window}"] if self.window else ["dense"]
        what += ["documents"] * self.documents + [f"dropout {self.rate}"] * (self.rate > 0)
        return f"{' '.join(what)}, heads of {self.d_head}, {self.dtype}"


CASES = (
    Case(64),
    Case(64, window=256),
    Case(64, documents=True),
    Case(128),
    Case(128, window=256, documents=True),
    Case(64, dtype="float16"),
    Case(64, rate=RATE),
    Case(128, rate=RATE, window=256, documents=True),
)
TINY = tuple(
    dataclasses.replace(case, rows=1, length=128, heads=1, window=case.window and 40)
    for case in (CASES[2], CASES[7])
)


def start(task):
    """Choose the devices; without a GPU, run our kernels in the interpreter."""
    joining.start(schema.Distributed(), schema.Mesh(cpu_devices=1 if task.tiny else 0))
    if task.tiny and not triton_attention.missing():
        import triton_interpreter

        triton_interpreter.kernels()
        triton_attention._call = triton_interpreter.call


def compare(task):
    """Yield error and time of each implementation in each case."""
    start(task)
    cases = TINY if task.tiny else CASES
    if task.tiny:
        yield {"cudnn": "left out: it needs a GPU"}
    if triton_attention.missing():
        yield {"triton": f"left out: {triton_attention.missing()}"}
    programs = {}
    for case in cases:
        functions = {name: functools.partial(whole, case, name) for name in implementations(case)}
        programs[case] = {"reference": functools.partial(reference, case)} | functions
    yield from compared(programs)


def implementations(case):
    """Return those that serve a case here."""
    names = ["xla"]
    if not triton_attention.missing():
        names.insert(0, "triton")
    if not case.rate and jax.default_backend() != "cpu":
        names.insert(0, "cudnn")
    return names


def compare_shards(task):
    """Yield the errors of all shards of a sequence cut zig-zag, one after the other, by hand."""
    start(task)
    if task.tiny:
        import plain_kernels

        cudnn_attention.forward_kernel = plain_kernels.forward
        cudnn_attention.backward_kernel = plain_kernels.backward
    sizes = {"rows": 1, "length": 128, "heads": 1} if task.tiny else {"length": 4096, "heads": 8}
    dtype = "float32" if task.tiny else "bfloat16"
    programs = {}
    for n_shards in (2,) if task.tiny else (2, 4):
        case = Case(128, documents=n_shards == 2, dtype=dtype, **sizes)
        name = f"cudnn in {n_shards} shards"
        programs[case] = {"reference": functools.partial(reference, case)}
        programs[case][name] = functools.partial(in_shards, case, n_shards, cudnn_shard)
        if triton_attention.missing():
            yield {"triton": f"left out: {triton_attention.missing()}"}
            continue
        case = Case(64, window=100, documents=True, rate=RATE, dtype="float16", **sizes)
        if n_shards == 4:
            case = dataclasses.replace(case, window=None)
        name = f"triton in {n_shards} shards"
        programs[case] = {"reference": functools.partial(reference, case)}
        programs[case][name] = functools.partial(in_shards, case, n_shards, triton_shard)
    yield from compared(programs)


def compared(programs: dict[Case, dict[str, Callable]]):
    """Yield errors and times of the programs of each case; what fails is an error of its own."""
    lowered = {}
    for case, functions in programs.items():
        for name, function in functions.items():
            try:
                lowered[case, name] = jax.jit(both(function)).lower(*inputs(case))
            except Exception as error:
                lowered[case, name] = error
    with futures.ThreadPoolExecutor(8) as pool:
        compiling = {job: pool.submit(compiled, one) for job, one in lowered.items()}
        for (case, name), program in compiling.items():
            if name == "reference":
                continue
            found = {"limit": max(4 * float(jnp.finfo(case.dtype).eps), 1e-5)}
            try:
                right = compiling[case, "reference"].result()(*inputs(case))
                found |= errors(program.result()(*inputs(case)), right)
                found |= timed(program.result(), case, name)
            except Exception as error:
                first = next(iter(str(error).splitlines()), "")
                found["error"] = f"{type(error).__name__}: {first}"
            yield {f"{name} {case}": found}


def compiled(lowered):
    """Return a compiled program, or raise why it could not be lowered."""
    if isinstance(lowered, Exception):
        raise lowered
    return lowered.compile()


@functools.cache
def inputs(case):
    """Return q, k, v, the output's gradient and segments of a case."""
    rng = np.random.default_rng(0)
    shape = case.rows, case.length, case.heads, case.d_head
    arrays = [jnp.asarray(rng.standard_normal(shape, np.float32), case.dtype) for _ in range(4)]
    segments = np.cumsum(rng.random(shape[:2]) < 0.01, axis=1, dtype=np.int32)
    return *arrays, jnp.asarray(segments)


def noise_of(case):
    """Return the noise of dropout: with it all implementations draw the same masks."""
    return dropout.Noise(jax.random.key(0), jnp.arange(case.rows)) if case.rate else None


def both(attend):
    """Return a function of `inputs`: attention's output and the gradients of q, k and v."""

    def output_and_gradients(q, k, v, d_out, segments):
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, segments), q, k, v)
        return out, *pull(d_out.astype(out.dtype))

    return output_and_gradients


def whole(case, implementation, q, k, v, segments):
    """Return the output of an implementation."""
    options = attention.Options(
        implementation=implementation, window=case.window, dropout_rate=case.rate
    )
    own_segments = segments if case.documents else None
    return attention.attend(
        q, k, v, options=options, segments_BT=own_segments, noise=noise_of(case)
    )


def reference(case, q, k, v, segments):
    """Return the output in float32, from the same values."""
    with jax.default_matmul_precision("highest"):
        return whole(case, "xla", *(x.astype(jnp.float32) for x in (q, k, v)), segments)


def in_shards(case, n_shards, shard, q, k, v, segments):
    """Return the output of all shards, put together in the order of the sequence."""
    n_chunks, n = 2 * n_shards, case.length // (2 * n_shards)
    chunks = [None] * n_chunks
    words = dropout.row_words(noise_of(case), jnp.arange(case.length), case.heads) if (
        case.rate
    ) else None  # fmt: skip
    segments = segments if case.documents else None
    for c in range(n_shards):
        mine = c, n_chunks - 1 - c

        def own(x, mine=mine):
            parts = [x[:, chunk * n : (chunk + 1) * n] for chunk in mine]
            return jnp.concatenate(parts, axis=1)[:, None]

        arrays = jax.tree.map(own, (q, k, v, words, segments))
        everything = jax.tree.map(lambda x: x[:, None], (k, v, segments))
        out = shard(case, c, [chunk * n for chunk in mine], arrays, everything)[:, 0]
        chunks[mine[0]], chunks[mine[1]] = out[:, :n], out[:, n:]
    return jnp.concatenate(chunks, axis=1)


def cudnn_shard(case, shard, starts, own, everything):
    """Return the output of a shard, `[B, 1, T, H, K]`, by cuDNN's three kernels."""
    *qkv, _, own_segments = own
    k, v, segments = everything
    both_segments = None if segments is None else (own_segments, segments)
    return cudnn_attention._attend_shard(jnp.array([shard]), tuple(qkv), (k, v), both_segments)


def triton_shard(case, shard, starts, own, everything):
    """Return the output of a shard, `[B, 1, T, H, K]`, by our kernels."""
    q, _, _, words, own_segments = own
    k, v, segments = everything
    options = triton_attention._Options(case.window, dropout.threshold(case.rate))
    return triton_attention._attend_shard(
        options, jnp.array([starts]), (q, words), (k, v), own_segments, segments
    )


def errors(ours, right):
    """Return the largest error, relative to the largest value, and where it is."""
    apart = {
        name: float(jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32)).max() / jnp.abs(b).max())
        for name, a, b in zip(NAMES, ours, right, strict=True)
    }
    worst = max(apart, key=lambda name: apart[name] if apart[name] >= 0 else math.inf)  # NaN
    return {"error": apart[worst], "in": worst}


def timed(program, case, name):
    """Return the milliseconds of forward and backward; of dense ones their share of the peak.

    The share is as the plan counts it (`time_model.ASSUMED`): cuDNN has 7 products, our kernels 9,
    and they are charged as if heads were longer by 32.
    """
    device = jax.devices()[0]
    if device.platform == "cpu":
        return {}
    seconds = speed.best_seconds(10, program, *inputs(case))
    found = {"ms": 1e3 * seconds}
    peak = flops.peak_flops(device.device_kind, case.dtype)
    products = {"cudnn": 7, "triton": 9 * (case.d_head + 32) / case.d_head}.get(name)
    if peak and products and not case.window and not case.documents:
        product = case.rows * case.heads * case.length**2 * case.d_head  # half of it is hidden
        found["share"] = products * product / seconds / peak
    return found
