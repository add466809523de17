"""Reading a config: a recipe (`configs/*.py` defines `get_config() -> Config`) and overrides.

In place of a recipe stands what a run has written down of its own config.
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
from gpt3jax.config import schema, user_paths, validation

_META = pathlib.Path("meta", "metadata")  # of a checkpoint


def parse(args: Sequence[str], command: str = "gpt3jax.main") -> schema.Config:
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
        raise errors.UserError(
            "no recipe: add --config=FILE, for example --config=configs/quickstart.py"
        )
    recipe: dict[str, Any] = {"default": load(known.config)} if known.config else {}
    cfg: schema.Config = tyro.cli(
        schema.Config,
        prog=f"python -m {command} --config RECIPE.py",
        description="Train a GPT-3 model: the recipe's values, and these options over them.",
        args=overrides,
        **recipe,
    )
    cfg = user_paths.expanded(cfg)
    validation.validate(cfg)
    return cfg


def load(path: str) -> schema.Config:
    """Return the config of a file, not yet validated.

    A recipe gives what its `get_config()` returns; a run's config.json, or the folder of a
    checkpoint, what was written there.

    Raises:
        UserError: the file is not there or cannot be read.
    """
    file = pathlib.Path(os.path.expanduser(path))
    if (file / _META).is_file():
        return _stored(path, file / _META)
    if not file.is_file():
        folder = file if file.is_dir() else file.parent
        files = (*folder.glob("*.py"), *folder.glob("config.json"))
        found = ", ".join(sorted(near.name for near in files)) or "none"
        fault = "a folder, but of no checkpoint: name a file" if file.is_dir() else "no such file"
        raise errors.UserError(f"--config={path}: {fault} (recipes in {folder}: {found})")
    if file.suffix == ".json":
        return _stored(path, file)
    return _of_recipe(path, file)


def _stored(path: str, file: pathlib.Path) -> schema.Config:
    """Return a config from its JSON, which may stand beside other things under "config"."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return schema.unflatten(schema.Config, found.get("config", found))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise errors.UserError(
            f"--config={path}: {error}: give a recipe, a run's config.json, or a checkpoint"
        ) from error


def _of_recipe(path: str, file: pathlib.Path) -> schema.Config:
    spec = importlib.util.spec_from_file_location(f"recipe_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise errors.UserError(
            f"--config={path}: a recipe ends in .py, and a run's config in .json"
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        cfg = module.get_config() if hasattr(module, "get_config") else None
    except Exception as error:
        raise errors.UserError(
            f"--config={path}: {type(error).__name__}: {error}; mend it"
        ) from error
    if not hasattr(module, "get_config"):
        raise errors.UserError(f"--config={path}: the file must define get_config() -> Config")
    if not isinstance(cfg, schema.Config):
        raise errors.UserError(f"--config={path}: get_config() returned {type(cfg)}, not a Config")
    return cfg
