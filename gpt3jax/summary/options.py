"""The options of `gpt3jax.summary`. Imports no JAX."""

import dataclasses

import tyro

from gpt3jax.config import schema, user_paths
from gpt3jax.data import tokenizer_sources


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The options of `gpt3jax.summary`."""

    run: tyro.conf.Positional[user_paths.Path]
    """The log.dir of a run, or the folder that has it as `logs`."""
    source: tyro.conf.OmitArgPrefixes[tokenizer_sources.Source] = dataclasses.field(
        default_factory=tokenizer_sources.Source
    )
    mesh: schema.Mesh = dataclasses.field(default_factory=schema.Mesh)
