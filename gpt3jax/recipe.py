"""Reading a config: a recipe (`configs/*.py` defines `get_config() -> Config`) and overrides."""

import argparse
import importlib.util
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import tyro

from gpt3jax import config, paths, validation


def parse(args: Sequence[str], command: str = "gpt3jax.main") -> config.Config:
    """Return the validated config of a command line: `--config RECIPE` and overrides.

    `command` is what tyro's messages call it. Exits with such a message on an unknown or ill-typed
    option, and on `--help`.

    Raises:
        UserError: no recipe, an unreadable recipe, or values that do not go together.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", default="")
    known, overrides = parser.parse_known_args(list(args))
    if not known.config and not {"-h", "--help"} & set(overrides):
        raise config.UserError(
            "no recipe: add --config=FILE, for example --config=configs/quickstart.py"
        )
    recipe: dict[str, Any] = {"default": load(known.config)} if known.config else {}
    cfg: config.Config = tyro.cli(
        config.Config,
        prog=f"python -m {command} --config RECIPE.py",
        description="Train a GPT-3 model: the recipe's values, and these options over them.",
        args=overrides,
        **recipe,
    )
    cfg = paths.expanded(cfg)
    validation.validate(cfg)
    return cfg


def load(path: str) -> config.Config:
    """Return what `get_config()` of a recipe file returns, not yet validated."""
    file = pathlib.Path(os.path.expanduser(path))
    if not file.is_file():
        near = ", ".join(sorted(p.name for p in file.parent.glob("*.py"))) or "none"
        raise config.UserError(f"--config={path}: no such file (recipes in {file.parent}: {near})")
    spec = importlib.util.spec_from_file_location(f"recipe_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise config.UserError(f"--config={path}: a recipe is a Python file, ending in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        cfg = module.get_config() if hasattr(module, "get_config") else None
    except Exception as error:
        raise config.UserError(
            f"--config={path}: {type(error).__name__}: {error}; mend it"
        ) from error
    if not hasattr(module, "get_config"):
        raise config.UserError(f"--config={path}: the file must define get_config() -> Config")
    if not isinstance(cfg, config.Config):
        raise config.UserError(f"--config={path}: get_config() returned {type(cfg)}, not a Config")
    return cfg
