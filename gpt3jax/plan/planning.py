"""A plan from end to end: layouts, compiled steps, report, files."""

import dataclasses
import json
import sys
from collections.abc import Callable

from rich import console

from gpt3jax import errors
from gpt3jax.config import batch_schedule, layout, recipe, schema, user_paths, validation
from gpt3jax.data import skipped_samples
from gpt3jax.hardware import gpus
from gpt3jax.model import attention, triton_attention
from gpt3jax.plan import (
    compiled_search,
    compiler,
    html_page,
    options,
    ranking,
    report,
    step_choice,
    step_report,
    terminal,
)


def plan(request: options.Options, overrides: list[str], command_line: str) -> report.Report:
    """Print the plan, write the files that were asked for, and return the report.

    `overrides` are options of the recipe; the page shows `command_line`.

    Raises:
        UserError: the config, the number of GPUs or a file cannot be used.
    """
    width = None if sys.stdout.isatty() else 120
    out = console.Console(width=width, markup=False, emoji=False)  # it prints users' text
    missing = compiler.missing_extra() if request.compile else "--no-compile was given"
    if request.dump_hlo and missing:
        raise errors.UserError(f"--dump-hlo needs the compiled step: {missing}", page="plan.md")
    planner = _planner(request, overrides, out, compiles=not missing)
    notes: list[str] = []

    def note(line: str) -> None:
        notes.append(line)
        planner.say(line)

    layouts, searched = _layouts(request, planner, note)
    chosen, steps = step_choice.choose(planner, layouts)
    if line := _faster_attention(planner.cfg, chosen):
        note(line)
    built = report.build(planner.cfg, chosen, steps, planner.target, notes)
    built = dataclasses.replace(built, search=searched)
    terminal.show(built, out)
    if missing and request.compile:
        out.print(f"Not compiled, all figures are by closed forms: {missing}", soft_wrap=True)
    _write(request, built, chosen, command_line)
    if request.dump_hlo:
        user_paths.write(request.dump_hlo, _program(steps[planner.cfg.batch.global_batch_size]))
    return built


def _faster_attention(cfg: schema.Config, chosen: ranking.Ranking) -> str:
    full = chosen.by_size[cfg.batch.global_batch_size][0].fields
    dtype, n_shards = cfg.precision.compute_dtype, full["mesh.context"]
    return attention.missing_extra(cfg.model, dtype, "gpu", n_shards)


def _planner(
    request: options.Options, overrides: list[str], out: console.Console, *, compiles: bool
) -> step_choice.Planner:
    recipe_args = options.recipe_args(request, overrides)
    return step_choice.Planner(
        cfg=_parse(recipe_args),
        recipe_args=recipe_args,
        target=_target(request),
        compiles=compiles,
        say=lambda line: out.print(line, highlight=False, soft_wrap=True),
    )


def _target(request: options.Options) -> step_report.Target:
    gpu = gpus.find(request.gpu)
    triton_attention.assume_gpu(gpu.capability)  # this process must not ask for devices
    network = gpus.network_of(
        gpu,
        request.gpus_per_node,
        1e9 * request.nvlink_gbytes if request.nvlink_gbytes else None,
        1e9 * request.nic_gbytes if request.nic_gbytes else None,
        1e-6 * request.latency_us,
    )
    return step_report.Target(gpu=gpu, network=network, price=request.price)


def _parse(recipe_args: list[str]) -> schema.Config:
    """Return the config of a whole run, from its first step to its last.

    Raises:
        UserError: as `recipe.parse`; or its schedules are longer than the run.
    """
    cfg = recipe.parse(recipe_args, "gpt3jax.plan")
    schedule = batch_schedule.from_config(cfg.batch, cfg.model.seq_len)
    validation.check_schedule(cfg.optimizer, skipped_samples.run_length(cfg, schedule)[1])
    return cfg


def _layouts(
    request: options.Options, planner: step_choice.Planner, note: Callable[[str], None]
) -> tuple[ranking.Ranking, list[report.SearchedLayout]]:
    """Return the layouts that a run would use, and the figures of a search.

    Raises:
        UserError: there are no layouts, or a search has nothing to look for.
    """
    cfg, target = planner.cfg, planner.target
    if not request.search:
        found = ranking.of_config(cfg, request.gpus, target.gpu, target.network, note)
        return found, []
    if cfg.layouts or not layout.automatic(cfg):
        reason = f"layouts={cfg.layouts} has them" if cfg.layouts else "the recipe gives one"
        raise errors.UserError(
            f"--search finds no layouts where {reason}: leave it out, or let a field of the layout "
            "be auto, as in --mesh.fsdp=auto",
            page="plan.md#options",
        )
    return compiled_search.find(planner, request.gpus, request.n_compiled, note)


def _write(
    request: options.Options, built: report.Report, chosen: ranking.Ranking, command_line: str
) -> None:
    if request.json:
        user_paths.write(request.json, json.dumps(report.as_json(built), indent=2) + "\n")
    if request.html:
        user_paths.write(request.html, html_page.render(built, command_line))
    if request.write_layouts:
        text = json.dumps(ranking.as_json(chosen), indent=2)
        user_paths.write(request.write_layouts, text + "\n")


def _program(full: step_report.StepReport | str) -> str:
    """Return the text of a compiled step."""
    assert isinstance(full, step_report.StepReport) and full.compiled, "it was compiled"
    return full.compiled.text
