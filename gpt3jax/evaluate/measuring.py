"""A trained model measured on a text, a corpus or tasks, and what is told of it."""

import itertools
import json
import math
import time
from typing import Any

import numpy as np
import tqdm

from gpt3jax import errors
from gpt3jax.checkpoint import parameters
from gpt3jax.config import schema
from gpt3jax.data import tokenizer_sources
from gpt3jax.evaluate import options, scoring, stream


def evaluate(given: options.Options) -> str:
    """Measure, write the JSON file if there is to be one, and return what to print.

    Raises:
        UserError: options, checkpoint, text, corpus or tasks that cannot be used.
    """
    source = parameters.open_for_use(given.checkpoint, given.mesh, given.compute_dtype)
    seq_len = source.cfg.model.seq_len
    if given.stride > seq_len:
        raise errors.UserError(
            f"--stride={given.stride} must be from 1 to model.seq_len={seq_len}, or 0 for its "
            "default: choose a value there"
        )
    if given.tasks:
        found, told = _run_tasks(given, source)
    else:
        found = measure(given, source)
        told = "\n".join(_lines(found))
    if given.json:
        text = json.dumps(found, indent=2, default=str)
        options.write(given.json, text + "\n")
    return told


def measure(given: options.Options, source: parameters.Trained) -> dict[str, Any]:
    """Return the loss of a text or a corpus, and what it was measured on.

    Raises:
        UserError: text, corpus or tokenizer cannot be used.
    """
    measured, why = _open(given, source.cfg)
    seq_len = source.cfg.model.seq_len
    stride = given.stride or max(1, seq_len // 2)
    scorer = scoring.Scorer(source.params(), source.program, source.cfg.data, given.batch_size)
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
        "checkpoint": given.checkpoint,
        "step": source.step,
        "measured": given.text or given.data,
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


def _open(given: options.Options, cfg: schema.Config) -> tuple[stream.Stream, str]:
    """Return what is scored, and why its bytes are not known ("" if they are)."""
    if given.text:
        text = parameters.open_tokenizer(given.checkpoint, cfg, given.source)
        return stream.of_file(given.text, text, given.max_tokens), ""
    try:
        found, why = parameters.open_tokenizer(given.checkpoint, cfg, given.source), ""
    except errors.UserError as error:
        if given.source != tokenizer_sources.Source():
            raise
        found, why = None, str(error)
    return stream.of_corpus(given.data, found, cfg, given.max_tokens), why


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


def _run_tasks(given: options.Options, source: parameters.Trained) -> tuple[dict[str, Any], str]:
    from gpt3jax.evaluate import lm_eval_model  # in an extra

    text = parameters.open_tokenizer(given.checkpoint, source.cfg, given.source)
    lm = lm_eval_model.CheckpointLM(source, text, given.batch_size, given.stride)
    names = [name.strip() for name in given.tasks.split(",")]
    return lm_eval_model.run(lm, names, given.task_folder, given.n_fewshot, given.limit)
