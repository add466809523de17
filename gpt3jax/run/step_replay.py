"""`--train.replay-step K`: take step K twice from one checkpoint, and compare bit for bit.

Nothing is written. Kernels are those of `precision.deterministic`: if two passes from the same
state on the same batches differ all the same, a device computes wrongly. If they agree, a spike or
a NaN comes from data and weights.
"""

import dataclasses
import sys

import jax
import numpy as np

from gpt3jax import errors
from gpt3jax.checkpoint import array_digests
from gpt3jax.config import schema
from gpt3jax.data import loader
from gpt3jax.run import layout_change, numerical_faults, startup
from gpt3jax.sharding import layouts
from gpt3jax.watch import phases


@dataclasses.dataclass(frozen=True)
class Pass:
    """The results of one pass, all of them to be compared bit for bit."""

    steps: list[dict[str, np.ndarray]]
    """The metrics of each step, and digests of its batch."""
    digests: dict[str, np.ndarray]
    """A digest of each array of the state after the last step, by its name."""


def replay(cfg: schema.Config) -> int:
    """Take the step twice; print what differs; return the exit status.

    0: it repeats; 1: it does not, which is a fault of this machine and not of the config.

    Raises:
        UserError: as `startup.start_or_resume`; the run has no such step.
    """
    last = cfg.train.replay_step
    precision = dataclasses.replace(cfg.precision, deterministic=True)
    cfg = dataclasses.replace(cfg, precision=precision)
    started = startup.start_or_resume(cfg, phases.Phases())
    run, first_step = started.run, started.position.step + 1
    if last > run.end.step:
        raise errors.UserError(
            f"train.replay_step={last}, but the run ends at {run.end.step}: choose a step of it",
            page="numerical_faults.md#is-it-the-machine",
        )
    if last < first_step:
        raise errors.UserError(
            f"train.replay_step={last} lies before the start, which is after step {first_step - 1}",
            page="numerical_faults.md#is-it-the-machine",
        )
    _say(*started.lines, f"taking steps {first_step} to {last} twice; nothing is written")
    first = _take_steps(run, started, run.faults)
    del started  # the second pass needs its memory
    again = startup.start_or_resume(cfg, phases.Phases())
    second = _take_steps(run, again, again.run.faults)
    names = layouts.array_names(run.program.abstract_state.params)
    lines = compare(first, second, first_step, names)
    loss, norm = (float(first.steps[-1][name]) for name in ("loss", "grad_norm"))
    _say(f"step {last}: loss {loss!r}, gradient norm {norm!r}", *lines)
    if not lines:
        _say(f"step {last} repeats bit for bit")
    return errors.RETRY if lines else errors.DONE


def compare(first: Pass, second: Pass, first_step: int, names: list[str]) -> list[str]:
    """Return lines on the first step that differs, and on the arrays of the last state that do."""
    steps = zip(first.steps, second.steps, strict=True)
    of_each = (_compare_step(*pair, first_step + i, names) for i, pair in enumerate(steps))
    lines = next(filter(None, of_each), [])
    changed = [n for n in first.digests if _differs(first.digests[n], second.digests[n])]
    if changed:
        lines.append(f"the state after the last step differs in: {', '.join(changed)}")
    return lines


def _compare_step(
    first: dict[str, np.ndarray], second: dict[str, np.ndarray], number: int, names: list[str]
) -> list[str]:
    different = [name for name in first if _differs(first[name], second[name])]
    if not different:
        return []
    lines = [f"step {number} does not repeat: {', '.join(different)} differ"]
    for name in ("loss", "grad_norm"):
        if name in different:
            lines.append(f"  {name}: {float(first[name])!r} and {float(second[name])!r}")
    pairs = zip(names, first["grad_norms"], second["grad_norms"], strict=True)
    norms = [(n, a, b) for n, a, b in pairs if _differs(a, b)]
    return lines + [f"  gradient norm of {n}: {float(a)!r} and {float(b)!r}" for n, a, b in norms]


def _take_steps(
    run: startup.Run, started: startup.Started, history: numerical_faults.Faults
) -> Pass:
    """Take the steps up to the one to replay; `history` has the losses that limits come from."""
    state, position, steps = started.state, started.position.samples, []
    stretch_end = position
    for number in range(started.position.step + 1, run.cfg.train.replay_step + 1):
        if position == stretch_end:
            size, stretch_end = run.stretch(position)
            run, state = layout_change.change(run, state, size, _say, phases.Phases())
            batches = loader.train_batches(
                run.splits, run.cfg, run.schedule, run.mesh, position, stretch_end
            )
        batch, _, position = next(batches)
        batch_digests = np.asarray(array_digests.digests(batch))
        state, metrics = run.program.train(state, batch, *history.step_args(number))
        read = {name: np.asarray(value) for name, value in jax.device_get(metrics).items()}
        noted = ("loss", "grad_norm", "loss_scale", "skipped")
        history.note(number, {name: read[name].item() for name in noted})
        digests = {f"batch {name}": d for name, d in zip(sorted(batch), batch_digests, strict=True)}
        steps.append(read | digests)
    state_digests = np.asarray(array_digests.digests(state))
    return Pass(steps, dict(zip(layouts.array_names(state), state_digests, strict=True)))


def _differs(first: np.ndarray, second: np.ndarray) -> bool:
    return first.tobytes() != second.tobytes()  # a NaN is equal to itself here


def _say(*lines: str) -> None:
    if jax.process_index() == 0:
        sys.stdout.write("".join(f"{line}\n" for line in lines))
        sys.stdout.flush()
