"""`python -m gpt3jax.summary RUN`: what a run learned, a text of it, and what to do next.

RUN is the run's log.dir, or the folder that has it as `logs`, such as runs/quickstart. The loss
stands beside those of two simple guesses at the same tokens, by the frequency of tokens and by the
token before, which learned from what the run had read. The text is what the newest checkpoint
writes after a held-out line.
"""

import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from gpt3jax.config import command_line
from gpt3jax.summary import next_commands, recorded_run
from gpt3jax.summary import options as summary_options

if TYPE_CHECKING:
    from gpt3jax.summary import continuation, learned


def main() -> int:
    """Parse, summarize; return the exit status."""
    return command_line.run(_summarize)


def _summarize() -> None:
    options = command_line.parse(summary_options.Options, "summary", __doc__)
    run = recorded_run.read(options.run)
    from gpt3jax.summary import continuation, learned  # after parsing: JAX takes seconds

    continuation.check_tokenizer(run, options)
    what = learned.compare(run)
    rows, _ = what.measured.source.tokens(what.measured.numbers[: continuation.ROWS])
    written = continuation.write(run, options, rows)
    print("\n".join(_lines(what, written, next_commands.all_of(run, written.prompt))))


def _lines(
    what: "learned.Learned",
    written: "continuation.Continuation",
    to_do: Sequence[next_commands.Next],
) -> Iterator[str]:
    measured = what.measured
    kind = "held-out text" if measured.is_held_out else "the text of its last steps"
    yield from _wrapped(
        f"Learned: {measured.loss:.2f} nats a token on {kind} after {measured.step:,} steps (less "
        f"is better). Guesses that learned from the same text give {what.unigram_loss:.2f} by the "
        f"frequency of tokens, {what.bigram_loss:.2f} by the token before."
    )
    yield from _wrapped(
        f"Written after a {'held-out ' * measured.is_held_out}line (>), at "
        f"{written.mean_probability:.1%} a token on average (geometric mean of "
        f"{len(written.logprobs)} tokens; all together e^{sum(written.logprobs):.1f}):"
    )
    yield f"  > {written.prompt}"
    yield from (f"  | {line}" for line in written.text.removeprefix("\n").split("\n"))
    yield "Next:"
    for item in to_do:
        yield from _wrapped(f"- {item.what}:", indent="  ")
        yield from (f"    {command}" for command in item.commands)  # whole, to be copied


def _wrapped(sentence: str, indent: str = "") -> list[str]:
    width = shutil.get_terminal_size().columns
    return textwrap.wrap(sentence, width, initial_indent=indent, subsequent_indent=indent + "  ")


if __name__ == "__main__":
    sys.exit(main())
