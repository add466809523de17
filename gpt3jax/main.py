"""`python -m gpt3jax.main --config=RECIPE.py [--group.field VALUE ...]`: train."""

import sys

from gpt3jax import config, distributed, train


def main() -> int:
    """Parse, join the other processes, train; return the exit status."""
    try:
        cfg = config.parse(sys.argv[1:])
        distributed.start(cfg.distributed, cfg.mesh)
        train.train(cfg)
    except config.UserError as error:
        print(f"gpt3jax: error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
