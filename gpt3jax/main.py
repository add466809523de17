"""`python -m gpt3jax.main --config=RECIPE.py [--group.field VALUE ...]`: train a GPT-3 model."""

import os
import sys
import traceback

from gpt3jax import errors
from gpt3jax.config import command_line, recipe
from gpt3jax.hardware import xla_flags
from gpt3jax.record import console


def main() -> int:
    """Parse, join the other processes, train; return the exit status."""
    try:
        with command_line.Outcome() as outcome:
            cfg = recipe.parse(sys.argv[1:])
            xla_flags.check(os.environ.get("XLA_FLAGS", ""))
            from gpt3jax.distributed import joining  # after parsing: importing JAX takes seconds

            joining.start(cfg.distributed, cfg.mesh)
            from gpt3jax import train  # after joining: Orbax reads the environment when imported
            from gpt3jax.run import step_replay

            if cfg.train.replay_step:
                outcome.status = step_replay.replay(cfg)
            else:
                outcome.status = errors.DONE if train.train(cfg) else errors.REQUEUE
    except errors.TooManyProcesses as error:
        return joining.with_fewer(error.n_processes)
    except Exception:
        traceback.print_exc()
        return errors.RETRY
    return outcome.status


if __name__ == "__main__":
    console.outlive()
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if status:
        os._exit(status)  # a failed process must not wait for others, or for a stuck writer
