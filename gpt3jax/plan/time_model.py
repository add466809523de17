"""The time of a step, an estimate: of a compiled one by its schedule, else by closed forms.

What a GPU reaches of its peaks is a range (`ASSUMED`), each with its source (docs/plan.md tells how
they were calibrated). A compiled step's schedule says what communication is exposed; closed forms
assume a share. Imports no JAX beyond `memory_model`'s.
"""

import dataclasses
import re

from gpt3jax.config import schema
from gpt3jax.gradient import pipeline
from gpt3jax.hardware import flops, gpus
from gpt3jax.model import remat
from gpt3jax.plan import hlo, memory_model, timeline


@dataclasses.dataclass(frozen=True)
class Range:
    """An assumption: its optimistic, expected and pessimistic value, and where it is from."""

    best: float
    expected: float
    worst: float
    source: str

    def at(self, case: str) -> float:
        """Return the value of a case: low, expected or high step time."""
        return {"low": self.best, "expected": self.expected, "high": self.worst}[case]


CASES = ("low", "expected", "high")
ASSUMED = {
    "matmul": Range(
        0.72, 0.65, 0.58,
        "share of the peak of large products, fitted to two published runs of 175B: Pax's 30.1 s "
        "on 256 H100 and Megatron's 32 s on 1,024 A100 (docs/plan.md has the residuals)",
    ),
    "cudnn": Range(
        0.55, 0.42, 0.32, "share of the peak of cuDNN's causal attention: assumed from "
        "FlashAttention-2 and 3 papers' figures for H100",
    ),
    "memory": Range(0.90, 0.80, 0.65, "share of the memory's bandwidth, elementwise: assumed"),
    "network": Range(1.10, 1.00, 0.75, "of the rates below, what collectives reach: assumed"),
    # Of communication, what closed forms take to be exposed; a compiled step's schedule tells.
    "data": Range(0.5, 1.0, 1.0, "exposed share of sums over data: as compiled 175B steps"),
    "stage": Range(0.1, 0.6, 1.0, "exposed share of hand-overs of stages: as compiled 175B steps"),
    "fsdp": Range(
        0.05, 0.2, 0.5, "exposed share of weights' traffic where that takes half as long as "
        "arithmetic; it grows with the square: as compiled 175B steps",
    ),
    "context": Range(0.2, 0.5, 1.0, "exposed share of keys' and values' gathering: assumed"),
    "tensor": Range(0.3, 0.6, 1.0, "exposed share of activations' traffic: as compiled 175B steps"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """One kind of collective over one axis, summed over a step."""

    kind: str
    axis: str
    """Mesh axes, joined by +."""
    count: int
    bytes_per_step: float
    """What leaves a GPU."""
    network: str
    seconds: float
    """On its own, with nothing beside it."""
    exposed: float
    """Seconds of these that arithmetic does not hide."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """A GPU's arithmetic in a step, without pipeline bubbles."""

    model_flops: float
    """Forward and backward, nothing recomputed: what MFU counts."""
    recomputed_flops: float
    attention_flops: float
    """Of both, what attention's scores and values take."""
    moved_bytes: float
    """Elementwise work's traffic with the memory."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one step in one case."""

    seconds: float
    matmul: float
    attention: float
    elementwise: float
    exposed: float
    """Communication that no arithmetic hides."""
    bubble: float
    """Of matmul, attention and elementwise, what idle pipeline ticks take."""
    flops: float
    """A GPU's products and attention: what is recomputed and what idle ticks do included."""
    traffic: list[Traffic]
    """Largest time first."""


def work(cfg: schema.Config, layout: memory_model.Layout) -> Work:
    """Return what each GPU computes in a step; all axes share the work out evenly."""
    model, recomputed = cfg.model, recompute_share(cfg)
    tokens = cfg.batch.global_batch_size * model.seq_len / layout.n_gpus
    dense = dataclasses.replace(cfg.model, n_layers=0)
    of_head = flops.flops_per_token(dense)
    of_products = 6.0 * model.n_layers * 12 * model.d_model**2
    of_attention = flops.flops_per_token(model) - of_head - of_products
    moved = _moved_bytes(cfg, layout, tokens)
    return Work(
        model_flops=tokens * flops.flops_per_token(model),
        recomputed_flops=tokens * (recomputed[0] * of_products + recomputed[1] * of_attention),
        attention_flops=tokens * (1 + recomputed[1]) * of_attention,
        moved_bytes=moved,
    )


def recompute_share(cfg: schema.Config) -> tuple[float, float]:
    """Return the shares (products, attention) of 6ND that the backward pass computes again.

    Of a layer's 12 D^2 weights QKV has 3, the projection 1, each matrix of the MLP 4; forward is a
    third of the FLOPs. The MLP's second product is needed by nothing in the backward pass.
    """
    name = cfg.model.remat
    again = {"full": 8, "residual": 7, "mlp": 4}.get(name, 0)
    return again / 12 / 3, 1 / 3 if name in ("full", "residual") else 0.0


def _moved_bytes(cfg: schema.Config, layout: memory_model.Layout, tokens: float) -> float:
    """Return the bytes that elementwise work reads and writes, fitted to compiled steps.

    A layer, in values of the compute format a token and unit of d_model: 232 where most of it is
    recomputed, 265 where more is saved (175B, 13B, 857M). Microbatches of several rows that are
    gathered along the sequence over `tensor` are transposed: 24 values of the whole, forward and
    backward together. XLA's attention: 84 bytes a score, 111 with dropout, a third more where it
    runs forward again (857M). Logits: 24 bytes an entry. Optimizer: 40 bytes a parameter.
    Gradients' sums, and casts of weights: 16 bytes a parameter and microbatch; with stages 6 a
    step, and 18 a tick (2 + 2 to take a weight, forward and backward, 10 to add its gradient).
    """
    model, sizes = cfg.model, layout.sizes
    values = 232 if cfg.model.remat in ("full", "residual", "mlp") else 265
    width = memory_model.width(cfg)
    layers = tokens * model.n_layers * values * width * model.d_model
    if sizes["tensor"] > 1 and cfg.mesh.sequence_parallel and cfg.batch.microbatch_size > 1:
        layers += tokens * model.n_layers * 24 * sizes["tensor"] * width * model.d_model
    of_score = (111 if model.attention_dropout else 84) * (1 + recompute_share(cfg)[1])
    scores = memory_model.scores(cfg, layout) * layout.n_microbatches
    layers += of_score * scores * model.n_layers / sizes["stage"]
    head = tokens * model.padded_vocab_size * 24
    held = memory_model.parameters(cfg, sizes, False)
    sums = 16.0 * layout.n_microbatches * held
    if sizes["stage"] > 1:
        ends = dataclasses.replace(cfg, model=dataclasses.replace(model, n_layers=0))
        of_layers = held - memory_model.parameters(ends, sizes, False)
        n_ticks = schedule(cfg, layout).n_ticks
        sums = 6 * held + 18 * n_ticks * of_layers / cfg.mesh.virtual_stages
    optimizer = 40 * memory_model.parameters(cfg, sizes, cfg.mesh.shard_optimizer)
    return layers + head + sums + optimizer


def schedule(cfg: schema.Config, layout: memory_model.Layout) -> pipeline.Schedule:
    """Return the pipeline's schedule; with one stage it has no bubble."""
    return pipeline.Schedule(
        n_stages=layout.sizes["stage"],
        virtual_stages=cfg.mesh.virtual_stages,
        n_microbatches=layout.n_microbatches,
    )


def in_effect(layout: memory_model.Layout, compiled: bool) -> dict[str, Range]:
    """Return which of `ASSUMED` an estimate rests on."""
    names = ["matmul", "memory", "network"]
    if layout.attention == "cudnn":
        names.insert(1, "cudnn")
    if not compiled:
        names += [axis for axis, size in layout.sizes.items() if size > 1]
    return {name: ASSUMED[name] for name in names}


Row = tuple[str, str, int, float]
"""Kind, axis, count, bytes of the whole buffer."""


def collectives(cfg: schema.Config, layout: memory_model.Layout) -> list[Row]:
    """Return the collectives that the layout must run in a step (docs/parallelism.md)."""
    model, sizes = cfg.model, layout.sizes
    width = memory_model.width(cfg)
    n_ticks = schedule(cfg, layout).n_ticks
    # Of each of a stage's layers; idle ticks communicate too.
    passes = -(-n_ticks // cfg.mesh.virtual_stages)
    n_layers = model.n_layers // sizes["stage"] * passes
    again = remat.in_effect(model.remat, sizes["stage"] > 1) != "none"  # what norms give
    weights = 12 * model.d_model**2 / sizes["tensor"] * width
    whole = memory_model.activation_bytes(cfg, layout)
    whole *= sizes["tensor"] if cfg.mesh.sequence_parallel else 1
    part = memory_model.activation_bytes(cfg, layout)
    rows: list[Row] = [
        ("all-gather", "fsdp", 2 * n_layers, weights),
        ("reduce-scatter", "fsdp", n_layers, weights),
        ("all-gather", "context", (1 + again) * n_layers, 2 * whole * sizes["context"]),
        ("reduce-scatter", "context", n_layers, 2 * whole * sizes["context"]),
        ("collective-permute", "stage", 4 * n_ticks, part),
    ]
    rows[2:4] = [(k, a, n, b / sizes["tensor"]) for k, a, n, b in rows[2:4]]
    if cfg.mesh.sequence_parallel:
        rows.append(("all-gather", "tensor", (4 + 2 * again) * n_layers, whole))
        kind = "reduce-scatter"
    else:
        kind = "all-reduce"
    rows.append((kind, "tensor", (4 + (model.remat == "full")) * n_layers, whole))
    held = memory_model.parameters(cfg, sizes, False)
    if cfg.mesh.shard_optimizer:
        rows.append(("reduce-scatter", "data", 1, 4.0 * held))
        rows.append(("all-gather", "data", 1, float(width * held)))
    else:
        rows.append(("all-reduce", "data", 1, 4.0 * held))
    return [row for row in rows if sizes[row[1]] > 1]


def estimate(
    cfg: schema.Config,
    layout: memory_model.Layout,
    gpu: gpus.Gpu,
    network: gpus.Network,
    case: str,
    program: hlo.Program | None = None,
) -> StepTime:
    """Return the time of a step in a case (`CASES`), by the schedule of a compiled one if given."""
    if program is None:
        return _by_closed_forms(cfg, layout, gpu, _reached(network, case), case)
    return _by_schedule(cfg, layout, gpu, _reached(network, case), case, program)


def _reached(network: gpus.Network, case: str) -> gpus.Network:
    share = ASSUMED["network"].at(case)
    return dataclasses.replace(
        network,
        nvlink_bandwidth=network.nvlink_bandwidth * share,
        nic_bandwidth=network.nic_bandwidth * share,
    )


def _by_closed_forms(
    cfg: schema.Config,
    layout: memory_model.Layout,
    gpu: gpus.Gpu,
    network: gpus.Network,
    case: str,
) -> StepTime:
    """Arithmetic of all kinds adds up; idle pipeline ticks take as long as working ones.

    Of each axis's communication a share is exposed, and so is what exceeds the arithmetic.
    """
    done, peak = work(cfg, layout), peak_flops(cfg, gpu)
    bubble = schedule(cfg, layout).bubble
    stretch = 1 / (1 - bubble)
    products = done.model_flops + done.recomputed_flops - done.attention_flops
    matmul = stretch * products / (peak * ASSUMED["matmul"].at(case))
    kind = "cudnn" if layout.attention == "cudnn" else "matmul"
    attention = stretch * done.attention_flops / (peak * ASSUMED[kind].at(case))
    elementwise = stretch * done.moved_bytes / (gpu.memory_bandwidth * ASSUMED["memory"].at(case))
    arithmetic = matmul + attention + elementwise
    sent = [_traffic(*row, layout, network) for row in collectives(cfg, layout)]
    busy = {axis: sum(one.seconds for one in sent if one.axis == axis) for axis in layout.sizes}
    shares = {axis: ASSUMED[axis].at(case) for axis in layout.sizes}
    shares["fsdp"] = min(1.0, shares["fsdp"] * (2 * busy["fsdp"] / arithmetic) ** 2)
    sent = [dataclasses.replace(one, exposed=shares[one.axis] * one.seconds) for one in sent]
    hidden = sum(one.seconds - one.exposed for one in sent)
    if hidden > arithmetic:  # there is not enough to hide it
        share = 1 - arithmetic / hidden
        sent = [
            dataclasses.replace(one, exposed=one.exposed + share * (one.seconds - one.exposed))
            for one in sent
        ]
    exposed = sum(one.exposed for one in sent)
    return StepTime(
        seconds=arithmetic + exposed,
        matmul=matmul,
        attention=attention,
        elementwise=elementwise,
        exposed=exposed,
        bubble=arithmetic * bubble,
        flops=stretch * (done.model_flops + done.recomputed_flops),
        traffic=sorted(sent, key=lambda one: -one.seconds),
    )


def _traffic(
    kind: str,
    axis: str,
    count: int,
    n_bytes: float,
    layout: memory_model.Layout,
    network: gpus.Network,
) -> Traffic:
    """Return a row of `collectives` with its time, and nothing exposed."""
    one = _collective(kind, axis, n_bytes, layout, network)
    return Traffic(
        kind=kind,
        axis=axis,
        count=count,
        bytes_per_step=count * one.crossing_bytes,
        network=network.bandwidth(one.group_size, one.in_node)[0],
        seconds=count * network.seconds(one.crossing_bytes, one.group_size, one.in_node),
        exposed=0.0,
    )


def _collective(
    kind: str, axis: str, n_bytes: float, layout: memory_model.Layout, network: gpus.Network
) -> hlo.Collective:
    """Return a collective over an axis; one that hands on is as slow as its slowest pair."""
    size, in_node = layout.sizes[axis], layout.in_node(axis, network.gpus_per_node)
    if kind == "collective-permute":
        size, in_node = 2, 2 if in_node == size else 1
    return hlo.Collective(kind, (axis,), size, in_node, round(n_bytes), True)


def _by_schedule(
    cfg: schema.Config,
    layout: memory_model.Layout,
    gpu: gpus.Gpu,
    network: gpus.Network,
    case: str,
    program: hlo.Program,
) -> StepTime:
    peak = peak_flops(cfg, gpu)
    rates = timeline.Rates(
        matmul=peak * ASSUMED["matmul"].at(case),
        attention=peak * ASSUMED["cudnn"].at(case),
        memory=gpu.memory_bandwidth * ASSUMED["memory"].at(case),
        memory_peak=gpu.memory_bandwidth,
        network=network,
    )
    found = timeline.walk(program, layout.sizes, rates)
    sent = [
        Traffic(
            kind=key[0],
            axis=key[1],
            count=round(found.count[key]),
            bytes_per_step=found.crossing_bytes[key],
            network=key[2],
            seconds=seconds,
            exposed=found.exposed[key],
        )
        for key, seconds in sorted(found.busy.items(), key=lambda item: -item[1])
    ]
    kernels = {name: found.kernels[name] for name in ("matmul", "attention", "elementwise")}
    return StepTime(
        seconds=found.seconds,
        **kernels,
        exposed=found.seconds - sum(kernels.values()),
        bubble=schedule(cfg, layout).bubble * sum(kernels.values()),
        flops=found.flops,
        traffic=sent,
    )


def peak_flops(cfg: schema.Config, gpu: gpus.Gpu) -> float:
    """Return a GPU's peak FLOP/s in the config's compute format."""
    name = re.sub(r"\bA100-", "A100 ", gpu.name)
    peak = flops.peak_flops(name, cfg.precision.compute_dtype)
    assert peak, f"flops knows no peak of {gpu.name}"
    return peak
