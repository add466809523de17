"""`python -m gpt3jax.sample --checkpoint CKPT --prompt "..."`: text from a trained model.

    --prompt TEXT ...       continue these texts, on the terminal as they come
    --prompts FILE          continue the lines of a file, in batches
    (neither)               ask for prompts, on a terminal
    --serve                 answer over HTTP (see docs/sampling.md)

A mesh works as in training; what `stage` and `context` ask for is added to `fsdp`.
"""

import dataclasses
import importlib.util
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from gpt3jax import errors
from gpt3jax.config import command, ranges, schema, user_paths
from gpt3jax.data import documents, tokenizer, tokenizer_sources
from gpt3jax.sample import generate, row_text, text_options

if TYPE_CHECKING:
    from gpt3jax.sample import generate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serve:
    """The HTTP server."""

    host: str = "127.0.0.1"
    """Address to listen on; the default answers this machine alone. There is no password."""
    port: Annotated[int, ranges.Range(0, 65_535)] = 8000
    """Port to listen on (0: any free one)."""
    max_queue: ranges.Positive = 32
    """Requests that may wait; more are answered with 503."""
    max_body_bytes: ranges.Positive = 1_000_000
    """Larger requests are answered with 413."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What `gpt3jax.sample` is asked for."""

    checkpoint: user_paths.Path
    """Folder of checkpoints, as checkpoint.dir; the newest is used."""
    prompt: tuple[str, ...] = ()
    """Texts to continue."""
    prompts: user_paths.Path = ""
    """In place of prompt: a file with one text a line."""
    n: Annotated[int, ranges.Range(1, 10**6)] = 1
    """Continuations of each prompt."""
    batch_size: Annotated[int, ranges.Range(1, 10**6)] = 8
    """Rows that are generated at a time; a server's limit of rows in a request."""
    choice: tyro.conf.OmitArgPrefixes[text_options.Options] = dataclasses.field(
        default_factory=text_options.Options
    )
    source: tyro.conf.OmitArgPrefixes[tokenizer_sources.Source] = dataclasses.field(
        default_factory=tokenizer_sources.Source
    )
    mesh: schema.Mesh = dataclasses.field(default_factory=schema.Mesh)
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: float32 on a CPU, bfloat16 on a GPU."""
    serve: bool = False
    """Answer over HTTP; needs the extra `serve`."""
    server: Serve = Serve()


def load(options: Options) -> "tuple[generate.Generator, tokenizer.Tokenizer]":
    """Return the model, ready to generate, and its tokenizer.

    Raises:
        UserError: the checkpoint, the mesh or the tokenizer cannot be used.
    """
    from gpt3jax.checkpoint import parameters  # after parsing: JAX takes seconds
    from gpt3jax.sample import generate

    source = parameters.open_for_use(options.checkpoint, options.mesh, options.compute_dtype)
    text = parameters.open_tokenizer(options.checkpoint, source.cfg, options.source)
    mesh = source.program.mesh
    return generate.Generator(source.params(), source.program.compute, mesh, text.eod_id), text


def sample(options: Options) -> None:
    """Print continuations of the prompts that options, a file or a terminal give.

    Raises:
        UserError: options, files or prompts that cannot be used.
    """
    _check(options)
    given = _prompts(options)
    generator, text = load(options)
    if options.serve:
        from gpt3jax.sample import job, serve  # in an extra

        server = options.server
        limits = job.Limits(
            max_rows=options.batch_size,
            max_queue=server.max_queue,
            max_body_bytes=server.max_body_bytes,
        )
        name = pathlib.Path(options.checkpoint).absolute().name
        serve.run(serve.make_app(generator, text, name, limits), server.host, server.port)
    elif given:
        _continue(options, generator, text, given)
    else:
        for prompt in _ask():
            try:
                _continue(options, generator, text, [prompt])
            except errors.UserError as error:
                print(f"gpt3jax: error: {error}", file=sys.stderr)
            except KeyboardInterrupt:
                print()  # enough of this one


def _check(options: Options) -> None:
    if bool(options.prompt) + bool(options.prompts) + options.serve > 1:
        raise errors.UserError("--prompt, --prompts and --serve exclude each other: give one")
    if options.choice.max_new_tokens < 1:
        raise errors.UserError("--max-new-tokens=0 must be at least 1: raise it")
    if options.serve and importlib.util.find_spec("starlette") is None:
        raise errors.UserError("--serve needs the extra: pip install 'gpt3jax[serve]'")
    if options.serve and options.choice != text_options.Options():
        raise errors.UserError(
            "--serve takes how to sample from each request: leave options of sampling out"
        )
    if not (options.prompt or options.prompts or options.serve or sys.stdin.isatty()):
        raise errors.UserError(
            "nothing to continue: give --prompt, --prompts or --serve, or use a terminal"
        )


def _prompts(options: Options) -> list[str]:
    if not options.prompts:
        return list(options.prompt)
    try:
        lines = documents.text_lines(pathlib.Path(options.prompts).read_bytes())
    except (OSError, UnicodeDecodeError) as error:
        raise errors.UserError(f"--prompts={options.prompts} cannot be read: {error}") from error
    if not any(lines):
        raise errors.UserError(f"--prompts={options.prompts} has no prompt: write one a line")
    return [line for line in lines if line]


def _ask() -> Iterator[str]:
    while True:
        try:
            prompt = input("prompt> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if prompt:
            yield prompt


def _encode(text: tokenizer.Tokenizer, prompt: str) -> list[int]:
    try:
        return text.encode(prompt) or [text.eod_id]
    except errors.UserError as error:
        raise errors.UserError(f"--prompt is not UTF-8 text: {error}") from None


def _continue(
    options: Options,
    generator: "generate.Generator",
    text: tokenizer.Tokenizer,
    prompts: list[str],
) -> None:
    """Print each prompt with its continuations, and how fast they came."""
    rows = [(prompt, number) for prompt in prompts for number in range(options.n)]
    ids = {prompt: _encode(text, prompt) for prompt in prompts}
    for prompt in prompts:
        generator.check(ids[prompt], options.choice)
    n_tokens, begin, first, full = 0, time.perf_counter(), 0.0, 0
    for i in range(0, len(rows), options.batch_size):
        batch = rows[i : i + options.batch_size]
        limits = [generator.limit(ids[prompt], options.choice) for prompt, _ in batch]
        texts = [
            row_text.RowText(text, ids[prompt], limit, ignore_eod=options.choice.ignore_eod)
            for (prompt, _), limit in zip(batch, limits, strict=True)
        ]
        told = [prompt for prompt, _ in batch]
        live = len(batch) == 1  # else rows would mix on the terminal
        if live:
            print(told[0], end="", flush=True)
        stream = generator.stream(
            [ids[prompt] for prompt, _ in batch],
            [options.choice] * len(batch),
            [number for _, number in batch],
        )
        for new in stream:
            first = first or time.perf_counter() - begin
            added = [row.add(tokens) for row, tokens in zip(texts, new, strict=True)]
            told = [t + a for t, a in zip(told, added, strict=True)]
            if live:
                print(added[0], end="", flush=True)
        for row, (prompt, _), whole in zip(texts, batch, told, strict=True):
            print("" if live else whole, flush=True)
            n_tokens += len(row.tokens)
            full += row.reason == "length" and len(row.tokens) == generator.room(ids[prompt])
    seconds = time.perf_counter() - begin
    speed = f"{n_tokens} tokens in {seconds:.1f} s, {n_tokens / seconds:.1f} tokens/s"
    print(f"[{speed}, the first after {first:.1f} s]", file=sys.stderr)
    if full:
        print(
            f"[{full} stopped where the context of {generator.model.seq_len} tokens was full]",
            file=sys.stderr,
        )


def main() -> int:
    """Parse, generate; return the exit status."""
    return command.run(lambda: sample(command.parse(Options, "sample", __doc__)))


if __name__ == "__main__":
    sys.exit(main())
