"""The change of a run to the layout of another batch size; its state moves there in memory."""

import dataclasses
import itertools
import time
from collections.abc import Callable

from gpt3jax import step
from gpt3jax.config import layout
from gpt3jax.distributed import messages
from gpt3jax.run import layout_choice, startup
from gpt3jax.sharding import moving
from gpt3jax.watch import phases

_NUMBERS = itertools.count()  # of the changes of this process


def change(
    run: startup.Run,
    state: step.TrainState,
    batch_size: int,
    say: Callable[[str], None],
    clock: phases.Phases,
) -> tuple[startup.Run, step.TrainState]:
    """Return a run and its state in the layout of a batch size.

    The step is compiled before anything moves. Nothing on a disk changes: a run that is killed here
    goes on from its newest checkpoint, in whichever layout its next batch has.

    Raises:
        UserError: no layout of the batch size fits.
        TransientError: replicas of parameters differ.
    """
    run.replicas.finish()
    choice, laid = layout_choice.lay_out(
        run.choice, batch_size, run.n_samples, clock, say, run.laid
    )
    run = dataclasses.replace(run, choice=choice)
    if laid is run.laid:
        return run, state
    _compile_moves(state, laid, clock)
    begin = time.perf_counter()
    with clock.during(phases.MOVE):
        state = moving.move(state, laid.program.abstract_state)
    say(
        f"batches of {batch_size} run in another layout: {layout.in_words(layout.of(laid.cfg))}; "
        f"the state moved in {time.perf_counter() - begin:.1f} s"
    )
    return dataclasses.replace(run, laid=laid, replicas=startup.replicas_of(laid)), state


def _compile_moves(
    state: step.TrainState, laid: layout_choice.LaidOut, clock: phases.Phases
) -> None:
    """Compile what moves the state; wait for all processes, as before a step."""
    with clock.during(phases.COMPILE):
        for program in set(moving.programs(state, laid.program.abstract_state)):
            program.compile()
        limit = laid.cfg.watchdog.slow_phase_seconds
        messages.meet(f"moves-compiled/{next(_NUMBERS)}", limit)
