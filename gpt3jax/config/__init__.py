"""The config of a run: its fields and their checks, recipes, and the command line.

A recipe imports these names from here; the package itself imports the modules of this folder.
"""

from gpt3jax.config.schema import (
    AUTO,
    Attention,
    Batch,
    Checkpoint,
    Config,
    Data,
    Distributed,
    Faults,
    Log,
    Mesh,
    Model,
    Optimizer,
    Precision,
    Train,
    Watchdog,
)

__all__ = [
    "AUTO",
    "Attention",
    "Batch",
    "Checkpoint",
    "Config",
    "Data",
    "Distributed",
    "Faults",
    "Log",
    "Mesh",
    "Model",
    "Optimizer",
    "Precision",
    "Train",
    "Watchdog",
]
