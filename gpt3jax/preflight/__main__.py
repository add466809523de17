"""`python -m gpt3jax.preflight --config=RECIPE.py [--json FILE] [--group.field VALUE ...]`.

Compare the processes of a run and measure their machines; nothing is trained. Start it like
gpt3jax.main, once for each process. Other options override the recipe, as in gpt3jax.main.
"""

import os
import sys
import traceback
from collections.abc import Sequence

from gpt3jax import errors
from gpt3jax.config import command_line, recipe
from gpt3jax.hardware import xla_flags
from gpt3jax.preflight import options


def main(args: Sequence[str] | None = None) -> int:
    """Check and report; exit with 2 if a retry would fail too, with 1 if it may succeed."""
    args = sys.argv[1:] if args is None else list(args)
    try:
        return command_line.run(lambda: _check(args))
    except Exception:
        traceback.print_exc()
        return errors.RETRY


def _check(args: Sequence[str]) -> int:
    given, rest = command_line.parse_beside_config(options.Options, "preflight", __doc__, args)
    cfg = recipe.parse([f"--config={given.config}", *rest], "gpt3jax.preflight")
    xla_flags.check(os.environ.get("XLA_FLAGS", ""))
    from gpt3jax.distributed import joining  # after parsing: importing JAX takes seconds
    from gpt3jax.preflight import procedure

    try:
        return procedure.check(cfg, given)
    except errors.TooManyProcesses as error:
        return joining.with_fewer(error.n_processes)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if status:
        os._exit(status)  # a failed process must not wait for others or for a hanging collective
