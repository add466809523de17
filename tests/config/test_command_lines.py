"""Every command answers at once to `--help`, a typo and a wrong value, without a traceback.

What is quick is held by what is imported: JAX and the like take seconds.
"""

import dataclasses
import importlib
import json
import math
import os
import pathlib
import subprocess
import sys
import typing

import pytest

from gpt3jax import errors
from gpt3jax.config import command_line, ranges, validation

import documents
import test_config

PACKAGE = pathlib.Path(__file__).parents[2] / "gpt3jax"
HEAVY = {
    "flax", "grain", "jax", "jaxlib", "lm_eval", "optax", "orbax", "tensorboardX", "tensorstore",
    "torch", "uvicorn",
}  # fmt: skip

# For each command, a line with a value that it refuses, and a word of what it says.
WRONG = {
    "main": ("--config=recipe.py --train.seed=5000000000", "train.seed=5000000000"),
    "plan.__main__": ("--config=recipe.py --gpus=8 --mesh.tensor=3", "mesh.tensor=3"),
    "preflight.__main__": ("--config=recipe.py --train.n-steps=0", "no length"),
    "sample.__main__": ("--checkpoint=x --prompt=x --seed=-1", "--seed=-1"),
    "evaluate.__main__": ("--checkpoint=x --text=x --batch-size=0", "--batch-size=0"),
    "convert.__main__": ("from-megatron x --output=y --n-heads=-1", "--n-heads=-1"),
    "checkpoint.__main__": ("show x --step=-7", "--step=-7"),
    "data.prepare": ("--input=x --output-prefix=y --workers=0", "--workers=0"),
    "data.merge": ("--input=x --output-prefix=x", "--output-prefix"),
    "data.inspect": ("--config=recipe.py", "nowhere.idx"),
    "report.__main__": ("nowhere", "nowhere"),
    "summary.__main__": ("nowhere", "nowhere"),
}

RECIPE = """
from gpt3jax.config import *

def get_config():
    return Config(
        model=Model(n_layers=2, d_model=64, n_heads=4, seq_len=32),
        optimizer=Optimizer(peak_lr=1e-3),
        batch=Batch(global_batch_size=8),
        data=Data(paths=("nowhere",)),
        train=Train(n_steps=20),
    )
"""

# Calls a command several times, and tells the statuses and what was imported.
CALL = """
import importlib, json, sys
module, *lines = json.load(sys.stdin)
command, statuses = importlib.import_module(module), []
for line in lines:
    sys.argv[1:] = line
    try:
        statuses.append(command.main())
    except SystemExit as stop:
        statuses.append(stop.code)
print(json.dumps([statuses, sorted(sys.modules)]))
"""


def commands():
    """Return the modules that `python -m` runs for a user."""
    found = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for path in PACKAGE.rglob("*.py")
        if "if __name__ ==" in path.read_text()
    }
    # A child of plan, which asks it in JSON; what launch/ starts commands with.
    return found - {"plan.compiler", "distributed.launch"}


@pytest.mark.parametrize("module", sorted(commands()))
def test_help_a_typo_and_a_wrong_value_need_no_jax(module, tmp_path):
    (tmp_path / "recipe.py").write_text(RECIPE)
    line, word = WRONG[module]
    lines = [["--help"], ["--no-such-option=1", *line.split()], line.split()]
    done = subprocess.run(
        [sys.executable, "-c", CALL], input=json.dumps([f"gpt3jax.{module}", *lines]),
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    last = done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and word in last, done.stderr
    assert documents.points_on(last), last
    statuses, imported = json.loads(done.stdout.splitlines()[-1])
    assert statuses == [0, 2, 2]
    assert not HEAVY & set(imported)
    assert not list(tmp_path.glob("[!r_]*")), "nothing is written"


@pytest.mark.parametrize("module", ["main", "plan", "convert"])
def test_help_ends_quietly_where_nobody_reads_it(module):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", f"gpt3jax.{module}", "--help"],
        stdout=writer, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    os.close(writer)
    assert done.stderr == "" and done.returncode == (0 if module == "main" else 141)


def test_another_broken_pipe_is_an_error():
    def talk_to_a_dead_process():
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        command_line.run(talk_to_a_dead_process)


def kinds(module, monkeypatch):
    """Return the dataclasses of a command's options, none where it takes a config alone."""
    found = []

    def parse(kind, *_):
        found.extend(typing.get_args(part)[0] for part in typing.get_args(kind))
        found.extend([] if found else [kind])
        raise SystemExit

    monkeypatch.setattr(command_line, "parse", parse)
    monkeypatch.setattr(command_line, "parse_beside_config", parse)
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit):
        importlib.import_module(f"gpt3jax.{module}").main()
    return found + [group for kind in found for group in groups(kind)]


def groups(kind):
    """Yield the dataclasses in a dataclass of options, without those of a config."""
    for hint in typing.get_type_hints(kind).values():
        if dataclasses.is_dataclass(hint) and hint.__module__ != "gpt3jax.config.schema":
            yield hint


def required(kind):
    """Return the fields of a dataclass that have no default, with some values."""
    fields = [f for f in dataclasses.fields(kind) if f.default is f.default_factory]
    return {f.name: 8 if f.name == "gpus" else "x" for f in fields}


@pytest.mark.parametrize("module", sorted(commands()))
def test_every_number_of_a_command_is_refused_beyond_its_range(module, monkeypatch, capsys):
    for kind in kinds(module, monkeypatch):
        for name, hint in test_config.number_hints(kind):
            if "." in name:
                continue  # of a group, which comes by itself, or of the mesh of a config
            bounds = ranges.range_of(hint)
            assert bounds is not None, f"{module}: {name} has no range: see `ranges`"
            for value in {bounds.least, bounds.most} - {bounds.excluded}:
                validation.check_ranges(kind(**required(kind) | {name: value}), "--")
            for value in (bounds.least - 1, 2 * bounds.most + 1, math.nan, math.inf):
                with pytest.raises(errors.UserError) as error:
                    validation.check_ranges(kind(**required(kind) | {name: value}), "--")
                assert f"--{name.replace('_', '-')}={value} must be {bounds}: " in str(error.value)
