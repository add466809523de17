"""`python -m gpt3jax.plan --config=RECIPE.py --gpus=N [--gpu=h100] [--group.field VALUE ...]`.

Says, without a GPU, what a config's step takes on a pod: memory, collectives, time, cost. Closed
forms come at once; with the extra `plan` the true step is compiled as well. Further options
override the recipe, as in gpt3jax.main.
"""

import os
import pathlib
import shlex
import sys
from collections.abc import Sequence

from gpt3jax import errors
from gpt3jax.config import command, recipe
from gpt3jax.hardware import gpus
from gpt3jax.plan import options


def main(args: Sequence[str] | None = None) -> int:
    """Plan and report; the exit status is 2 for errors, 1 where --verify finds that it fails."""
    args = sys.argv[1:] if args is None else list(args)
    return command.run(lambda: _plan(args))


def _plan(args: Sequence[str]) -> int:
    given, rest = command.parse_beside_config(options.Options, "plan", __doc__, args)
    for path in filter(None, (given.json, given.html, given.dump_hlo)):
        _check_writable(path)
    gpus.find(given.gpu)
    recipe.parse(options.recipe_args(given, rest), "gpt3jax.plan")
    from gpt3jax.plan import planning  # after parsing: JAX takes seconds

    told = shlex.join(["python", "-m", "gpt3jax.plan", *args])
    found = planning.plan(given, rest, told)
    if given.verify and (found["problems"] or not found["fits"]):
        sys.stderr.write("gpt3jax: --verify: this run would fail, as said above\n")
        return 1
    return errors.DONE


def _check_writable(path: str) -> None:
    """Check before all work that a report can go there, without making the file."""
    file = pathlib.Path(path)
    target = file if file.exists() else file.parent
    if file.is_dir() or not target.exists() or not os.access(target, os.W_OK):
        raise errors.UserError(
            f"{path} cannot be written: choose a file in a folder that is there and yours"
        )


if __name__ == "__main__":
    sys.exit(main())
