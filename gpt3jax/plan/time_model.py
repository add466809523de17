"""An estimate of a step's time: from a compiled step's schedule, or from closed forms.

How much of its peaks a GPU reaches is a range (`ASSUMED`), each with its source; docs/plan.md says
how they were calibrated. A compiled step's schedule shows which communication is exposed; for
closed forms `exposure` tells.
"""

import dataclasses
import functools
import math
import re
from typing import Literal

from gpt3jax import step
from gpt3jax.config import schema
from gpt3jax.hardware import flops, gpus
from gpt3jax.plan import (
    communication,
    exposure,
    hlo,
    memory_model,
    moved_bytes,
    placement,
    timeline,
)

Case = Literal["low", "expected", "high"]
"""Which of an assumption's values to use: for a low, the expected or a high step time."""
CASES: tuple[Case, ...] = ("low", "expected", "high")


@dataclasses.dataclass(frozen=True)
class Range:
    """An assumption: its optimistic, expected and pessimistic value, and its source."""

    best: float
    expected: float
    worst: float
    source: str

    def at(self, case: Case) -> float:
        """Return the value in a case."""
        return {"low": self.best, "expected": self.expected, "high": self.worst}[case]


ASSUMED = {
    "matmul": Range(
        0.72, 0.65, 0.58,
        "share of the peak of large products, fitted to two published runs of 175B: Pax's 30.1 s "
        "on 256 H100 and Megatron's 32 s on 1,024 A100 (docs/plan.md has the residuals)",
    ),
    "float8": Range(
        0.70, 0.62, 0.50,
        "share of the peak of large products in 8 bits, 1,227 TFLOP/s of an H100: assumed from the "
        "1,200 to 1,400 that cuBLAS is reported to reach, as the tensor cores clock lower under it",
    ),
    "cudnn": Range(
        0.55, 0.42, 0.32, "share of the peak of cuDNN's causal attention: assumed from "
        "FlashAttention-2 and 3 papers' figures for H100",
    ),
    "triton": Range(
        0.55, 0.42, 0.25, "share of the peak of our own attention's products, if heads were "
        "endless: for masks and random bits a score takes 32 / d_head more time. At heads of 64 "
        "that is 3.2, 4.2 and 7.0 ps a score on an H100, of which the instructions alone take "
        "1.8: assumed",
    ),
    "deterministic": Range(
        1.05, 1.25, 1.6, "multiple of the time of cuDNN's attention in the backward pass where "
        "sums keep to one order (precision.deterministic): assumed",
    ),
    "memory": Range(0.90, 0.80, 0.65, "share of the memory's bandwidth, elementwise: assumed"),
    "network": Range(1.10, 1.00, 0.75, "of the rates below, what collectives reach: assumed"),
    "exposed": Range(
        0.7, 1.0, 1.5, "multiple of the communication that closed forms count as not hidden: "
        "fitted to compiled steps",
    ),
}  # fmt: skip


def share_of_peak(gpu: gpus.Gpu, name: str) -> Range:
    """Return an entry of `ASSUMED`, or what was measured on this kind of GPU in its place."""
    measured = gpus.MEASURED.get(gpu.name, {}).get(name)
    if measured is None:
        return ASSUMED[name]
    best, worst = (measured.share * (1 + sign * measured.spread) for sign in (1, -1))
    return Range(best, measured.share, worst, f"measured: {measured.source}")


SMALL_KERNELS = 40e-6  # seconds of a layer's kernels, forward and backward, with nothing to move


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """One kind of collective over one axis, summed over a step."""

    kind: str
    axis: str
    """Mesh axes, joined by +."""
    count: int
    bytes_per_step: float
    """Bytes that leave a GPU."""
    network: str
    """NVLink or NIC."""
    seconds: float
    """Seconds it would take alone."""
    exposed: float
    """The part of these seconds that no arithmetic hides."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """A GPU's arithmetic in a step, without pipeline bubbles."""

    model_flops: float
    """Forward and backward, without recomputation: the FLOPs that MFU counts."""
    recomputed_flops: float
    attention_flops: float
    """The part of the model's FLOPs that attention's scores and values need."""
    head_flops: float
    """The part that the head needs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepParts:
    """Seconds of one step in one case, and of its parts."""

    seconds: float
    matmul: float
    attention: float
    elementwise: float
    exposed: float
    """Communication that no arithmetic hides."""
    bubble: float
    """The part of matmul, attention and elementwise that idle pipeline ticks take."""
    flops: float
    """FLOPs of a GPU's products and attention, with recomputation and idle ticks."""
    flops_8_bits: float
    """The part of them in products in 8 bits."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTime:
    """The time of one step in one case, and its collectives."""

    parts: StepParts
    traffic: list[Traffic]
    """Longest first."""


def work(cfg: schema.Config, layout: placement.Layout) -> Work:
    """Return the arithmetic of a GPU in a step, which all axes but copies divide evenly."""
    model = cfg.model
    products_again, attention_again = recompute_share(cfg)
    rows = layout.n_microbatches * cfg.batch.microbatch_size
    ways = math.prod(layout.sizes[axis] for axis in ("stage", "context", "tensor"))
    tokens = rows * model.seq_len / ways
    head = 6.0 * model.d_model * model.padded_vocab_size
    products = 6.0 * model.n_layers * 12 * model.d_model**2
    total = flops.flops_per_token(model)
    attention = total - head - products
    return Work(
        model_flops=tokens * total,
        recomputed_flops=tokens * (products_again * products + attention_again * attention),
        attention_flops=tokens * attention,
        head_flops=tokens * head,
    )


def layer_flops(cfg: schema.Config, layout: placement.Layout) -> float:
    """Return the FLOPs of a GPU's products in layers, with recomputation."""
    done, attention_again = work(cfg, layout), recompute_share(cfg)[1]
    attention = (1 + attention_again) * done.attention_flops
    return done.model_flops + done.recomputed_flops - done.head_flops - attention


def flops_8_bits(cfg: schema.Config, layout: placement.Layout) -> float:
    """Return the part of them in 8 bits."""
    if cfg.precision.matmul_dtype != "float8":
        return 0.0
    n_layers = cfg.model.n_layers
    return layer_flops(cfg, layout) * (1 - 2 * cfg.precision.end_layers / n_layers)


def recompute_share(cfg: schema.Config) -> tuple[float, float]:
    """Return the shares (products, attention) of 6ND that the backward pass computes again.

    The forward pass is a third of the FLOPs.
    """
    again = communication.products_again(cfg.model.remat) / 3
    return again, 1 / 3 if cfg.model.remat in ("full", "residual") else 0.0


def assumptions(
    cfg: schema.Config, layout: placement.Layout, gpu: gpus.Gpu, *, compiled: bool
) -> dict[str, Range]:
    """Return the entries of `ASSUMED` that an estimate uses, or what was measured."""
    is_float8 = cfg.precision.matmul_dtype == "float8"
    names = ["matmul", *(["float8"] if is_float8 else []), "memory", "network"]
    if layout.attention != "xla":
        names.insert(-2, layout.attention)
    if _keeps_order(cfg, layout):
        names.insert(-2, "deterministic")
    if not compiled and layout.n_gpus > 1:
        names.append("exposed")
    return {name: share_of_peak(gpu, name) for name in names}


def estimate(
    cfg: schema.Config,
    layout: placement.Layout,
    gpu: gpus.Gpu,
    network: gpus.Network,
    case: Case,
    program: hlo.Program | None = None,
) -> StepTime:
    """Return the time of a step: by the schedule of `program` if given, else by closed forms."""
    reached = _reached(network, case)
    if program is None:
        return _by_closed_forms(cfg, layout, gpu, reached, case)
    return _by_schedule(cfg, layout, gpu, reached, case, program)


def _reached(network: gpus.Network, case: Case) -> gpus.Network:
    multiple = ASSUMED["network"].at(case)
    return dataclasses.replace(
        network,
        nvlink_bandwidth=network.nvlink_bandwidth * multiple,
        nic_bandwidth=network.nic_bandwidth * multiple,
    )


def _by_closed_forms(
    cfg: schema.Config,
    layout: placement.Layout,
    gpu: gpus.Gpu,
    network: gpus.Network,
    case: Case,
) -> StepTime:
    """Add up arithmetic of all kinds and exposed communication.

    Idle pipeline ticks take as long as working ones.
    """
    done, bubble = work(cfg, layout), placement.schedule(cfg, layout).bubble
    kernels = _kernel_seconds(cfg, layout, gpu, case)
    arithmetic = sum(kernels.values())
    traffic = _with_rest(_traffic(cfg, layout, gpu, network, case), arithmetic)
    exposed = sum(row.exposed for row in traffic)
    parts = StepParts(
        seconds=arithmetic + exposed,
        **kernels,
        exposed=exposed,
        bubble=arithmetic * bubble,
        flops=1 / (1 - bubble) * (done.model_flops + done.recomputed_flops),
        flops_8_bits=1 / (1 - bubble) * flops_8_bits(cfg, layout),
    )
    return StepTime(parts=parts, traffic=sorted(traffic, key=lambda row: -row.seconds))


def _kernel_seconds(
    cfg: schema.Config, layout: placement.Layout, gpu: gpus.Gpu, case: Case
) -> dict[str, float]:
    """Return the seconds of matmul, attention and elementwise, with idle ticks."""
    done, schedule = work(cfg, layout), placement.schedule(cfg, layout)
    # A stage whose share of the microbatches is less than one works on a whole one.
    head = done.head_flops * schedule.n_groups * schedule.n_stages / schedule.n_microbatches
    memory_rate = gpu.memory_bandwidth * share_of_peak(gpu, "memory").at(case)
    rate = peak_flops(cfg, gpu) * share_of_peak(gpu, "matmul").at(case)
    in_8_bits = flops_8_bits(cfg, layout)
    in_layers = (layer_flops(cfg, layout) - in_8_bits) / rate
    if in_8_bits:
        in_layers += in_8_bits / _layer_rate(cfg, gpu, case)
    return {
        "matmul": in_layers / (1 - schedule.bubble) + head / rate,
        "attention": _attention_seconds(cfg, layout, gpu, case),
        "elementwise": moved_bytes.in_step(cfg, layout) / memory_rate
        + SMALL_KERNELS * communication.layer_passes(cfg, layout),
    }


def _attention_seconds(
    cfg: schema.Config, layout: placement.Layout, gpu: gpus.Gpu, case: Case
) -> float:
    """Return the seconds of attention's products, with idle ticks.

    The model counts 2 products forward and 4 backward. There are 5, because scores are computed
    again, and 2 more where the forward pass runs again. XLA's wait for memory: 25 bytes a score.
    """
    again = recompute_share(cfg)[1] > 0
    n_products: float = 9 if again else 7
    n_passes = communication.layer_passes(cfg, layout)
    moved = 25 * n_products / 7 * memory_model.scores(cfg, layout) * n_passes
    of_xla = moved / (gpu.memory_bandwidth * share_of_peak(gpu, "memory").at(case))
    if layout.attention == "xla":
        return of_xla
    if layout.attention == "triton":
        n_products += 2  # of its two kernels in the backward pass each computes the scores again
    if _keeps_order(cfg, layout):
        n_products += 5 * (ASSUMED["deterministic"].at(case) - 1)
    n_flops = n_products / 6 * work(cfg, layout).attention_flops
    stretch = 1 / (1 - placement.schedule(cfg, layout).bubble)
    return of_xla + stretch * n_flops / _attention_rate(cfg, gpu, layout.attention, case)


def _keeps_order(cfg: schema.Config, layout: placement.Layout) -> bool:
    """Return whether cuDNN's attention is told to add in one order; ours always does."""
    return layout.attention == "cudnn" and step.is_deterministic(cfg.precision, layout.sizes)


def _attention_rate(cfg: schema.Config, gpu: gpus.Gpu, implementation: str, case: Case) -> float:
    """Return the FLOP/s of a fused attention's products."""
    rate = peak_flops(cfg, gpu) * share_of_peak(gpu, implementation).at(case)
    d_head = cfg.model.d_head
    return rate * d_head / (d_head + 32) if implementation == "triton" else rate


def _traffic(
    cfg: schema.Config, layout: placement.Layout, gpu: gpus.Gpu, network: gpus.Network, case: Case
) -> list[Traffic]:
    """Return the collectives of a step, each with the time that it takes alone."""
    needed = communication.collectives(cfg, layout)
    layer = _layer_seconds(cfg, layout, gpu, case)
    shares = exposure.shares(needed, cfg, layout, network, layer)
    multiple = ASSUMED["exposed"].at(case)
    traffic = []
    for row in needed:
        each = communication.collective(row.kind, row.axis, row.n_bytes, layout, network)
        seconds = row.count * network.seconds(each.crossing_bytes, each.group_size, each.in_node)
        traffic.append(
            Traffic(
                kind=row.kind,
                axis=row.axis,
                count=row.count,
                bytes_per_step=row.count * each.crossing_bytes,
                network=network.bandwidth(each.group_size, each.in_node)[0],
                seconds=seconds,
                exposed=min(1.0, multiple * shares[row.axis, row.kind]) * seconds,
            )
        )
    return traffic


def _with_rest(traffic: list[Traffic], arithmetic: float) -> list[Traffic]:
    """Return collectives whose hidden seconds, where they exceed the arithmetic, are exposed."""
    hidden = sum(row.seconds - row.exposed for row in traffic)
    if hidden <= arithmetic:
        return traffic
    share = 1 - arithmetic / hidden
    return [
        dataclasses.replace(row, exposed=row.exposed + share * (row.seconds - row.exposed))
        for row in traffic
    ]


def _layer_seconds(
    cfg: schema.Config, layout: placement.Layout, gpu: gpus.Gpu, case: Case
) -> exposure.LayerSeconds:
    """Return the arithmetic of a layer on a microbatch."""
    model, sizes = cfg.model, layout.sizes
    tokens = cfg.batch.microbatch_size * model.seq_len / sizes["context"]
    forward = 2 * tokens * 12 * model.d_model**2 / sizes["tensor"]
    memory_rate = gpu.memory_bandwidth * share_of_peak(gpu, "memory").at(case)
    n_passes = communication.layer_passes(cfg, layout)
    attention = _attention_seconds(cfg, layout, gpu, case) / n_passes
    return exposure.LayerSeconds(
        products=forward / _layer_rate(cfg, gpu, case),
        attention=attention + moved_bytes.of_scores(cfg, layout) / memory_rate,
        elementwise=moved_bytes.in_layer(cfg, layout) / memory_rate,
    )


def _by_schedule(
    cfg: schema.Config,
    layout: placement.Layout,
    gpu: gpus.Gpu,
    network: gpus.Network,
    case: Case,
    program: hlo.Program,
) -> StepTime:
    walked = timeline.walk(program, layout.sizes, _rates(cfg, layout, gpu, network, case))
    traffic = [
        Traffic(
            kind=key[0],
            axis=key[1],
            count=round(walked.count[key]),
            bytes_per_step=walked.crossing_bytes[key],
            network=key[2],
            seconds=seconds,
            exposed=walked.exposed[key],
        )
        for key, seconds in sorted(walked.busy.items(), key=lambda item: -item[1])
    ]
    kernels = {name: walked.kernels[name] for name in ("matmul", "attention", "elementwise")}
    parts = StepParts(
        seconds=walked.seconds,
        **kernels,
        exposed=walked.seconds - sum(kernels.values()),
        bubble=placement.schedule(cfg, layout).bubble * sum(kernels.values()),
        flops=walked.flops,
        flops_8_bits=walked.flops_8_bits,
    )
    return StepTime(parts=parts, traffic=traffic)


def _rates(
    cfg: schema.Config,
    layout: placement.Layout,
    gpu: gpus.Gpu,
    network: gpus.Network,
    case: Case,
) -> timeline.Rates:
    peak, cudnn = peak_flops(cfg, gpu), _attention_rate(cfg, gpu, "cudnn", case)
    slower = ASSUMED["deterministic"].at(case) if _keeps_order(cfg, layout) else 1
    return timeline.Rates(
        matmul=peak * share_of_peak(gpu, "matmul").at(case),
        matmul_8_bits=_layer_rate(cfg, gpu, case),
        cudnn=cudnn,
        cudnn_backward=cudnn / slower,
        triton=_attention_rate(cfg, gpu, "triton", case),
        memory=gpu.memory_bandwidth * share_of_peak(gpu, "memory").at(case),
        memory_peak=gpu.memory_bandwidth,
        network=network,
    )


def _layer_rate(cfg: schema.Config, gpu: gpus.Gpu, case: Case) -> float:
    """Return the FLOP/s of the layers' products."""
    if cfg.precision.matmul_dtype == "float8":
        return layer_peak_flops(cfg, gpu) * share_of_peak(gpu, "float8").at(case)
    return peak_flops(cfg, gpu) * share_of_peak(gpu, "matmul").at(case)


def peak_flops(cfg: schema.Config, gpu: gpus.Gpu) -> float:
    """Return a GPU's peak FLOP/s in the config's compute format."""
    return _peak_flops(gpu.name, cfg.precision.compute_dtype)


def layer_peak_flops(cfg: schema.Config, gpu: gpus.Gpu) -> float:
    """Return a GPU's peak FLOP/s in the format of the layers' products.

    Raises:
        UserError: it has none in this format.
    """
    flops.check_product_dtype(cfg.precision, gpu.name, gpu.capability)
    return _peak_flops(gpu.name, flops.product_dtype(cfg.precision))


@functools.cache
def _peak_flops(gpu_name: str, dtype: str) -> float:
    name = re.sub(r"\bA100-", "A100 ", gpu_name)
    peak = flops.peak_flops(name, dtype)
    assert peak, f"flops knows no peak of {gpu_name}"
    return peak
