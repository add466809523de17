"""What `gpt3jax.preflight` is asked for. Imports no JAX."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured, and what to write."""

    config: str
    """The recipe, configs/*.py, or the config.json of a run."""
    json: str = ""
    """File for the report; the first process writes it."""
    quick: bool = False
    """Measure no speed."""
    strict: bool = False
    """Exit with 1 where a check only warns, of a slow device for instance."""
