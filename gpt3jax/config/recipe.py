"""Reads a config: from a recipe (`configs/*.py` defines `get_config() -> Config`) and overrides.

A run's config.json or a checkpoint can take the place of a recipe.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import tyro

from gpt3jax import errors
from gpt3jax.config import command_line, schema, user_paths, validation

_PAGE = "training.md#recipes"
_META = pathlib.Path("meta", "metadata")  # in a checkpoint


def parse(args: Sequence[str], command: str = "gpt3jax.main") -> schema.Config:
    """Return the validated config of a command line: `--config RECIPE` and overrides.

    tyro's messages name the module `command`. Exits with such a message on an unknown or ill-typed
    option, and on `--help`.

    Raises:
        UserError: no recipe, an unreadable recipe, or values that contradict each other.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", default="")
    known, overrides = parser.parse_known_args(list(args))
    if not known.config and not {"-h", "--help"} & set(overrides):
        raise errors.UserError(
            "no recipe: add --config=FILE, for example --config=configs/quickstart.py", page=_PAGE
        )
    default: dict[str, Any] = {"default": load(known.config)} if known.config else {}
    with command_line.pointing_on("reference/options.md"):
        cfg: schema.Config = tyro.cli(
            schema.Config,
            prog=f"python -m {command} --config RECIPE.py",
            description="Train a GPT-3 model. These options override the recipe's values.",
            args=overrides,
            **default,
        )
    cfg = user_paths.expanded(cfg)
    validation.validate(cfg)
    return cfg


def load(path: str) -> schema.Config:
    """Return the config of a recipe, of a run's config.json, or of a checkpoint, not validated.

    Raises:
        UserError: the file does not exist or cannot be read.
    """
    file = pathlib.Path(os.path.expanduser(path))
    if (file / _META).is_file():
        return _read_json(path, file / _META)
    if not file.is_file():
        folder = file if file.is_dir() else file.parent
        files = (*folder.glob("*.py"), *folder.glob("config.json"))
        names = ", ".join(sorted(near.name for near in files)) or "none"
        fault = "a folder, but not a checkpoint: name a file" if file.is_dir() else "no such file"
        raise errors.UserError(
            f"--config={path}: {fault} (recipes in {folder}: {names})", page=_PAGE
        )
    if file.suffix == ".json":
        return _read_json(path, file)
    return _read_recipe(path, file)


def _read_json(path: str, file: pathlib.Path) -> schema.Config:
    """Return a config from JSON: a flat config itself, or an object with one under "config"."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return schema.unflatten(schema.Config, content.get("config", content))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise errors.UserError(
            f"--config={path}: {error}: give a recipe, a run's config.json, or a checkpoint",
            page=_PAGE,
        ) from error


def _read_recipe(path: str, file: pathlib.Path) -> schema.Config:
    spec = importlib.util.spec_from_file_location(f"recipe_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise errors.UserError(
            f"--config={path}: a recipe's name ends in .py, and that of a run's config in .json",
            page=_PAGE,
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        cfg = module.get_config() if hasattr(module, "get_config") else None
    except Exception as error:
        raise errors.UserError(
            f"--config={path}: {type(error).__name__}: {error}; fix the recipe", page=_PAGE
        ) from error
    if not hasattr(module, "get_config"):
        raise errors.UserError(
            f"--config={path}: the file must define get_config() -> Config", page=_PAGE
        )
    if not isinstance(cfg, schema.Config):
        raise errors.UserError(
            f"--config={path}: get_config() returned {type(cfg)}, not a Config", page=_PAGE
        )
    return cfg
