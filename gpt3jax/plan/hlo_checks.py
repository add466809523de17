"""Checks that a compiled step was read completely: it must have all parts that the config needs.

XLA's text has no specification. A part that a version writes in another way is not recognised, and
would count as no time or a wrong one. So a plan is refused where its parts do not add up.
"""

import collections

from gpt3jax.config import schema
from gpt3jax.plan import compiler, hlo, memory_model, placement, time_model, timeline

# Bounds of a program's FLOPs, as shares of the model's with recomputation. Compiled steps have 1.00
# to 1.02, 1.10 where XLA computes parts of a layer once more, and a pipeline's idle ticks.
LEAST, MOST = 0.9, 1.5
# Lower bound of the bytes over an axis, as a share of the closed forms': compiled steps have 1.0 to
# 1.9.
LEAST_SENT = 0.6


def check(
    cfg: schema.Config,
    layout: placement.Layout,
    compiled: compiler.Compiled,
    time: time_model.StepTime,
    closed_forms: time_model.StepTime,
) -> None:
    """Check that memory, products, attention, costs and collectives were read.

    `time` is by the compiled step's schedule; `closed_forms` gives the traffic that it needs.

    Raises:
        UserError: one of them is missing or wrong.
    """
    if not 0 < compiled.argument_bytes <= compiled.peak_bytes:
        raise hlo.unreadable(
            f"its peak of {compiled.peak_bytes:,} bytes does not hold its state and batch of "
            f"{compiled.argument_bytes:,}"
        )
    if not compiled.largest_buffers:
        raise hlo.unreadable("no temporary array was found in its report on memory")
    if not timeline.COST.search(compiled.text):
        raise hlo.unreadable("no cost of XLA's model was found")
    _check_flops(cfg, layout, time.parts.flops)
    _check_8_bits(cfg, layout, time.parts.flops_8_bits)
    _check_attention(cfg, layout, compiled)
    if time.traffic and '"is_sync"' not in compiled.text:
        raise hlo.unreadable("no collective says whether arithmetic runs beside it")
    _check_traffic(time.traffic, closed_forms.traffic)


def _check_flops(cfg: schema.Config, layout: placement.Layout, n_flops: float) -> None:
    work = time_model.work(cfg, layout)
    needed = work.model_flops + work.recomputed_flops
    # XLA's attention computes whole blocks, and so for a band many scores that the model does not
    # count: 2 products of 2 FLOPs forward, again where it is recomputed, and 5 backward.
    scores = memory_model.scores(cfg, layout) * layout.n_microbatches * cfg.model.n_layers
    of_scores = 18 * cfg.model.d_head * scores / layout.sizes["stage"]
    busy = 1 - placement.schedule(cfg, layout).bubble
    if not LEAST * needed <= n_flops <= MOST * (needed + of_scores) / busy:
        raise hlo.unreadable(
            f"products and attention of {n_flops:.3g} FLOPs a GPU were found, and it needs "
            f"{needed:.3g}"
        )


def _check_8_bits(cfg: schema.Config, layout: placement.Layout, n_flops: float) -> None:
    needed = time_model.flops_8_bits(cfg, layout)
    if n_flops < LEAST * needed:
        raise hlo.unreadable(
            f"products in 8 bits of {n_flops:.3g} FLOPs a GPU were found, and the layers have "
            f"{needed:.3g}"
        )


def _check_attention(
    cfg: schema.Config, layout: placement.Layout, compiled: compiler.Compiled
) -> None:
    # With cuDNN, XLA computes a band over a split sequence.
    split = layout.sizes["context"] > 1 and cfg.model.attention.pattern == "alternating"
    by_xla = compiled.attention == "xla" or (compiled.attention == "cudnn" and split)
    if not by_xla and not all(compiled.fused_attention.values()):
        raise hlo.unreadable(
            f"attention by {compiled.attention} was not found, although the step asks for it"
        )


def _check_traffic(
    traffic: list[time_model.Traffic], closed_forms: list[time_model.Traffic]
) -> None:
    sent, needed = _bytes_by_axis(traffic), _bytes_by_axis(closed_forms)
    for axis, n_bytes in needed.items():
        # A band needs few of the keys and values; the closed forms count all.
        share = 0.0 if axis == "context" else LEAST_SENT
        if not sent[axis] or sent[axis] < share * n_bytes:
            raise hlo.unreadable(
                f"collectives over mesh.{axis} were found that send {sent[axis]:.3g} bytes a GPU, "
                f"and it needs {n_bytes:.3g}"
            )


def _bytes_by_axis(traffic: list[time_model.Traffic]) -> dict[str, float]:
    sent: dict[str, float] = collections.defaultdict(float)
    for row in traffic:
        for axis in row.axis.split("+"):
            sent[axis] += row.bytes_per_step
    return sent
