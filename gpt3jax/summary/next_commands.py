"""What to do with a trained run next, as commands that work as they are printed. Imports no JAX."""

import collections
import itertools
import json
import pathlib
import re
import shlex
from typing import NamedTuple

from gpt3jax import errors
from gpt3jax.config import batch_schedule, command_line, schema
from gpt3jax.convert import hf_gpt2
from gpt3jax.summary import recorded_run


class Next(NamedTuple):
    """Something to do, in words, and its commands."""

    what: str
    commands: list[str]


def all_of(run: recorded_run.RecordedRun, prompt: str) -> list[Next]:
    """Return what to do next: train on, look at the run, use the model elsewhere."""
    report = ["--html", str(run.folder / "report.html")]
    return [
        train_on(run),
        Next(
            "look at the run", [command_line.shell_line("gpt3jax.report", str(run.folder), *report)]
        ),
        _use_elsewhere(run, prompt),
    ]


def train_on(run: recorded_run.RecordedRun) -> Next:
    """Return how to train on: to the end of the run, or beyond it, on another mesh if there is one.

    The run's own config.json takes the place of a recipe.
    """
    cfg = run.cfg
    schedule = batch_schedule.from_config(cfg.batch, cfg.model.seq_len)
    _, end = schedule.end(cfg.train, cfg.model.seq_len)
    options: list[str] = []
    where = "to its end"
    done = {"n_steps": run.newest.step, "n_samples": run.newest.consumed_samples}
    done["n_tokens"] = run.newest.consumed_samples * cfg.model.seq_len
    if run.newest.consumed_samples >= end:
        # A quarter more than is done: the last start may have had a lower limit, and nothing to do.
        limits = {name: n + -(-n // 4) for name, n in done.items() if getattr(cfg.train, name)}
        options = [w for n, x in limits.items() for w in (f"--train.{n.replace('_', '-')}", str(x))]
        where = f"to {' or '.join(f'{x:,} {n[2:]}' for n, x in limits.items())}"
    mesh = _other_mesh(cfg, run.newest.mesh)
    command = command_line.shell_line(
        "gpt3jax.main", "--config", str(run.log_dir / "config.json"), *options, *mesh
    )
    return Next(
        f"train on {where}{', on another mesh of the same devices' * bool(mesh)}", [command]
    )


def _other_mesh(cfg: schema.Config, words: str) -> list[str]:
    """Return options that turn replicas into shards; none where that is not sure to fit.

    `words` describe the run's mesh, as `run.startup.describe_mesh` does. The devices are as many,
    batches are cut as before, and no device needs more memory.
    """
    sizes: dict[str, int] = collections.defaultdict(lambda: 1)
    sizes |= {axis: int(size) for axis, size in re.findall(r"(\w+) (\d+)", words)}
    n_shards = sizes["data"] * sizes["fsdp"]
    if sizes["data"] == 1 or cfg.mesh.shard_optimizer is True or cfg.model.d_model % n_shards:
        return []
    return ["--mesh.data", "1", "--mesh.fsdp", str(n_shards)]


def _use_elsewhere(run: recorded_run.RecordedRun, prompt: str) -> Next:
    checkpoint = ["--checkpoint", run.cfg.checkpoint.dir]
    try:
        hf_gpt2.check(run.cfg.model)
    except errors.UserError:
        command = command_line.shell_line("gpt3jax.sample", *checkpoint, "--prompt", prompt)
        why = "its banded attention has no place in GPT-2's format, so it cannot be exported"
        return Next(f"let it write more ({why})", [command])
    output = str(_unused(run.folder / "hf"))
    code = _in_transformers(output, prompt, run.cfg.model.seq_len)
    convert = command_line.shell_line("gpt3jax.convert", "to-hf", *checkpoint, "--output", output)
    return Next(
        "export it, and open it in transformers (pip install torch transformers)",
        [
            convert,
            shlex.join([command_line.python(), "-c", code]),
        ],
    )


def _unused(folder: pathlib.Path) -> pathlib.Path:
    """Return a folder that is empty or does not exist: this one, or one with a number."""
    others = (folder.with_name(f"{folder.name}-{n}") for n in itertools.count(2))
    folders = itertools.chain([folder], others)
    return next(f for f in folders if not f.is_dir() or not any(f.iterdir()))


def _in_transformers(folder: str, prompt: str, seq_len: int) -> str:
    """Return a line of Python that lets transformers continue a word of the prompt.

    Without a limit it generates more tokens than a small model has positions, and fails.
    """
    word = re.search(r"[^\W\d_]+", prompt)
    names = map(json.dumps, ("text-generation", folder, word[0] if word else "The"))
    call = "pipeline({}, {})({}, max_new_tokens={})".format(*names, min(32, seq_len // 2))
    return f'from transformers import pipeline; print({call}[0]["generated_text"])'
