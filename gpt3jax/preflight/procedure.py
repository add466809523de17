"""A whole preflight: its rounds of checks and measurements, and their report."""

import contextlib
import json
import sys
import time
from collections.abc import Iterator

import jax
from rich import console

from gpt3jax import errors
from gpt3jax.config import schema, user_paths
from gpt3jax.distributed import joining, messages
from gpt3jax.preflight import across_processes, checks, options, report, speed

_LIMIT = 60.0  # seconds for a measurement, compiling included


def check(cfg: schema.Config, given: options.Options) -> int:
    """Join the other processes, check and report; return the exit status.

    Raises:
        UserError, TransientError: a check failed.
    """
    joining.start(cfg.distributed, cfg.mesh)
    session = across_processes.Session(cfg)
    with _reported(session, given):
        _check(session, quick=given.quick)
    messages.leave()
    has_warning = any(check.status == "warn" for check in session.checks)
    return errors.RETRY if given.strict and has_warning else errors.DONE


def _check(session: across_processes.Session, *, quick: bool) -> None:
    """Make all rounds; each depends on the one before it.

    Raises:
        UserError, TransientError: a check failed.
    """
    session.on_hosts(with_gpus=True)
    session.on_devices()
    laid, batch_size = across_processes.first_step(session)
    session.on_program(laid.program, laid.cfg, batch_size)
    session.on_memory(laid.program, laid.cfg)
    if quick:
        return
    sizes = speed.sizes_for(jax.devices()[0].platform)
    _matmuls(session, sizes)
    for axis, n in laid.mesh.shape.items():
        for kind in ("all-reduce", "all-gather") if n > 1 else ():
            _collective(session, laid.mesh, axis, kind, sizes)


def _matmuls(session: across_processes.Session, sizes: speed.Sizes) -> None:
    def measure() -> dict[str, float]:
        return {str(d.id): speed.matmul_tflops(d, sizes) for d in jax.local_devices()}

    def judge(answers: list[dict[str, float] | None]) -> list[checks.Check]:
        rates = [
            (i, f"device {device} of {checks.named([i], session.hosts)}", rate)
            for i, answer in enumerate(answers)
            for device, rate in (answer or {}).items()
        ]
        return [checks.speed("matmul", "TFLOP/s", rates)]

    session.round("matmul", speed.within(_LIMIT, "matmul", measure), judge)


def _collective(
    session: across_processes.Session,
    mesh: jax.sharding.Mesh,
    axis: str,
    kind: str,
    sizes: speed.Sizes,
) -> None:
    name = f"{kind} {axis}"

    def measure() -> float:
        return speed.collective_gbytes(mesh, axis, kind, sizes)

    def judge(answers: list[float | None]) -> list[checks.Check]:
        rates = [
            (i, checks.named([i], session.hosts), rate)
            for i, rate in enumerate(answers)
            if rate is not None
        ]
        return [checks.speed(name, "GB/s", rates)]

    session.round(name, speed.within(_LIMIT, f"{kind} along {axis}", measure), judge)


@contextlib.contextmanager
def _reported(session: across_processes.Session, given: options.Options) -> Iterator[None]:
    """Print and write the report in process 0, whether checks fail or not."""
    begin = time.monotonic()
    try:
        yield
    finally:
        seconds = time.monotonic() - begin
        if session.me == 0:
            out = console.Console(width=None if sys.stdout.isatty() else 120)
            report.show(session.checks, seconds, out)
            if given.json:
                text = json.dumps(report.to_json(session.checks, seconds), indent=2)
                user_paths.write(given.json, text + "\n")
