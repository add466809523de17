"""A plan from end to end: search, compile, report, write."""

import dataclasses
import json
import sys

from rich import console

from gpt3jax import errors
from gpt3jax.config import batch_schedule, recipe, schema, user_paths, validation
from gpt3jax.data import skipped_samples
from gpt3jax.hardware import gpus
from gpt3jax.plan import (
    compiler,
    html_page,
    options,
    placement,
    report,
    report_rows,
    search,
    terminal,
)

MORE_COMPILED = 4  # layouts that a search compiles beyond --n-compiled while none fits


def plan(request: options.Options, overrides: list[str], command_line: str) -> report.Report:
    """Print the plan, write the files that were asked for, and return the report.

    `overrides` are options of the recipe; the page shows `command_line`.

    Raises:
        UserError: the config, the number of GPUs or a file cannot be used.
    """
    target = _target(request)
    recipe_args = options.recipe_args(request, overrides)
    width = None if sys.stdout.isatty() else 120
    out = console.Console(width=width, markup=False, emoji=False)  # it prints users' text
    missing = compiler.missing_extra() if request.compile else "--no-compile was given"
    if request.dump_hlo and missing:
        raise errors.UserError(f"--dump-hlo needs the compiled step: {missing}", page="plan.md")
    searched: list[report.SearchedLayout] = []
    if request.search:
        searched = _search(recipe_args, request, target, out, compiles=not missing)
        recipe_args = [*recipe_args, *searched[0].overrides]
    cfg = _parse(recipe_args)
    layout = placement.lay_out(cfg, request.gpus, target.network.gpus_per_node)
    compiled = None
    if not missing:
        _print_estimate(report.build(cfg, layout, target, None), out)
        compiled = _compile(cfg, recipe_args, layout, target)
    built = dataclasses.replace(report.build(cfg, layout, target, compiled), search=searched)
    terminal.show(built, out)
    if missing and request.compile:
        out.print(f"Not compiled, all figures are by closed forms: {missing}", soft_wrap=True)
    _write(request, built, compiled, command_line)
    return built


def _target(request: options.Options) -> report.Target:
    gpu = gpus.find(request.gpu)
    network = gpus.network_of(
        gpu,
        request.gpus_per_node,
        1e9 * request.nvlink_gbytes if request.nvlink_gbytes else None,
        1e9 * request.nic_gbytes if request.nic_gbytes else None,
        1e-6 * request.latency_us,
    )
    return report.Target(gpu=gpu, network=network, price=request.price)


def _parse(recipe_args: list[str]) -> schema.Config:
    """Return the config of a whole run, from its first step to its last.

    Raises:
        UserError: as `recipe.parse`; or its schedules are longer than the run.
    """
    cfg = recipe.parse(recipe_args, "gpt3jax.plan")
    schedule = batch_schedule.from_config(cfg.batch, cfg.model.seq_len)
    validation.check_schedule(cfg.optimizer, skipped_samples.run_length(cfg, schedule)[1])
    return cfg


def _print_estimate(estimate: report.Report, out: console.Console) -> None:
    """Print the figures of the closed forms, for the minutes until the step is compiled."""
    out.print(
        f"By closed forms: {estimate.peak.peak_bytes_per_gpu / report_rows.GIB:.1f} GiB a GPU, "
        f"{estimate.time.step_seconds.expected:.3g} s a step. Compiling the step ..."
    )


def _compile(
    cfg: schema.Config, recipe_args: list[str], layout: placement.Layout, target: report.Target
) -> compiler.Compiled:
    return compiler.compile_step(cfg, recipe_args, layout.sizes, target.gpu, target.network)


def _write(
    request: options.Options,
    built: report.Report,
    compiled: compiler.Compiled | None,
    command_line: str,
) -> None:
    if request.json:
        user_paths.write(request.json, json.dumps(report.as_json(built), indent=2) + "\n")
    if request.html:
        user_paths.write(request.html, html_page.render(built, command_line))
    if request.dump_hlo and compiled:
        user_paths.write(request.dump_hlo, compiled.text)


def _search(
    recipe_args: list[str],
    request: options.Options,
    target: report.Target,
    out: console.Console,
    *,
    compiles: bool,
) -> list[report.SearchedLayout]:
    """Print and return the best layouts: those that fit first, then by time.

    Raises:
        UserError: none fits by closed forms, or none compiled.
    """
    candidates = search.candidates(_parse(recipe_args), request.gpus, target.gpu, target.network)
    out.print(f"{len(candidates):,} layouts fit, by closed forms.")
    queue = search.Queue(candidates, target.gpu)
    layouts: list[report.SearchedLayout] = []
    while candidate := queue.next():
        n = len(layouts)
        if n >= request.n_compiled and any(layout.fits for layout in layouts):
            break
        if n >= max(request.n_compiled, 1) + MORE_COMPILED:
            break
        if compiles:
            options_text = " ".join(candidate.overrides)
            out.print(f"Compiling layout {n + 1}: {options_text}", soft_wrap=True)
        layouts.append(_searched(candidate, recipe_args, target, compiles=compiles))
        if layouts[-1].peak_bytes_per_gpu and compiles:
            queue.note(candidate, layouts[-1].peak_bytes_per_gpu)
    layouts.sort(key=lambda row: (bool(row.failed), not row.fits, row.step_seconds or 0))
    if all(layout.failed for layout in layouts):
        raise errors.UserError(
            f"none of {len(layouts)} layouts compiled: {layouts[0].failed}",
            page="plan.md#where-the-figures-come-from",
        )
    terminal.show_search(layouts, out)
    return layouts


def _searched(
    candidate: search.Candidate, recipe_args: list[str], target: report.Target, *, compiles: bool
) -> report.SearchedLayout:
    """Return the figures of a layout; a search goes on after one that does not compile."""
    searched = report.SearchedLayout(
        overrides=list(candidate.overrides),
        drops_schedule=candidate.drops_schedule,
        step_seconds_closed_form=candidate.seconds,
    )
    cfg, layout = candidate.cfg, candidate.layout
    try:
        args = [*recipe_args, *candidate.overrides]
        compiled = _compile(cfg, args, layout, target) if compiles else None
        built = report.build(cfg, layout, target, compiled)
    except errors.UserError as error:
        return dataclasses.replace(searched, failed=error.message)
    return dataclasses.replace(
        searched,
        fits=built.peak.fits,
        peak_bytes_per_gpu=built.peak.peak_bytes_per_gpu,
        step_seconds=built.time.step_seconds.expected,
        mfu=built.time.mfu,
    )
