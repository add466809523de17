"""`--train.replay-step K`: take step K twice from one checkpoint, and compare bit for bit.

Nothing is written. Two passes that differ from the same state on the same batch tell of a device
that computes wrongly, or of kernels that are not deterministic; two that agree tell that a spike or
a NaN comes from data and weights.
"""

import dataclasses
import sys
from typing import Any

import jax
import numpy as np

from gpt3jax import errors
from gpt3jax.checkpoint import array_digests
from gpt3jax.config import schema
from gpt3jax.data import loader
from gpt3jax.run import startup
from gpt3jax.sharding import layouts
from gpt3jax.watch import phases


@dataclasses.dataclass(frozen=True)
class Pass:
    """What one pass gave, all of it to be compared bit for bit."""

    steps: list[dict[str, np.ndarray]]
    """The metrics of each step, and digests of its batch."""
    digests: dict[str, np.ndarray]
    """Of each array of the state after the last step."""


def replay(cfg: schema.Config) -> int:
    """Take the step twice; print what differs; return the exit status.

    0: it repeats; 1: it does not, which is a fault of this machine and not of the config.

    Raises:
        UserError: as `setup.start_or_resume`; the run has no such step.
    """
    last = cfg.train.replay_step
    run, state, start, told = startup.start_or_resume(cfg, phases.Phases())
    if last > run.end.step:
        raise errors.UserError(
            f"train.replay_step={last}, but the run ends at {run.end.step}: choose a step of it"
        )
    if last <= start.step:
        raise errors.UserError(
            f"train.replay_step={last} lies before the start, which is after step {start.step}"
        )
    _say(*told, f"taking steps {start.step + 1} to {last} twice; nothing is written")
    first = _take(run, run, state, start)
    del state  # the second must find the memory free
    again, state, _, _ = startup.start_or_resume(cfg, phases.Phases())
    second = _take(run, again, state, start)
    names = layouts.array_names(run.program.abstract_state.params)
    lines = compare(first, second, start.step + 1, names)
    loss, norm = (float(first.steps[-1][name]) for name in ("loss", "grad_norm"))
    _say(f"step {last}: loss {loss!r}, gradient norm {norm!r}", *lines)
    if not lines:
        _say(f"step {last} repeats bit for bit")
    return errors.RETRY if lines else errors.DONE


def compare(first: Pass, second: Pass, first_step: int, names: list[str]) -> list[str]:
    """Return lines on what differs: the first step that does, and the arrays of the last state."""
    steps = zip(first.steps, second.steps, strict=True)
    told = (_compare_step(*pair, first_step + i, names) for i, pair in enumerate(steps))
    lines = next((found for found in told if found), [])
    changed = [n for n in first.digests if _differs(first.digests[n], second.digests[n])]
    if changed:
        lines.append(f"the state after the last step differs in: {', '.join(changed)}")
    return lines


def _compare_step(
    one: dict[str, np.ndarray], other: dict[str, np.ndarray], number: int, names: list[str]
) -> list[str]:
    differ = [name for name in one if _differs(one[name], other[name])]
    if not differ:
        return []
    lines = [f"step {number} does not repeat: {', '.join(differ)} differ"]
    for name in ("loss", "grad_norm"):
        if name in differ:
            lines.append(f"  {name}: {float(one[name])!r} and {float(other[name])!r}")
    pairs = zip(names, one["grad_norms"], other["grad_norms"], strict=True)
    norms = [(n, a, b) for n, a, b in pairs if _differs(a, b)]
    return lines + [f"  gradient norm of {n}: {float(a)!r} and {float(b)!r}" for n, a, b in norms]


def _take(run: startup.Run, seen_by: startup.Run, state: Any, start: Any) -> Pass:
    """Take the steps to the one that is meant; `seen_by` has the losses that limits come from."""
    cfg, steps = run.cfg, []
    batches = loader.train_batches(
        run.splits, cfg, run.schedule, run.mesh, start.samples, run.end.samples
    )
    for number in range(start.step + 1, cfg.train.replay_step + 1):
        batch, _, _ = next(batches)
        of_batch = np.asarray(array_digests.digests(batch))
        state, metrics = run.program.train(state, batch, *seen_by.faults.step_args(number))
        read = {name: np.asarray(value) for name, value in jax.device_get(metrics).items()}
        seen_by.faults.note(number, {name: read[name].item() for name in ("loss", "skipped")})
        digests = {f"batch {name}": d for name, d in zip(sorted(batch), of_batch, strict=True)}
        steps.append(read | digests)
    names = layouts.array_names(state)
    found = np.asarray(array_digests.digests(state))
    return Pass(steps, dict(zip(names, found, strict=True)))


def _differs(one: np.ndarray, other: np.ndarray) -> bool:
    return one.tobytes() != other.tobytes()  # a NaN is equal to itself here


def _say(*lines: str) -> None:
    if jax.process_index() == 0:
        sys.stdout.write("".join(f"{line}\n" for line in lines))
        sys.stdout.flush()
