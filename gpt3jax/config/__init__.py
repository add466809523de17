"""What is trained: the tree of fields, its checks, recipes and the command line.

A recipe imports these names; the package itself imports the modules of this folder.
"""

from gpt3jax.config.schema import (
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
