"""`python -m gpt3jax.evaluate --checkpoint CKPT --text FILE`: measure how good a trained model is.

    --text FILE             loss, perplexity and bits per byte of a file of text
    --data PREFIX           the same for a corpus, PREFIX.bin and PREFIX.idx
    --tasks NAME[,NAME]     tasks of lm-eval, which is an extra (see docs/evaluation.md)

A mesh works as in training; the axes `stage` and `context` are added to `fsdp`.
"""

import sys

from gpt3jax.config import command_line
from gpt3jax.evaluate import options as evaluate_options


def main() -> int:
    """Parse, evaluate; return the exit status."""
    return command_line.run(_evaluate)


def _evaluate() -> None:
    options = command_line.parse(evaluate_options.Options, "evaluate", __doc__)
    evaluate_options.check(options)
    from gpt3jax.evaluate import evaluation  # after parsing: JAX takes seconds

    print(evaluation.evaluate(options))


if __name__ == "__main__":
    sys.exit(main())
