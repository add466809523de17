"""`python -m gpt3jax.preflight --config=RECIPE.py [--json FILE] [--group.field VALUE ...]`.

Started like gpt3jax.main, once in each process of the run, it compares the processes and measures
their machines, and trains nothing. Further options override the recipe, as in gpt3jax.main.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import sys
import time
import traceback
from collections.abc import Iterator, Sequence

import jax
import tyro
from rich import console

from gpt3jax import command, config, distributed, paths, recipe, sharding, xla_flags
from gpt3jax.preflight import checks, joint, report, speed

Path = config.Path  # Options has a field of the name `config`
_LIMIT = 60.0  # seconds for a measurement, compiling included


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured, and what to write."""

    config: Path
    """The recipe, configs/*.py."""
    json: Path = ""
    """File for the report; the first process writes it."""
    quick: bool = False
    """Measure no speed."""
    strict: bool = False
    """Exit with 1 where a check only warns, of a slow device for instance."""


def main(args: Sequence[str] | None = None) -> int:
    """Check and report; the exit status is 2 for what will fail again, 1 for what may not."""
    args = sys.argv[1:] if args is None else list(args)
    options, recipe_args = tyro.cli(
        Options, args=args, prog="python -m gpt3jax.preflight", description=__doc__,
        return_unknown_args=True,
    )  # fmt: skip

    def checked() -> int:
        written = paths.expanded(options, "--")
        cfg = recipe.parse([f"--config={options.config}", *recipe_args], "gpt3jax.preflight")
        xla_flags.check(os.environ.get("XLA_FLAGS", ""))
        distributed.start(cfg.distributed, cfg.mesh)
        session = joint.Session(cfg)
        with _reported(session, written):
            _check(session, options.quick)
        distributed.leave()
        warned = any(check.status == "warn" for check in session.checks)
        return command.RETRY if options.strict and warned else command.DONE

    try:
        return command.run(checked)
    except Exception:
        traceback.print_exc()
        return command.RETRY


def _check(session: joint.Session, quick: bool) -> None:
    """Go through all rounds; each needs the one before it.

    Raises:
        UserError, TransientError: a check failed.
    """
    session.on_hosts(with_gpus=True)
    session.on_devices()
    mesh = sharding.make_mesh(session.cfg.mesh)
    program, batch_size = joint.abstract_program(session.cfg, mesh)
    session.on_program(program, batch_size)
    session.on_memory(program)
    if quick:
        return
    sizes = speed.sizes(jax.devices()[0].platform)
    _matmuls(session, sizes)
    for axis, n in mesh.shape.items():
        for kind in ("all-reduce", "all-gather") if n > 1 else ():
            _collective(session, mesh, axis, kind, sizes)


def _matmuls(session: joint.Session, sizes: speed.Sizes) -> None:
    def measure() -> dict[str, float]:
        return {str(d.id): speed.matmul_tflops(d, sizes) for d in jax.local_devices()}

    def judge(told: list[dict[str, float] | None]) -> list[checks.Check]:
        rates = [
            (i, f"device {device} of {checks.named([i], session.hosts)}", rate)
            for i, one in enumerate(told)
            for device, rate in (one or {}).items()
        ]
        return [checks.speed("matmul", "TFLOP/s", rates)]

    session.round("matmul", speed.within(_LIMIT, "matmul", measure), judge)


def _collective(
    session: joint.Session, mesh: jax.sharding.Mesh, axis: str, kind: str, sizes: speed.Sizes
) -> None:
    name = f"{kind} {axis}"

    def measure() -> float:
        return speed.collective_gbytes(mesh, axis, kind, sizes)

    def judge(told: list[float | None]) -> list[checks.Check]:
        rates = [
            (i, checks.named([i], session.hosts), rate)
            for i, rate in enumerate(told)
            if rate is not None
        ]
        return [checks.speed(name, "GB/s", rates)]

    session.round(name, speed.within(_LIMIT, f"{kind} along {axis}", measure), judge)


@contextlib.contextmanager
def _reported(session: joint.Session, options: Options) -> Iterator[None]:
    """Print and write the report in the first process, whether checks fail or not."""
    begin = time.monotonic()
    try:
        yield
    finally:
        seconds = time.monotonic() - begin
        if session.me == 0:
            out = console.Console(width=None if sys.stdout.isatty() else 120)
            report.show(session.checks, seconds, out)
            if options.json:
                _write(options.json, json.dumps(report.to_json(session.checks, seconds), indent=2))


def _write(path: str, text: str) -> None:
    try:
        pathlib.Path(path).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise config.UserError(
            f"{path} cannot be written ({error.strerror}): choose another"
        ) from error


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if status:
        os._exit(status)  # a failed process must not wait for others, or for a hanging collective
