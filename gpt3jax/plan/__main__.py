"""`python -m gpt3jax.plan --config=RECIPE.py --gpus=N [--gpu=h100] [--group.field VALUE ...]`.

Say, without a GPU, what gpt3jax.main would do on a pod: the layout of each batch size, its memory,
time and collectives, and the run's cost. Closed forms answer at once; with the extra `plan`, the
true steps are compiled as well. Further options override the recipe, as in gpt3jax.main.
"""

import os
import pathlib
import sys
from collections.abc import Sequence

from gpt3jax import errors
from gpt3jax.config import command_line, recipe
from gpt3jax.hardware import gpus
from gpt3jax.plan import options


def main(args: Sequence[str] | None = None) -> int:
    """Plan and report; the exit status is 2 for errors, 1 where --verify finds a problem."""
    args = sys.argv[1:] if args is None else list(args)
    return command_line.run(lambda: _plan(args))


def _plan(args: Sequence[str]) -> int:
    request, overrides = command_line.parse_beside_config(options.Options, "plan", __doc__, args)
    files = (request.json, request.html, request.write_layouts, request.dump_hlo)
    for path in filter(None, files):
        _check_writable(path)
    gpus.find(request.gpu)
    recipe.parse(options.recipe_args(request, overrides), "gpt3jax.plan")
    from gpt3jax.plan import planning  # after parsing: importing JAX takes seconds

    shell_line = command_line.shell_line("gpt3jax.plan", *args)
    plan = planning.plan(request, overrides, shell_line)
    if request.verify and not all(batch.fits for batch in plan.batches):
        sys.stderr.write("gpt3jax: --verify: this run would fail, for the reason above\n")
        return 1
    return errors.DONE


def _check_writable(path: str) -> None:
    """Check, before any work, that a report can be written there; does not make the file."""
    file = pathlib.Path(path)
    target = file if file.exists() else file.parent
    if file.is_dir() or not target.exists() or not os.access(target, os.W_OK):
        raise errors.UserError(
            f"{path} cannot be written: choose a file in a folder that exists and is writable",
            page="plan.md",
        )


if __name__ == "__main__":
    sys.exit(main())
