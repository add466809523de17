"""JAX's cache of compiled programs, in a folder beside the checkpoints: a restart finds its step.

JAX reads it in all processes and writes it in the first. What it cannot read or write costs a
warning and a compilation, never the run.
"""

import os
import pathlib

import jax

FOLDER = "compiled"


def keep_beside(checkpoints: str) -> None:
    """Keep compiled programs in a folder of `checkpoints`, "" for none, unless JAX has another.

    Call it before anything is compiled.
    """
    if not checkpoints or jax.config.values["jax_compilation_cache_dir"]:
        return
    folder = pathlib.Path(checkpoints).absolute() / FOLDER
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES" not in os.environ:
        # XLA's own, of tuned kernels, would end the compilation where it cannot be written.
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


def describe() -> list[str]:
    """Return a line for the log that says where compiled programs are kept, if they are."""
    folder = jax.config.values["jax_compilation_cache_dir"]
    if not folder or not jax.config.values["jax_enable_compilation_cache"]:
        return []
    return [f"compiled programs are kept in {folder}"]
