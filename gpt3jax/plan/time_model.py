"""An estimate of a step's time: from a compiled step's schedule, or from closed forms.

How much of its peaks a GPU reaches is a range (`ASSUMED`), each with its source; docs/plan.md says
how they were calibrated. A compiled step's schedule shows which communication is exposed; closed
forms assume a share.
"""

import dataclasses
import re
from typing import Literal

from gpt3jax.config import schema
from gpt3jax.hardware import flops, gpus
from gpt3jax.plan import communication, hlo, memory_model, placement, timeline

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
    "cudnn": Range(
        0.55, 0.42, 0.32, "share of the peak of cuDNN's causal attention: assumed from "
        "FlashAttention-2 and 3 papers' figures for H100",
    ),
    "memory": Range(0.90, 0.80, 0.65, "share of the memory's bandwidth, elementwise: assumed"),
    "network": Range(1.10, 1.00, 0.75, "of the rates below, what collectives reach: assumed"),
    # Exposed shares of communication; a compiled step's schedule has its own.
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
    """The part of both that attention's scores and values need."""
    moved_bytes: float
    """Bytes that elementwise work reads from memory and writes to it."""


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
    tokens = cfg.batch.global_batch_size * model.seq_len / layout.n_gpus * layout.sizes["copies"]
    head_alone = dataclasses.replace(cfg.model, n_layers=0)
    head = flops.flops_per_token(head_alone)
    products = 6.0 * model.n_layers * 12 * model.d_model**2
    attention = flops.flops_per_token(model) - head - products
    return Work(
        model_flops=tokens * flops.flops_per_token(model),
        recomputed_flops=tokens * (products_again * products + attention_again * attention),
        attention_flops=tokens * (1 + attention_again) * attention,
        moved_bytes=_moved_bytes(cfg, layout, tokens),
    )


def recompute_share(cfg: schema.Config) -> tuple[float, float]:
    """Return the shares (products, attention) of 6ND that the backward pass computes again.

    A layer has 12 D^2 weights: QKV 3, the projection 1, each matrix of the MLP 4. The forward pass
    is a third of the FLOPs. Nothing in the backward pass needs the MLP's second product.
    """
    name = cfg.model.remat
    again = {"full": 8, "residual": 7, "mlp": 4}.get(name, 0)
    return again / 12 / 3, 1 / 3 if name in ("full", "residual") else 0.0


def _moved_bytes(cfg: schema.Config, layout: placement.Layout, tokens: float) -> float:
    """Return the bytes that elementwise work reads and writes, fitted to compiled steps.

    - Layers: values of the compute format for each token and unit of d_model, 232 where most of the
      layer is recomputed, 265 where more is saved (175B, 13B, 857M). Microbatches of several rows
      that are gathered along the sequence over `tensor` are transposed: 24 values of the whole
      sequence, forward and backward together.
    - XLA's attention: 84 bytes a score, 111 with dropout, a third more where the forward pass runs
      again (857M).
    - Logits: 24 bytes an entry. Optimizer: 40 bytes a parameter.
    - Sums of gradients, and casts of weights: 16 bytes a parameter and microbatch; with stages 6 a
      step, and 18 a tick (2 + 2 to copy a weight, forward and backward, 10 to add its gradient).
    """
    model, sizes = cfg.model, layout.sizes
    values = 232 if cfg.model.remat in ("full", "residual", "mlp") else 265
    width = memory_model.width(cfg)
    layers = tokens * model.n_layers * values * width * model.d_model
    if sizes["tensor"] > 1 and cfg.mesh.sequence_parallel and cfg.batch.microbatch_size > 1:
        layers += tokens * model.n_layers * 24 * sizes["tensor"] * width * model.d_model
    score_bytes = (111 if model.attention_dropout else 84) * (1 + recompute_share(cfg)[1])
    scores = memory_model.scores(cfg, layout) * layout.n_microbatches
    layers += score_bytes * scores * model.n_layers / sizes["stage"]
    head = tokens * model.padded_vocab_size * 24
    held = memory_model.parameters(cfg, sizes, over_data=False)
    sums = 16.0 * layout.n_microbatches * held
    if sizes["stage"] > 1:
        ends = dataclasses.replace(cfg, model=dataclasses.replace(model, n_layers=0))
        in_layers = held - memory_model.parameters(ends, sizes, over_data=False)
        n_ticks = placement.schedule(cfg, layout).n_ticks
        sums = 6 * held + 18 * n_ticks * in_layers / cfg.mesh.virtual_stages
    optimizer = 40 * memory_model.parameters(cfg, sizes, over_data=cfg.mesh.shard_optimizer)
    return layers + head + sums + optimizer


def assumptions(layout: placement.Layout, *, compiled: bool) -> dict[str, Range]:
    """Return the entries of `ASSUMED` that an estimate uses."""
    names = ["matmul", "memory", "network"]
    if layout.attention == "cudnn":
        names.insert(1, "cudnn")
    if not compiled:
        names += [axis for axis, size in layout.sizes.items() if size > 1 and axis in ASSUMED]
    return {name: ASSUMED[name] for name in names}


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
    share = ASSUMED["network"].at(case)
    return dataclasses.replace(
        network,
        nvlink_bandwidth=network.nvlink_bandwidth * share,
        nic_bandwidth=network.nic_bandwidth * share,
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
    arithmetic = kernels["matmul"] + kernels["attention"] + kernels["elementwise"]
    alone = [_traffic(needed, layout, network) for needed in communication.collectives(cfg, layout)]
    traffic = _exposed(alone, layout, arithmetic, case)
    exposed = sum(row.exposed for row in traffic)
    parts = StepParts(
        seconds=arithmetic + exposed,
        **kernels,
        exposed=exposed,
        bubble=arithmetic * bubble,
        flops=1 / (1 - bubble) * (done.model_flops + done.recomputed_flops),
    )
    return StepTime(parts=parts, traffic=sorted(traffic, key=lambda row: -row.seconds))


def _kernel_seconds(
    cfg: schema.Config, layout: placement.Layout, gpu: gpus.Gpu, case: Case
) -> dict[str, float]:
    """Return the seconds of matmul, attention and elementwise, with idle ticks."""
    done, peak = work(cfg, layout), peak_flops(cfg, gpu)
    stretch = 1 / (1 - placement.schedule(cfg, layout).bubble)
    products = done.model_flops + done.recomputed_flops - done.attention_flops
    kind = "cudnn" if layout.attention == "cudnn" else "matmul"
    memory_rate = gpu.memory_bandwidth * ASSUMED["memory"].at(case)
    return {
        "matmul": stretch * products / (peak * ASSUMED["matmul"].at(case)),
        "attention": stretch * done.attention_flops / (peak * ASSUMED[kind].at(case)),
        "elementwise": stretch * done.moved_bytes / memory_rate,
    }


def _traffic(
    needed: communication.Needed, layout: placement.Layout, network: gpus.Network
) -> Traffic:
    """Return the time of a collective alone, with nothing exposed."""
    each = communication.collective(needed.kind, needed.axis, needed.n_bytes, layout, network)
    seconds = network.seconds(each.crossing_bytes, each.group_size, each.in_node)
    return Traffic(
        kind=needed.kind,
        axis=needed.axis,
        count=needed.count,
        bytes_per_step=needed.count * each.crossing_bytes,
        network=network.bandwidth(each.group_size, each.in_node)[0],
        seconds=needed.count * seconds,
        exposed=0.0,
    )


def _exposed(
    traffic: list[Traffic], layout: placement.Layout, arithmetic: float, case: Case
) -> list[Traffic]:
    """Return the collectives with their exposed seconds.

    A share of each axis's communication is exposed, and so is the time that exceeds the arithmetic.
    """
    busy = {axis: sum(row.seconds for row in traffic if row.axis == axis) for axis in layout.sizes}
    shares = {axis: ASSUMED[axis].at(case) for axis in busy if axis in ASSUMED}
    shares["fsdp"] = min(1.0, shares["fsdp"] * (2 * busy["fsdp"] / arithmetic) ** 2)
    exposed = [dataclasses.replace(row, exposed=shares[row.axis] * row.seconds) for row in traffic]
    hidden = sum(row.seconds - row.exposed for row in exposed)
    if hidden <= arithmetic:
        return exposed
    share = 1 - arithmetic / hidden  # there is not enough arithmetic to hide the rest
    return [
        dataclasses.replace(row, exposed=row.exposed + share * (row.seconds - row.exposed))
        for row in exposed
    ]


def _by_schedule(
    cfg: schema.Config,
    layout: placement.Layout,
    gpu: gpus.Gpu,
    network: gpus.Network,
    case: Case,
    program: hlo.Program,
) -> StepTime:
    walked = timeline.walk(program, layout.sizes, _rates(cfg, gpu, network, case))
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
    )
    return StepTime(parts=parts, traffic=traffic)


def _rates(cfg: schema.Config, gpu: gpus.Gpu, network: gpus.Network, case: Case) -> timeline.Rates:
    peak = peak_flops(cfg, gpu)
    return timeline.Rates(
        matmul=peak * ASSUMED["matmul"].at(case),
        attention=peak * ASSUMED["cudnn"].at(case),
        memory=gpu.memory_bandwidth * ASSUMED["memory"].at(case),
        memory_peak=gpu.memory_bandwidth,
        network=network,
    )


def peak_flops(cfg: schema.Config, gpu: gpus.Gpu) -> float:
    """Return a GPU's peak FLOP/s in the config's compute format."""
    name = re.sub(r"\bA100-", "A100 ", gpu.name)
    peak = flops.peak_flops(name, cfg.precision.compute_dtype)
    assert peak, f"flops knows no peak of {gpu.name}"
    return peak
