"""`python -m gpt3jax.plan --config=RECIPE.py --gpus=N [--gpu=h100] [--group.field VALUE ...]`.

Says, without a GPU, what a config's step takes on a pod: memory, collectives, time, cost. Closed
forms come at once; with the extra `plan` the true step is compiled as well. Further options
override the recipe, as in gpt3jax.main.
"""

import dataclasses
import json
import math
import os
import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import tyro
from rich import console

from gpt3jax import batch_schedule, command, config, gpus, recipe, skipping, validation
from gpt3jax.plan import compiler, memory_model, page, report, rows, search, terminal

MORE_COMPILED = 4  # layouts that a search goes on with where those it compiled do not fit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is planned for, and what to write."""

    config: str
    """The recipe, configs/*.py."""
    gpus: int
    """How many GPUs."""
    gpu: str = "h100"
    """Their kind: h100, h200, a100 (80 GB) or b200."""
    search: bool = False
    """Look for the fastest layout that fits: mesh, microbatch, remat, sharded optimizer."""
    n_compiled: int = 4
    """How many of the layouts that --search finds are compiled; if none fits, up to 4 more."""
    compile: bool = True
    """Compile the step; --no-compile gives closed forms only."""
    json: str = ""
    """File for the report."""
    html: str = ""
    """File for the report as a page."""
    dump_hlo: str = ""
    """File for the compiled program."""
    verify: bool = False
    """Exit with 1 if the run does not fit or would be refused."""
    price: float = 0.0
    """Of a GPU-hour, in any currency."""
    gpus_per_node: int = 8
    """GPUs that NVLink joins. This and the next three change the plan, not a run's settings."""
    nvlink_gbytes: float | None = None
    """GB/s that a GPU reaches in one direction inside a node; left out: 80% of the data sheet's."""
    nic_gbytes: float | None = None
    """GB/s that a GPU reaches in one direction between nodes; left out: 90% of its card's."""
    latency_us: float = 10.0
    """Microseconds to start a collective, and as many per doubling of its group."""


def main(args: Sequence[str] | None = None) -> int:
    """Plan and report; the exit status is 2 for errors, 1 where --verify finds that it fails."""
    args = sys.argv[1:] if args is None else list(args)
    options, recipe_args = tyro.cli(
        Options, args=args, prog="python -m gpt3jax.plan", description=__doc__,
        return_unknown_args=True,
    )  # fmt: skip
    told = shlex.join(["python", "-m", "gpt3jax.plan", *args])

    def verified() -> int:
        found = plan(options, recipe_args, told)
        if options.verify and (found["problems"] or not found["fits"]):
            sys.stderr.write("gpt3jax: --verify: this run would fail, as said above\n")
            return 1
        return 0

    return command.run(verified)


def plan(options: Options, recipe_args: list[str], told: str) -> dict[str, Any]:
    """Print the plan, write the files that were asked for, and return the report.

    `told` is the command line, for the page.

    Raises:
        UserError: the config, the number of GPUs or a file does not serve.
    """
    for path in filter(None, (options.json, options.html, options.dump_hlo)):
        _check_writable(path)
    gpu = gpus.find(options.gpu)
    network = _network(gpu, options)
    target = report.Target(gpu=gpu, network=network, price=options.price)
    recipe_args = [
        f"--config={options.config}",
        *recipe_args,
        *_corpus(options.config, recipe_args),
    ]
    width = None if sys.stdout.isatty() else 120
    out = console.Console(width=width, markup=False, emoji=False)  # it prints users' text
    missing = compiler.missing_extra() if options.compile else "as --no-compile says"
    if options.dump_hlo and missing:
        raise config.UserError(f"--dump-hlo needs the compiled step: {missing}")
    searched: list[dict[str, Any]] = []
    if options.search:
        searched = _search(recipe_args, options, target, bool(missing), out)
        recipe_args += searched[0]["overrides"]
    cfg = _parse(recipe_args)
    layout = memory_model.lay_out(cfg, options.gpus, network.gpus_per_node)
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
    if missing and options.compile:
        out.print(f"Not compiled, all figures are by closed forms: {missing}", soft_wrap=True)
    if options.json:
        _write(options.json, json.dumps(found, indent=2) + "\n")
    if options.html:
        _write(options.html, page.render(found, told))
    if options.dump_hlo and compiled:
        _write(options.dump_hlo, compiled.text)
    return found


def _parse(recipe_args: list[str]) -> config.Config:
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
    options: Options,
    target: report.Target,
    closed_forms_only: bool,
    out: console.Console,
) -> list[dict[str, Any]]:
    """Print and return the best layouts, those that fit first, then by time.

    Raises:
        UserError: none fits by closed forms, or none compiled.
    """
    cfg = _parse(recipe_args)
    found = search.candidates(cfg, options.gpus, target.gpu, target.network)
    queue = search.Queue(found, target.gpu)
    out.print(f"{len(found):,} layouts fit, by closed forms.")
    layouts: list[dict[str, Any]] = []
    while one := queue.next():
        i = len(layouts)
        if i >= options.n_compiled and any(row["fits"] for row in layouts):
            break
        if i >= max(options.n_compiled, 1) + MORE_COMPILED:
            break
        if not closed_forms_only:
            out.print(f"Compiling layout {i + 1}: {' '.join(one.overrides)}", soft_wrap=True)
        layouts.append(_searched(one, recipe_args, target, closed_forms_only))
        if layouts[-1]["peak_bytes_per_gpu"] and not closed_forms_only:
            queue.note(one, layouts[-1]["peak_bytes_per_gpu"])
    layouts.sort(key=lambda row: (bool(row["failed"]), not row["fits"], row["step_seconds"] or 0))
    if all(row["failed"] for row in layouts):
        raise config.UserError(f"none of {len(layouts)} layouts compiled: {layouts[0]['failed']}")
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
    compiled = None
    if not closed_forms_only:
        args = [*recipe_args, *one.overrides]
        try:
            compiled = compiler.compile_step(
                one.cfg, args, one.layout.sizes, target.gpu, target.network
            )
        except config.UserError as error:
            return row | {"failed": str(error)}
    built = report.build(one.cfg, one.layout, target, compiled)
    row |= {name: built[name] for name in ("fits", "peak_bytes_per_gpu", "mfu")}
    return row | {"step_seconds": built["step_seconds"]["expected"]}


def _network(gpu: gpus.Gpu, options: Options) -> gpus.Network:
    for name in ("nvlink_gbytes", "nic_gbytes", "latency_us", "gpus_per_node"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise config.UserError(
                f"--{name.replace('_', '-')}={value} must be above 0, and finite"
            )
    if not 0 <= options.price < math.inf:
        raise config.UserError(f"--price={options.price} must be 0 or above, and finite")
    return gpus.network_of(
        gpu,
        options.gpus_per_node,
        1e9 * options.nvlink_gbytes if options.nvlink_gbytes else None,
        1e9 * options.nic_gbytes if options.nic_gbytes else None,
        1e-6 * options.latency_us,
    )


def _corpus(path: str, args: list[str]) -> list[str]:
    """Return the option that stands in for a corpus where neither recipe nor options name one."""
    data = recipe.load(path).data
    named = any(arg.startswith(("--data.paths", "--data.train", "--data.mock")) for arg in args)
    return [] if named or data.paths or data.train_paths or data.mock else ["--data.mock"]


def _check_writable(path: str) -> None:
    """Check before all work that a report can go there, without making the file."""
    file = pathlib.Path(path)
    target = file if file.exists() else file.parent
    if file.is_dir() or not target.exists() or not os.access(target, os.W_OK):
        raise config.UserError(
            f"{path} cannot be written: choose a file in a folder that is there and yours"
        )


def _write(path: str, text: str) -> None:
    try:
        pathlib.Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise config.UserError(
            f"{path} cannot be written ({error.strerror}): choose another"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
