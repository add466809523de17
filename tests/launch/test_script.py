"""The five-argument script starts what `python -m gpt3jax.main` starts, with the same options."""

import json
import os
import subprocess
import sys

import pytest

from gpt3jax.config import recipe
from gpt3jax.hardware import xla_flags

import corpus

SCRIPT = corpus.REPOSITORY / "launch" / "train_gpt3_175b_distributed.sh"
# An interpreter that writes down what it gets.
RECORDER = """#!{python}
import json, os, sys
with open({file!r}, "w") as file:
    json.dump([dict(os.environ), sys.argv[1:]], file)
"""
OPTIONS = ("--mesh.tensor=4", "--train.n-steps", "3")


@pytest.fixture
def recorded(tmp_path):
    """Return a function that runs the script, and returns what its interpreter gets."""
    recorder, file = tmp_path / "python", tmp_path / "recorded.json"
    recorder.write_text(RECORDER.format(python=sys.executable, file=str(file)))
    recorder.chmod(0o755)

    def call(**variables):
        environment = {"PATH": os.environ["PATH"], "PYTHON": str(recorder)} | variables
        command = [SCRIPT, "checkpoints", "logs", "", "", "corpus", *OPTIONS]
        subprocess.run(command, env=environment, check=True)
        return json.loads(file.read_text())

    return call


def test_it_adds_no_setting_but_that_gpus_are_meant(recorded):
    environment, _ = recorded()
    settings = {k: v for k, v in environment.items() if k.startswith(("XLA", "JAX", "NCCL", "TF"))}
    assert settings == {"JAX_PLATFORMS": "cuda,cpu"}
    for n_stages in (1, 4):
        given = xla_flags.compiler_options((9, 0), n_stages, environment)
        assert given == xla_flags.compiler_options((9, 0), n_stages, {})
    assert xla_flags.variables(environment) == xla_flags.variables({})
    own = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_mine=1", "JAX_OPTIMIZATION_LEVEL": "O0"}
    assert own.items() <= recorded(**own)[0].items()


def test_it_starts_main_with_the_config_of_the_five_paths(recorded):
    _, (_, starter, module, *arguments) = recorded()
    assert starter == "gpt3jax.distributed.launch"
    paths = ("--checkpoint.dir=checkpoints", "--log.dir=logs", "--data.paths=corpus")
    by_hand = (f"--config={corpus.REPOSITORY / 'configs' / '175b.py'}", *paths, *OPTIONS)
    assert module == "gpt3jax.main"
    assert recipe.parse(arguments) == recipe.parse(by_hand)


@pytest.mark.slow
def test_it_compiles_the_same_programs_as_main_by_itself(tmp_path):
    """JAX names a compiled program by a digest of it, XLA's options and the environment's."""
    folder = corpus.write_run(tmp_path)
    options = ["--mesh.cpu-devices=8", "--train.n-steps=1"]
    by_hand = [sys.executable, "-m", "gpt3jax.main", "--config=recipe.py", *options]
    by_script = [SCRIPT, "by_script", "logs_of_script", "", "", "corpus", *options]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")} | {
        "PYTHONPATH": str(corpus.REPOSITORY),
        "PYTHON": sys.executable,
        "CONFIG": "recipe.py",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": corpus.XLA_FLAGS,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    for command in (by_hand, by_script):
        subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    names = [
        {file.name for file in (folder / checkpoints / "compiled").iterdir()}
        for checkpoints in ("checkpoints", "by_script")
    ]
    assert names[0] == names[1] and any(name.startswith("jit_train_step-") for name in names[0])
