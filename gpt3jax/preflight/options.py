"""The options of `gpt3jax.preflight`. Imports no JAX."""

import dataclasses

from gpt3jax.config import user_paths

Path = user_paths.Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure, and where to write the report."""

    config: Path
    """The recipe (configs/*.py) or the config.json of a run."""
    json: Path = ""
    """File for the report, written by process 0."""
    quick: bool = False
    """Skip the measurements of speed."""
    strict: bool = False
    """Exit with status 1 if a check warns, of a slow device for example."""
