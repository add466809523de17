"""`python -m gpt3jax.plan --config=RECIPE.py --gpus=N [--gpu=h100] [--group.field VALUE ...]`.

Says, without a GPU, what a config's step takes on a pod: memory, collectives, time, cost. Closed
forms come at once; with the extra `plan` the true step is compiled as well.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from rich import console

from gpt3jax import config, gpus, recipe
from gpt3jax.plan import compiler, memory_model, report


def main(args: Sequence[str] | None = None) -> int:
    """Plan and report; the exit status is 2 for errors, 1 where --verify finds that it fails."""
    options, recipe_args = _parser().parse_known_args(args)
    try:
        found = plan(options, recipe_args)
    except config.UserError as error:
        sys.stderr.write(f"gpt3jax: error: {error}\n")
        return 2
    if options.verify and (found["problems"] or not found["fits"]):
        sys.stderr.write("gpt3jax: --verify: this run would fail, as said above\n")
        return 1
    return 0


def plan(options: argparse.Namespace, recipe_args: list[str]) -> dict[str, Any]:
    """Print the plan, write the files that were asked for, and return the report.

    Raises:
        UserError: the config, the number of GPUs or a file does not serve.
    """
    gpu = gpus.find(options.gpu)
    network = _network(gpu, options)
    target = report.Target(gpu=gpu, network=network, price=options.price)
    recipe_args = [
        f"--config={options.config}",
        *recipe_args,
        *_corpus(options.config, recipe_args),
    ]
    cfg = recipe.parse(recipe_args)
    layout = memory_model.lay_out(cfg, options.gpus, network.gpus_per_node)
    out = console.Console(width=None if sys.stdout.isatty() else 120)
    missing = compiler.missing_extra()
    compiled = None
    if options.dump_hlo and (missing or options.no_compile):
        raise config.UserError(f"--dump-hlo needs the compiled step: {missing or 'compile it'}")
    if not (missing or options.no_compile):
        found = report.build(cfg, layout, target, None)
        out.print(
            f"By closed forms: {found['peak_bytes_per_gpu'] / report.GIB:.1f} GiB a GPU, "
            f"{found['step_seconds']['expected']:.3g} s a step. Compiling the step ..."
        )
        compiled = compiler.compile_step(cfg, recipe_args, layout.sizes, gpu, network)
    found = report.build(cfg, layout, target, compiled)
    report.show(found, out)
    if missing and not options.no_compile:
        out.print(f"Not compiled, all figures are by closed forms: {missing}", soft_wrap=True)
    if options.json:
        _write(options.json, json.dumps(found, indent=2) + "\n")
    if options.dump_hlo and compiled:
        _write(options.dump_hlo, compiled.text)
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m gpt3jax.plan",
        description="Memory, collectives, time and cost of a config's step on GPUs that are not "
        "here. Further options override the recipe, as in gpt3jax.main.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="RECIPE", help="configs/*.py")
    parser.add_argument("--gpus", type=int, required=True, help="how many")
    parser.add_argument("--gpu", default="h100", help=f"one of {', '.join(gpus.GPUS)}")
    parser.add_argument("--json", default="", metavar="FILE", help="write the report")
    parser.add_argument("--dump-hlo", default="", metavar="FILE", help="write the compiled program")
    parser.add_argument("--no-compile", action="store_true", help="closed forms only")
    parser.add_argument(
        "--verify", action="store_true", help="exit with 1 if it does not fit or would be refused"
    )
    parser.add_argument("--price", type=float, default=0.0, help="of a GPU-hour")
    parser.add_argument("--gpus-per-node", type=int, default=gpus.GPUS_PER_NODE)
    parser.add_argument("--nvlink-gbytes", type=float, help="GB/s reached, a GPU and direction")
    parser.add_argument("--nic-gbytes", type=float, help="GB/s reached between nodes")
    parser.add_argument("--latency-us", type=float, help="to start a collective")
    return parser


def _network(gpu: gpus.Gpu, options: argparse.Namespace) -> gpus.Network:
    given = {
        "nvlink-gbytes": options.nvlink_gbytes,
        "nic-gbytes": options.nic_gbytes,
        "latency-us": options.latency_us,
        "gpus-per-node": options.gpus_per_node,
    }
    for name, value in given.items():
        if value is not None and value <= 0:
            raise config.UserError(f"--{name}={value} must be above 0")
    return gpus.network_of(
        gpu,
        options.gpus_per_node,
        1e9 * options.nvlink_gbytes if options.nvlink_gbytes else None,
        1e9 * options.nic_gbytes if options.nic_gbytes else None,
        gpus.LATENCY if options.latency_us is None else 1e-6 * options.latency_us,
    )


def _corpus(path: str, args: list[str]) -> list[str]:
    """Return the option that stands in for a corpus where neither recipe nor options name one."""
    data = recipe.load(path).data
    named = any(arg.startswith(("--data.paths", "--data.train", "--data.mock")) for arg in args)
    return [] if named or data.paths or data.train_paths or data.mock else ["--data.mock"]


def _write(path: str, text: str) -> None:
    try:
        pathlib.Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise config.UserError(
            f"{path} cannot be written ({error.strerror}): choose another"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
