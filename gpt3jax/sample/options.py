"""The options of `gpt3jax.sample`. Imports no JAX."""

import dataclasses
import importlib.util
import pathlib
import sys
from typing import Annotated, Literal

import tyro

from gpt3jax import errors
from gpt3jax.config import ranges, schema, user_paths
from gpt3jax.data import documents, tokenizer_sources
from gpt3jax.sample import sampling_options

_PAGE = "sampling.md"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serve:
    """The HTTP server."""

    host: str = "127.0.0.1"
    """Address to listen on; the default serves this machine alone. There is no password."""
    port: Annotated[int, ranges.Range(0, 65_535)] = 8000
    """Port to listen on (0: any free one)."""
    max_queue: ranges.Positive = 32
    """Requests that may wait; more are answered with 503."""
    max_body_bytes: ranges.Positive = 1_000_000
    """Larger requests are answered with 413."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The options of `gpt3jax.sample`."""

    checkpoint: user_paths.Path
    """Folder of checkpoints, as checkpoint.dir; the newest is used."""
    prompt: tuple[str, ...] = ()
    """Texts to continue."""
    prompts: user_paths.Path = ""
    """In place of prompt: a file with one text a line."""
    n: Annotated[int, ranges.Range(1, 10**6)] = 1
    """Continuations of each prompt."""
    batch_size: Annotated[int, ranges.Range(1, 10**6)] = 8
    """Texts to generate at a time; with serve also the most texts of one request."""
    sampling: tyro.conf.OmitArgPrefixes[sampling_options.Options] = dataclasses.field(
        default_factory=sampling_options.Options
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


def check(options: Options) -> None:
    """Check what needs no checkpoint.

    Raises:
        UserError: options do not go together, or nothing is to be generated.
    """
    if bool(options.prompt) + bool(options.prompts) + options.serve > 1:
        raise errors.UserError(
            "--prompt, --prompts and --serve exclude each other: give one", page=_PAGE
        )
    if options.sampling.max_new_tokens < 1:
        raise errors.UserError("--max-new-tokens=0 must be at least 1: raise it", page=_PAGE)
    if options.serve and importlib.util.find_spec("starlette") is None:
        raise errors.UserError(
            "--serve needs the extra: pip install 'gpt3jax[serve]'", page="sampling.md#server"
        )
    if options.serve and options.sampling != sampling_options.Options():
        raise errors.UserError(
            "--serve takes the sampling options from each request: leave them out here",
            page="sampling.md#server",
        )
    if not (options.prompt or options.prompts or options.serve or sys.stdin.isatty()):
        raise errors.UserError(
            "nothing to continue: give --prompt, --prompts or --serve, or use a terminal",
            page=_PAGE,
        )


def read_prompts(options: Options) -> list[str]:
    """Return the prompts that the options or their file give; none on a terminal.

    Raises:
        UserError: the file cannot be read, or has no prompt.
    """
    if not options.prompts:
        return list(options.prompt)
    try:
        lines = documents.text_lines(pathlib.Path(options.prompts).read_bytes())
    except (OSError, UnicodeDecodeError) as error:
        raise errors.UserError(
            f"--prompts={options.prompts} cannot be read: {error}", page=_PAGE
        ) from error
    if not any(lines):
        raise errors.UserError(
            f"--prompts={options.prompts} has no prompt: write one a line", page=_PAGE
        )
    return [line for line in lines if line]
