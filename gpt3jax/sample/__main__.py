"""`python -m gpt3jax.sample --checkpoint CKPT --prompt "..."`: generate text from a trained model.

    --prompt TEXT ...       continue these texts; a single one is printed as it comes
    --prompts FILE          continue each line of a file, in batches
    (neither)               ask for prompts, on a terminal
    --serve                 answer over HTTP (see docs/sampling.md)

A mesh works as in training; the axes `stage` and `context` are added to `fsdp`.
"""

import pathlib
import sys
from typing import TYPE_CHECKING

from gpt3jax.config import command_line
from gpt3jax.data import tokenizer as tokenization
from gpt3jax.sample import options as sample_options

if TYPE_CHECKING:
    from gpt3jax.sample import generate


def main() -> int:
    """Parse, generate; return the exit status."""
    return command_line.run(
        lambda: sample(command_line.parse(sample_options.Options, "sample", __doc__))
    )


def sample(options: sample_options.Options) -> None:
    """Continue the prompts of the options, a file or a terminal, or serve over HTTP.

    Raises:
        UserError: options, files or prompts cannot be used.
    """
    sample_options.check(options)
    prompts = sample_options.read_prompts(options)
    generator, tokenizer = load(options)
    if options.serve:
        _serve(options, generator, tokenizer)
        return
    from gpt3jax.sample import terminal  # after parsing: JAX takes seconds

    continuation = terminal.Continuation(
        generator=generator,
        tokenizer=tokenizer,
        options=options.sampling,
        n_per_prompt=options.n,
        batch_size=options.batch_size,
    )
    if prompts:
        continuation.run(prompts)
    else:
        terminal.continue_typed_prompts(continuation)


def load(
    options: sample_options.Options,
) -> "tuple[generate.Generator, tokenization.Tokenizer]":
    """Return the model, ready to generate, and its tokenizer.

    Raises:
        UserError: the checkpoint, the mesh or the tokenizer cannot be used.
    """
    from gpt3jax.checkpoint import parameters  # after parsing: JAX takes seconds
    from gpt3jax.sample import generate

    source = parameters.open_for_use(options.checkpoint, options.mesh, options.compute_dtype)
    tokenizer = parameters.open_tokenizer(options.checkpoint, source.cfg, options.source)
    program = source.program
    generator = generate.Generator(source.params(), program.compute, program.mesh, tokenizer.eod_id)
    return generator, tokenizer


def _serve(
    options: sample_options.Options,
    generator: "generate.Generator",
    tokenizer: tokenization.Tokenizer,
) -> None:
    from gpt3jax.sample import generation_job, http_server  # the server needs an extra

    served = generation_job.ServedModel(
        generator=generator,
        tokenizer=tokenizer,
        name=pathlib.Path(options.checkpoint).absolute().name,
        limits=generation_job.Limits(
            max_rows=options.batch_size,
            max_queue=options.server.max_queue,
            max_body_bytes=options.server.max_body_bytes,
        ),
    )
    http_server.run(http_server.make_app(served), options.server.host, options.server.port)


if __name__ == "__main__":
    sys.exit(main())
