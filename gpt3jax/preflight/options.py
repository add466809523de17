"""What `gpt3jax.preflight` is asked for. Imports no JAX."""

import dataclasses

from gpt3jax.config import user_paths

Path = user_paths.Path  # Options has a field of the name `config`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured, and what to write."""

    config: Path
    """The recipe, configs/*.py, or the config.json of a run."""
    json: Path = ""
    """File for the report; the first process writes it."""
    quick: bool = False
    """Measure no speed."""
    strict: bool = False
    """Exit with 1 where a check only warns, of a slow device for instance."""
