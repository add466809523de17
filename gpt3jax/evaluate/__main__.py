"""`python -m gpt3jax.evaluate --checkpoint CKPT --text FILE`: how good a trained model is.

    --text FILE             loss, perplexity and bits per byte of a file of text
    --data PREFIX           the same of a corpus, PREFIX.bin and PREFIX.idx
    --tasks NAME[,NAME]     the tasks of lm-eval, which is an extra (see docs/evaluation.md)

A mesh works as in training; what `stage` and `context` ask for is added to `fsdp`.
"""

import dataclasses
import importlib.util
import itertools
import json
import math
import pathlib
import sys
import time
from typing import Any, Literal

import numpy as np
import tqdm
import tyro

from gpt3jax import command, config, paths, trained
from gpt3jax.data import tokenizer
from gpt3jax.evaluate import scoring, stream


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What `gpt3jax.evaluate` is asked for."""

    checkpoint: config.Path
    """Folder of checkpoints, as checkpoint.dir; the newest is used."""
    text: config.Path = ""
    """A UTF-8 file, scored as one document."""
    data: config.Path = ""
    """In place of text: PREFIX of a corpus, scored as one stream of its documents."""
    tasks: str = ""
    """In place of text: names of lm-eval's tasks, with commas between them."""
    task_folder: config.Path = ""
    """With tasks: a folder of YAML files with more tasks."""
    n_fewshot: int = -1
    """With tasks: examples before each question (-1: as the task says)."""
    limit: int = 0
    """With tasks: questions of each task at most (0: all)."""
    stride: int = 0
    """Tokens that a window counts, in the context of those before them; 1 to seq_len, which means
    no overlap (0: half of seq_len; with tasks seq_len, as lm-eval does)."""
    max_tokens: int = 0
    """Score the first tokens alone, at most this many (0: all)."""
    batch_size: int = 8
    """Windows or questions at a time."""
    json: config.Path = ""
    """Write what was measured to this file as well."""
    source: tyro.conf.OmitArgPrefixes[tokenizer.Source] = dataclasses.field(
        default_factory=tokenizer.Source
    )
    mesh: config.Mesh = dataclasses.field(default_factory=config.Mesh)
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: float32 on a CPU, bfloat16 on a GPU."""


def evaluate(options: Options) -> str:
    """Measure, write the JSON file if there is to be one, and return what to print.

    Raises:
        UserError: options, checkpoint, text, corpus or tasks that cannot be used.
    """
    _check(options)
    source = trained.open_for_use(options.checkpoint, options.mesh, options.compute_dtype)
    seq_len = source.cfg.model.seq_len
    if not 0 <= options.stride <= seq_len:
        raise config.UserError(
            f"--stride={options.stride} must be from 1 to model.seq_len={seq_len}, or 0 for its "
            "default: choose a value there"
        )
    if options.tasks:
        found, told = _run_tasks(options, source)
    else:
        found = measure(options, source)
        told = "\n".join(_lines(found))
    if options.json:
        text = json.dumps(found, indent=2, default=str)
        _write(options.json, text + "\n")
    return told


def measure(options: Options, source: trained.Trained) -> dict[str, Any]:
    """Return the loss of a text or a corpus, and what it was measured on.

    Raises:
        UserError: text, corpus or tokenizer cannot be used.
    """
    measured, why = _open(options, source.cfg)
    seq_len = source.cfg.model.seq_len
    stride = options.stride or max(1, seq_len // 2)
    scorer = scoring.Scorer(source.params(), source.program, source.cfg.data, options.batch_size)
    rows = scoring.window_rows(measured.tokens, measured.eod_id, seq_len, stride)
    n_tokens, sums, begin = len(measured.tokens), [], time.perf_counter()
    with tqdm.tqdm(total=n_tokens, desc="scoring", unit=" tokens", unit_scale=True) as bar:
        while batch := list(itertools.islice(rows, scorer.n_rows)):
            scored = scorer.score([row for row, _ in batch])
            for (losses, _), (_, n_counted) in zip(scored, batch, strict=True):
                sums.append(float(losses[len(losses) - n_counted :].sum(dtype=np.float64)))
                bar.update(n_counted)
    seconds = time.perf_counter() - begin
    total = math.fsum(sums)
    n_bytes = measured.n_bytes
    return {
        "checkpoint": options.checkpoint,
        "step": source.step,
        "measured": options.text or options.data,
        "seq_len": seq_len,
        "stride": stride,
        "tokens": n_tokens,
        "bytes": n_bytes or None,
        "loss": total / n_tokens,
        "perplexity": float(np.exp(total / n_tokens)),
        "bits_per_byte": total / math.log(2) / n_bytes if n_bytes else None,
        "why_no_bytes": why or None,
        "seconds": seconds,
        "tokens_per_second": n_tokens / seconds,
    }


def _open(options: Options, cfg: config.Config) -> tuple[stream.Stream, str]:
    """Return what is scored, and why its bytes are not known ("" if they are)."""
    if options.text:
        text = trained.open_tokenizer(options.checkpoint, cfg, options.source)
        return stream.of_file(options.text, text, options.max_tokens), ""
    try:
        found, why = trained.open_tokenizer(options.checkpoint, cfg, options.source), ""
    except config.UserError as error:
        if options.source != tokenizer.Source():
            raise
        found, why = None, str(error)
    return stream.of_corpus(options.data, found, cfg, options.max_tokens), why


def _lines(found: dict[str, Any]) -> list[str]:
    """Return what was measured, for a terminal."""
    bits = found["bits_per_byte"]
    lines = [
        f"{found['checkpoint']}, step {found['step']}: {found['measured']}, "
        f"windows of {found['seq_len']} tokens, stride {found['stride']}",
        f"tokens         {found['tokens']:,}",
        f"bytes          {found['bytes']:,}" if found["bytes"] else "bytes          not known",
        f"loss           {found['loss']:.6f} nats per token",
        f"perplexity     {found['perplexity']:.4f}",
        f"bits per byte  {bits:.6f}" if bits else "bits per byte  not known",
        f"[{found['seconds']:.1f} s, {found['tokens_per_second']:,.1f} tokens/s]",
    ]
    why = found["why_no_bytes"]
    return [*lines, f"The bytes are not known without a tokenizer: {why}"] if why else lines


def _run_tasks(options: Options, source: trained.Trained) -> tuple[dict[str, Any], str]:
    from gpt3jax.evaluate import lm_eval_model  # in an extra

    text = trained.open_tokenizer(options.checkpoint, source.cfg, options.source)
    lm = lm_eval_model.CheckpointLM(source, text, options.batch_size, options.stride)
    names = [name.strip() for name in options.tasks.split(",")]
    return lm_eval_model.run(lm, names, options.task_folder, options.n_fewshot, options.limit)


def _check(options: Options) -> None:
    """Check what needs no checkpoint."""
    given = [f"--{name}" for name in ("text", "data", "tasks") if getattr(options, name)]
    if len(given) != 1:
        told = " and ".join(given) if given else "nothing"
        raise config.UserError(f"{told} given to measure: give one of --text, --data and --tasks")
    for name, least in (("batch_size", 1), ("max_tokens", 0), ("limit", 0), ("n_fewshot", -1)):
        value = getattr(options, name)
        if value < least:
            option = name.replace("_", "-")
            raise config.UserError(f"--{option}={value} must be at least {least}: raise it")
    defaults = Options(checkpoint="")
    useless = ("max_tokens",) if options.tasks else ("task_folder", "n_fewshot", "limit")
    for name in useless:
        if getattr(options, name) != getattr(defaults, name):
            option = name.replace("_", "-")
            raise config.UserError(f"--{option} has no effect with {given[0]}: leave it out")
    if options.tasks and importlib.util.find_spec("lm_eval") is None:
        raise config.UserError("--tasks needs the extra: pip install 'gpt3jax[lm-eval]'")
    if options.json:
        _write(options.json, "")  # now, not after hours


def _write(path: str, content: str) -> None:
    try:
        pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
        pathlib.Path(path).write_text(content, encoding="utf-8")
    except OSError as error:
        raise config.UserError(f"--json={path} cannot be written: {error}") from error


def main() -> int:
    """Parse, measure; return the exit status."""
    options = tyro.cli(Options, prog="python -m gpt3jax.evaluate", description=__doc__)
    return command.run(lambda: print(evaluate(paths.expanded(options, "--"))))


if __name__ == "__main__":
    sys.exit(main())
