"""The step of each batch size: the first of its layouts that fits, compiled or by closed forms.

So does a run (`gpt3jax.main`), which compiles for the devices that it has.
"""

import dataclasses
from collections.abc import Callable, Sequence

from gpt3jax import errors
from gpt3jax.config import batch_schedule, layout, schema
from gpt3jax.plan import compiler, placement, ranking, step_report, whole_run

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planner:
    """Plans steps of one recipe for one kind of GPU."""

    cfg: schema.Config
    recipe_args: list[str]
    """The command line of `cfg`."""
    target: step_report.Target
    compiles: bool
    """Whether steps are compiled, not only calculated by closed forms."""
    say: Callable[[str], None]
    """Gets lines for who waits."""

    def step(self, batch_size: int, fields: layout.Layout) -> step_report.StepReport:
        """Return the step of a batch size in a layout.

        Raises:
            UserError: the layout is not possible, or the step cannot be compiled or read.
        """
        cfg = layout.with_layout(layout.at_batch_size(self.cfg, batch_size), fields)
        cfg = dataclasses.replace(cfg, layouts="")
        gpus_per_node = self.target.network.gpus_per_node
        placed = placement.lay_out(cfg, layout.n_devices(fields), gpus_per_node)
        estimate = step_report.build(cfg, placed, self.target, None)
        if not self.compiles:
            return estimate
        self.say(
            f"Batch of {batch_size:,}: {layout.in_words(fields)}: by closed forms "
            f"{estimate.peak.peak_bytes_per_gpu / GIB:.1f} GiB a GPU and "
            f"{estimate.time.step_seconds.expected:.3g} s a step. Compiling the step ..."
        )
        args = [*self.recipe_args, "--layouts=", *options(batch_size, fields)]
        compiled = compiler.compile_step(
            cfg, args, placed.sizes, self.target.gpu, self.target.network
        )
        return step_report.build(cfg, placed, self.target, compiled)


def options(batch_size: int, fields: layout.Layout) -> list[str]:
    """Return the options that make a recipe this batch size, from the first step on, and layout."""
    batch = [f"--batch.global-batch-size={batch_size}", "--batch.schedule=", "--batch.ramp"]
    return [*batch, *layout.options(fields)]


def choose(planner: Planner, layouts: ranking.Ranking) -> tuple[ranking.Ranking, whole_run.Steps]:
    """Return the step of each batch size, and the layouts that begin with those of the steps.

    Raises:
        UserError: a layout is not possible, or a step cannot be compiled or read.
    """
    steps: dict[int, step_report.StepReport | str] = {}
    by_size: dict[int, Sequence[ranking.Ranked]] = {}
    for size, rows in layouts.by_size.items():
        refusal = _refusal(planner.cfg, size, rows[0].fields)
        steps[size], by_size[size] = (refusal, rows) if refusal else _first(planner, size, rows)
    return dataclasses.replace(layouts, by_size=by_size), steps


def _refusal(cfg: schema.Config, size: int, fields: layout.Layout) -> str:
    """Return why a smaller batch cannot be cut like this, "" if it can."""
    if size == cfg.batch.global_batch_size:
        return ""  # without a full batch there is no plan: an error
    schedule = batch_schedule.from_config(cfg.batch, cfg.model.seq_len)
    n_ranks = fields["mesh.data"] * fields["mesh.fsdp"]
    try:
        batch_schedule.check_size(schedule, size, fields["batch.microbatch_size"], n_ranks)
    except errors.UserError as error:
        return str(error)
    return ""


def _first(
    planner: Planner, size: int, rows: Sequence[ranking.Ranked]
) -> tuple[step_report.StepReport, list[ranking.Ranked]]:
    """Return the first step that fits, or the smallest, and its layout with those after it."""
    tried = []
    for i, row in enumerate(rows):
        tried.append(planner.step(size, row.fields))
        if tried[-1].peak.fits:
            return tried[-1], [ranked(tried[-1]), *rows[i + 1 :]]
    smallest = min(tried, key=lambda step: step.peak.peak_bytes_per_gpu)
    return smallest, [ranked(step) for step in tried]


def ranked(step: step_report.StepReport) -> ranking.Ranked:
    """Return the layout of a step with its figures."""
    return ranking.Ranked(
        fields=layout.of(step.cfg),
        step_seconds=step.time.step_seconds.expected,
        peak_bytes=step.peak.peak_bytes_per_gpu,
        is_compiled=step.compiled is not None,
    )
