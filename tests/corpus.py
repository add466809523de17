"""A tiny corpus, a tiny recipe for it, and `gpt3jax.main` in this process or in its own."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np

from gpt3jax import main
from gpt3jax.config import recipe
from gpt3jax.data import indexed, tokenizer_training

REPOSITORY = pathlib.Path(__file__).parents[1]
VOCAB = 64
# Most of the tests' time is compiling, half of it in LLVM's optimizations, which no test is about.
# With and without them bits may differ: conftest.py sets this for the tests' own process.
XLA_FLAGS = "--xla_backend_optimization_level=0"
# What depends on the clock.
TIMES = (
    "time", "step_time", "tokens_per_second", "tokens_per_second_per_device", "tflops_per_device",
)  # fmt: skip

RECIPE = """
from gpt3jax import config


def get_config():
    return config.Config(
        model=config.Model(n_layers=2, d_model=32, n_heads=4, seq_len=16, vocab_size=64),
        optimizer=config.Optimizer(peak_lr=1e-2, warmup_samples=16, decay_samples=320),
        precision=config.Precision(compute_dtype="float32"),
        batch=config.Batch(global_batch_size=8),
        data=config.Data(paths=("corpus",), split="90,5,5", eod_id=0),
        mesh=config.Mesh(data=8),
        train=config.Train(n_steps=40, eval_interval=0),
        checkpoint=config.Checkpoint(dir="checkpoints", save_interval=10),
        log=config.Log(dir="logs", interval=1),
    )
"""


def write(prefix, spoil=None, n_documents=600):
    """Write random documents; the one numbered `spoil` has a token beyond the vocabulary."""
    rng = np.random.default_rng(7)
    with indexed.Writer(str(prefix), np.uint16) as writer:
        for i, length in enumerate(rng.integers(1, 60, n_documents)):
            tokens = [*rng.integers(1, VOCAB, length), 0]
            writer.add_document([[VOCAB + 3, *tokens[1:]] if i == spoil else tokens])


def write_run(folder):
    """Write corpus.bin, corpus.idx and recipe.py, whose paths are relative to the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "corpus")
    (folder / "recipe.py").write_text(RECIPE)
    return folder


def call_main(monkeypatch, folder, *args):
    """Run `gpt3jax.main` in this process, from the folder of a run; return its exit status."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["main", "--config=recipe.py", *args])
    return main.main()


def config_of(folder, *args):
    """Return the config that `call_main` trains with these arguments."""
    return recipe.parse([f"--config={folder}/recipe.py", *args])


def start_main(folder, *args, module="gpt3jax.main", patch="", **variables):
    """Start `python -m gpt3jax.main` from the folder of a run, as a process of its own.

    It emulates as many devices as conftest.py does here, so that both compute the same bits.
    `patch` is code that it runs first.
    """
    variables = {
        "XLA_FLAGS": XLA_FLAGS,
        "PYTHONPATH": str(REPOSITORY),
        "JAX_COMPILATION_CACHE_DIR": str(REPOSITORY / ".cache" / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    } | variables
    code = f"{patch}\nimport runpy; runpy.run_module('{module}', run_name='__main__')"
    command = [sys.executable, *(("-c", code) if patch else ("-m", module))]
    return subprocess.Popen(
        [*command, "--config=recipe.py", "--mesh.cpu-devices=8", *args],
        cwd=folder,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def records(folder):
    """Return the records of metrics.jsonl without what depends on the clock."""
    lines = (folder / "logs" / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def train_tokenizer(folder, texts, size=400):
    """Train a tokenizer on a few texts, five times each; return its two files."""
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    tokenizer_training.train(texts * 5, size, *files)
    return files
