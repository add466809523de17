"""Whether a compiled step was read whole: what was found in it against what must be there.

XLA's text has no specification. What a version writes in another way is not recognised and takes
no time, or a wrong one, so a plan is refused where its parts do not add up.
"""

from gpt3jax import config
from gpt3jax.plan import compiler, hlo, memory_model, time_model, timeline

# Of the model's FLOPs with what is computed again: compiled steps have 1.00 to 1.02, 1.10 where XLA
# computes parts of a layer once more, and idle ticks of a pipeline.
LEAST, MOST = 0.9, 1.5


def check(
    cfg: config.Config,
    layout: memory_model.Layout,
    compiled: compiler.Compiled,
    time: time_model.StepTime,
) -> None:
    """Check that memory, products, attention, costs and collectives were found; `time` has them.

    Raises:
        UserError: one was not.
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
    _check_flops(cfg, layout, time.flops)
    _check_attention(cfg, layout, compiled)
    if time.traffic and '"is_sync"' not in compiled.text:
        raise hlo.unreadable("no collective tells whether arithmetic goes on beside it")
    axes = {axis for one in time.traffic for axis in one.axis.split("+")}
    for axis, size in layout.sizes.items():
        if size > 1 and axis not in axes:
            raise hlo.unreadable(f"no collective over mesh.{axis}={size} was found")


def _check_flops(cfg: config.Config, layout: memory_model.Layout, found: float) -> None:
    work = time_model.work(cfg, layout)
    needed = work.model_flops + work.recomputed_flops
    # XLA's attention works out whole blocks, of a band many scores that the model does not count:
    # 2 products of 2 FLOPs forward, again where it is recomputed, and 5 backward.
    scores = memory_model.scores(cfg, layout) * layout.n_microbatches * cfg.model.n_layers
    of_xla = 18 * cfg.model.d_head * scores / layout.sizes["stage"]
    busy = 1 - time_model.schedule(cfg, layout).bubble
    if not LEAST * needed <= found <= MOST * (needed + of_xla) / busy:
        raise hlo.unreadable(
            f"products and attention of {found:.3g} FLOPs a GPU were found, and it needs {needed:.3g}"
        )


def _check_attention(
    cfg: config.Config, layout: memory_model.Layout, compiled: compiler.Compiled
) -> None:
    # A band over a split sequence is XLA's work.
    split = layout.sizes["context"] > 1 and cfg.model.attention.pattern == "alternating"
    if compiled.attention == "cudnn" and not split and not all(compiled.cudnn.values()):
        raise hlo.unreadable("cuDNN's attention was not found, which the step has asked for")
