"""The options of `gpt3jax.plan`. Imports no JAX."""

import dataclasses
from typing import Annotated

from gpt3jax.config import ranges, recipe, user_paths

Path = user_paths.Path  # Options has a field of the name `config`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to plan for, and what to write."""

    config: Path
    """The recipe, configs/*.py, or the config.json of a run."""
    gpus: Annotated[int, ranges.Range(1, 2**20)]
    """Number of GPUs."""
    gpu: str = "h100"
    """Kind of GPU: h100, h200, a100 (80 GB) or b200."""
    search: bool = False
    """Compile more layouts of each batch size, to find the fastest that fits."""
    n_compiled: Annotated[int, ranges.Range(0, 1000)] = 4
    """How many layouts of a batch size --search compiles; if none of them fits, up to 4 more."""
    compile: bool = True
    """Compile the steps; --no-compile gives closed forms only."""
    json: Path = ""
    """File for the report as JSON."""
    html: Path = ""
    """File for the report as a web page."""
    write_layouts: Path = ""
    """File for the layouts of each batch size, which gpt3jax.main takes as --layouts FILE."""
    dump_hlo: Path = ""
    """File for the compiled program of a full batch."""
    verify: bool = False
    """Exit with 1 if the run does not fit or would be refused."""
    price: Annotated[float, ranges.Range(0, 10**6)] = 0.0
    """Price of a GPU-hour, in any currency."""
    gpus_per_node: Annotated[int, ranges.Range(1, 2**20)] = 8
    """GPUs that NVLink joins. This and the next three change the plan, not a run's settings."""
    nvlink_gbytes: Annotated[float, ranges.Range(1e-3, 10**6)] | None = None
    """GB/s that a GPU reaches in one direction inside a node; unset: 80% of the data sheet's."""
    nic_gbytes: Annotated[float, ranges.Range(1e-3, 10**6)] | None = None
    """GB/s that a GPU reaches in one direction between nodes; unset: 90% of its card's."""
    latency_us: Annotated[float, ranges.Range(1e-3, 10**6)] = 10.0
    """Microseconds to start a collective, and as many again for each doubling of its group."""


def recipe_args(options: Options, overrides: list[str]) -> list[str]:
    """Return the arguments for `recipe.parse`: file, overrides, and a corpus if none is named."""
    data = recipe.load(options.config).data
    named = any(
        arg.startswith(("--data.paths", "--data.train", "--data.mock")) for arg in overrides
    )
    corpus = [] if named or data.paths or data.train_paths or data.mock else ["--data.mock"]
    return [f"--config={options.config}", *overrides, *corpus]
