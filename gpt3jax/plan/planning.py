"""A plan from end to end: search, compile, report, write."""

import json
import sys
from typing import Any

from rich import console

from gpt3jax import errors
from gpt3jax.config import batch_schedule, recipe, schema, user_paths, validation
from gpt3jax.data import skipping
from gpt3jax.hardware import gpus
from gpt3jax.plan import compiler, memory_model, options, page, report, rows, search, terminal

MORE_COMPILED = 4  # layouts that a search goes on with where those it compiled do not fit


def plan(given: options.Options, overrides: list[str], told: str) -> dict[str, Any]:
    """Print the plan, write the files that were asked for, and return the report.

    `told` is the command line, for the page.

    Raises:
        UserError: the config, the number of GPUs or a file does not serve.
    """
    gpu = gpus.find(given.gpu)
    network = gpus.network_of(
        gpu,
        given.gpus_per_node,
        1e9 * given.nvlink_gbytes if given.nvlink_gbytes else None,
        1e9 * given.nic_gbytes if given.nic_gbytes else None,
        1e-6 * given.latency_us,
    )
    recipe_args = options.recipe_args(given, overrides)
    target = report.Target(gpu=gpu, network=network, price=given.price)
    width = None if sys.stdout.isatty() else 120
    out = console.Console(width=width, markup=False, emoji=False)  # it prints users' text
    missing = compiler.missing_extra() if given.compile else "as --no-compile says"
    if given.dump_hlo and missing:
        raise errors.UserError(f"--dump-hlo needs the compiled step: {missing}")
    searched: list[dict[str, Any]] = []
    if given.search:
        searched = _search(recipe_args, given, target, bool(missing), out)
        recipe_args = [*recipe_args, *searched[0]["overrides"]]
    cfg = _parse(recipe_args)
    layout = memory_model.lay_out(cfg, given.gpus, network.gpus_per_node)
    compiled = None
    if not missing:
        found = report.build(cfg, layout, target, None)
        out.print(
            f"By closed forms: {found['peak_bytes_per_gpu'] / rows.GIB:.1f} GiB a GPU, "
            f"{found['step_seconds']['expected']:.3g} s a step. Compiling the step ..."
        )
        compiled = compiler.compile_step(cfg, recipe_args, layout.sizes, gpu, network)
    found = report.build(cfg, layout, target, compiled) | {"search": searched}
    terminal.show(found, out)
    if missing and given.compile:
        out.print(f"Not compiled, all figures are by closed forms: {missing}", soft_wrap=True)
    if given.json:
        user_paths.write(given.json, json.dumps(found, indent=2) + "\n")
    if given.html:
        user_paths.write(given.html, page.render(found, told))
    if given.dump_hlo and compiled:
        user_paths.write(given.dump_hlo, compiled.text)
    return found


def _parse(recipe_args: list[str]) -> schema.Config:
    """Return the config of a run from its first step to its last.

    Raises:
        UserError: as `recipe.parse`; its schedules do not fit in the run.
    """
    cfg = recipe.parse(recipe_args, "gpt3jax.plan")
    schedule = batch_schedule.from_config(cfg.batch, cfg.model.seq_len)
    validation.check_schedule(cfg.optimizer, skipping.run_length(cfg, schedule)[1])
    return cfg


def _search(
    recipe_args: list[str],
    given: options.Options,
    target: report.Target,
    closed_forms_only: bool,
    out: console.Console,
) -> list[dict[str, Any]]:
    """Print and return the best layouts, those that fit first, then by time.

    Raises:
        UserError: none fits by closed forms, or none compiled.
    """
    cfg = _parse(recipe_args)
    found = search.candidates(cfg, given.gpus, target.gpu, target.network)
    queue = search.Queue(found, target.gpu)
    out.print(f"{len(found):,} layouts fit, by closed forms.")
    layouts: list[dict[str, Any]] = []
    while one := queue.next():
        i = len(layouts)
        if i >= given.n_compiled and any(row["fits"] for row in layouts):
            break
        if i >= max(given.n_compiled, 1) + MORE_COMPILED:
            break
        if not closed_forms_only:
            out.print(f"Compiling layout {i + 1}: {' '.join(one.overrides)}", soft_wrap=True)
        layouts.append(_searched(one, recipe_args, target, closed_forms_only))
        if layouts[-1]["peak_bytes_per_gpu"] and not closed_forms_only:
            queue.note(one, layouts[-1]["peak_bytes_per_gpu"])
    layouts.sort(key=lambda row: (bool(row["failed"]), not row["fits"], row["step_seconds"] or 0))
    if all(row["failed"] for row in layouts):
        raise errors.UserError(f"none of {len(layouts)} layouts compiled: {layouts[0]['failed']}")
    terminal.show_search(layouts, out)
    return layouts


def _searched(
    one: search.Candidate, recipe_args: list[str], target: report.Target, closed_forms_only: bool
) -> dict[str, Any]:
    """Return what is reported of a layout; one that does not compile is no reason to stop."""
    row = {
        "overrides": list(one.overrides),
        "drops_schedule": one.drops_schedule,
        "failed": "",
        "fits": False,
        "peak_bytes_per_gpu": None,
        "step_seconds": None,
        "step_seconds_closed_form": one.seconds,
        "mfu": None,
    }
    try:
        compiled = None
        if not closed_forms_only:
            args = [*recipe_args, *one.overrides]
            compiled = compiler.compile_step(
                one.cfg, args, one.layout.sizes, target.gpu, target.network
            )
        built = report.build(one.cfg, one.layout, target, compiled)
    except errors.UserError as error:
        return row | {"failed": str(error)}
    row |= {name: built[name] for name in ("fits", "peak_bytes_per_gpu", "mfu")}
    return row | {"step_seconds": built["step_seconds"]["expected"]}
