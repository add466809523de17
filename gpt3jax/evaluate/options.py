"""The options of `gpt3jax.evaluate`. Imports no JAX."""

import dataclasses
import importlib.util
import pathlib
from typing import Annotated, Literal

import tyro

from gpt3jax import errors
from gpt3jax.config import ranges, schema, user_paths
from gpt3jax.data import tokenizer_sources


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The options of `gpt3jax.evaluate`."""

    checkpoint: user_paths.Path
    """Folder of checkpoints, as checkpoint.dir; the newest is used."""
    text: user_paths.Path = ""
    """A UTF-8 file, scored as one document."""
    data: user_paths.Path = ""
    """In place of text: PREFIX of a corpus, whose documents are scored as one stream."""
    tasks: str = ""
    """In place of text: names of lm-eval's tasks, separated by commas."""
    task_folder: user_paths.Path = ""
    """With tasks: a folder of YAML files with more tasks."""
    n_fewshot: Annotated[int, ranges.Range(-1, 1000)] = -1
    """With tasks: examples before each question (-1: as the task says)."""
    limit: ranges.Count = 0
    """With tasks: at most this many questions of each task (0: all)."""
    stride: ranges.Count = 0
    """Tokens that each window counts; the earlier ones are their context. 1 to seq_len, which means
    no overlap (0: half of seq_len; with tasks seq_len, as lm-eval does)."""
    max_tokens: ranges.Tokens = 0
    """Score only the first tokens, at most this many, as 100000 or 100K (0: all)."""
    batch_size: Annotated[int, ranges.Range(1, 10**6)] = 8
    """Windows or questions at a time."""
    json: user_paths.Path = ""
    """Also write the results to this file."""
    source: tyro.conf.OmitArgPrefixes[tokenizer_sources.Source] = dataclasses.field(
        default_factory=tokenizer_sources.Source
    )
    mesh: schema.Mesh = dataclasses.field(default_factory=schema.Mesh)
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: float32 on a CPU, bfloat16 on a GPU."""


def check(options: Options) -> None:
    """Check what needs no checkpoint.

    Raises:
        UserError: options do not go together, or the JSON file cannot be written.
    """
    measured = [f"--{name}" for name in ("text", "data", "tasks") if getattr(options, name)]
    if len(measured) != 1:
        given = " and ".join(measured) if measured else "nothing"
        raise errors.UserError(
            f"{given} given to measure: give one of --text, --data and --tasks",
            page="evaluation.md",
        )
    defaults = Options(checkpoint="")
    useless = ("max_tokens",) if options.tasks else ("task_folder", "n_fewshot", "limit")
    for name in useless:
        if getattr(options, name) != getattr(defaults, name):
            option = name.replace("_", "-")
            raise errors.UserError(
                f"--{option} has no effect with {measured[0]}: leave it out", page="evaluation.md"
            )
    if options.tasks and importlib.util.find_spec("lm_eval") is None:
        raise errors.UserError(
            "--tasks needs the extra: pip install 'gpt3jax[lm-eval]'", page="evaluation.md#tasks"
        )
    if options.json:
        write(options.json, "")  # a path that cannot be written fails now, not after hours


def write(path: str, content: str) -> None:
    """Write the JSON file.

    Raises:
        UserError: it cannot be written.
    """
    try:
        pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
        pathlib.Path(path).write_text(content, encoding="utf-8")
    except OSError as error:
        raise errors.UserError(
            f"--json={path} cannot be written: {error}", page="evaluation.md"
        ) from error
