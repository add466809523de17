"""`python -m gpt3jax.evaluate --checkpoint CKPT --text FILE`: how good a trained model is.

    --text FILE             loss, perplexity and bits per byte of a file of text
    --data PREFIX           the same of a corpus, PREFIX.bin and PREFIX.idx
    --tasks NAME[,NAME]     the tasks of lm-eval, which is an extra (see docs/evaluation.md)

A mesh works as in training; what `stage` and `context` ask for is added to `fsdp`.
"""

import sys

from gpt3jax.config import command
from gpt3jax.evaluate import options


def main() -> int:
    """Parse, measure; return the exit status."""
    return command.run(_measure)


def _measure() -> None:
    given = command.parse(options.Options, "evaluate", __doc__)
    options.check(given)
    from gpt3jax.evaluate import measuring  # after parsing: JAX takes seconds

    print(measuring.evaluate(given))


if __name__ == "__main__":
    sys.exit(main())
