"""What `gpt3jax.evaluate` is asked for. Imports no JAX."""

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
    """What `gpt3jax.evaluate` is asked for."""

    checkpoint: user_paths.Path
    """Folder of checkpoints, as checkpoint.dir; the newest is used."""
    text: user_paths.Path = ""
    """A UTF-8 file, scored as one document."""
    data: user_paths.Path = ""
    """In place of text: PREFIX of a corpus, scored as one stream of its documents."""
    tasks: str = ""
    """In place of text: names of lm-eval's tasks, with commas between them."""
    task_folder: user_paths.Path = ""
    """With tasks: a folder of YAML files with more tasks."""
    n_fewshot: Annotated[int, ranges.Range(-1, 1000)] = -1
    """With tasks: examples before each question (-1: as the task says)."""
    limit: ranges.Count = 0
    """With tasks: questions of each task at most (0: all)."""
    stride: ranges.Count = 0
    """Tokens that a window counts, in the context of those before them; 1 to seq_len, which means
    no overlap (0: half of seq_len; with tasks seq_len, as lm-eval does)."""
    max_tokens: ranges.Tokens = 0
    """Score the first tokens alone, at most this many, as 100000 or 100K (0: all)."""
    batch_size: Annotated[int, ranges.Range(1, 10**6)] = 8
    """Windows or questions at a time."""
    json: user_paths.Path = ""
    """Write what was measured to this file as well."""
    source: tyro.conf.OmitArgPrefixes[tokenizer_sources.Source] = dataclasses.field(
        default_factory=tokenizer_sources.Source
    )
    mesh: schema.Mesh = dataclasses.field(default_factory=schema.Mesh)
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: float32 on a CPU, bfloat16 on a GPU."""


def check(options: Options) -> None:
    """Check what needs no checkpoint.

    Raises:
        UserError: options that do not go together, or a file that cannot be written.
    """
    given = [f"--{name}" for name in ("text", "data", "tasks") if getattr(options, name)]
    if len(given) != 1:
        told = " and ".join(given) if given else "nothing"
        raise errors.UserError(f"{told} given to measure: give one of --text, --data and --tasks")
    defaults = Options(checkpoint="")
    useless = ("max_tokens",) if options.tasks else ("task_folder", "n_fewshot", "limit")
    for name in useless:
        if getattr(options, name) != getattr(defaults, name):
            option = name.replace("_", "-")
            raise errors.UserError(f"--{option} has no effect with {given[0]}: leave it out")
    if options.tasks and importlib.util.find_spec("lm_eval") is None:
        raise errors.UserError("--tasks needs the extra: pip install 'gpt3jax[lm-eval]'")
    if options.json:
        write(options.json, "")  # now, not after hours


def write(path: str, content: str) -> None:
    """Write the JSON file.

    Raises:
        UserError: it cannot be written.
    """
    try:
        pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
        pathlib.Path(path).write_text(content, encoding="utf-8")
    except OSError as error:
        raise errors.UserError(f"--json={path} cannot be written: {error}") from error
