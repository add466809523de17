"""Every command answers at once to `--help`, a typo and a wrong value, without a traceback.

What is quick is held by what is imported: JAX and the like take seconds.
"""

import json
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "gpt3jax"
HEAVY = {
    "flax", "grain", "jax", "jaxlib", "lm_eval", "optax", "orbax", "tensorboardX", "tensorstore",
    "torch", "uvicorn",
}  # fmt: skip

# For each command, a line with a value that it refuses, and a word of what it says.
WRONG = {
    "main": ("--config=recipe.py --train.seed=5000000000", "train.seed=5000000000"),
    "plan.__main__": ("--config=recipe.py --gpus=8 --mesh.tensor=3", "mesh.tensor=3"),
    "preflight.__main__": ("--config=recipe.py --train.n-steps=0", "no length"),
    "xla_flags": ("--config=recipe.py --model.dropout=nan", "model.dropout=nan"),
    "sample.__main__": ("--checkpoint=x --prompt=x --seed=-1", "--seed=-1"),
    "evaluate.__main__": ("--checkpoint=x --text=x --batch-size=0", "--batch-size=0"),
    "convert.__main__": ("from-megatron x --output=y --n-heads=-1", "--n-heads=-1"),
    "checkpoint.__main__": ("show x --step=-7", "--step=-7"),
    "data.prepare": ("--input=x --output-prefix=y --workers=0", "--workers=0"),
    "data.merge": ("--input=x --output-prefix=x", "--output-prefix"),
    "data.inspect": ("--config=recipe.py", "nowhere.idx"),
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
    return found - {"plan.compiler"}  # a child of plan, which asks it in JSON


@pytest.mark.parametrize("module", sorted(commands()))
def test_help_a_typo_and_a_wrong_value_need_no_jax(module, tmp_path):
    (tmp_path / "recipe.py").write_text(RECIPE)
    line, word = WRONG[module]
    lines = [["--help"], ["--no-such-option=1", *line.split()], line.split()]
    done = subprocess.run(
        [sys.executable, "-c", CALL], input=json.dumps([f"gpt3jax.{module}", *lines]),
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr and word in done.stderr.splitlines()[-1], done.stderr
    statuses, imported = json.loads(done.stdout.splitlines()[-1])
    assert statuses == [0, 2, 2]
    assert not HEAVY & set(imported)
    assert not list(tmp_path.glob("[!r_]*")), "nothing is written"
