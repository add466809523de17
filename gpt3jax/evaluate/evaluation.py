"""A trained model measured on a text, a corpus or tasks, and the report of the results."""

import dataclasses
import itertools
import json
import math
import time
from collections.abc import Mapping

import numpy as np
import tqdm

from gpt3jax import errors
from gpt3jax.checkpoint import parameters
from gpt3jax.config import schema
from gpt3jax.data import tokenizer as tokenization
from gpt3jax.data import tokenizer_sources
from gpt3jax.evaluate import options as evaluate_options
from gpt3jax.evaluate import token_losses, token_stream, windows


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextLoss:
    """The loss of a text or a corpus, and what it was measured on; the keys of the JSON file."""

    checkpoint: str
    step: int
    measured: str
    seq_len: int
    stride: int
    tokens: int
    bytes: int | None
    loss: float
    perplexity: float
    bits_per_byte: float | None
    why_no_bytes: str | None
    seconds: float
    tokens_per_second: float


def evaluate(options: evaluate_options.Options) -> str:
    """Measure, write the JSON file if one is wanted, and return what to print.

    Raises:
        UserError: options, checkpoint, text, corpus or tasks cannot be used.
    """
    source = parameters.open_for_use(options.checkpoint, options.mesh, options.compute_dtype)
    seq_len = source.cfg.model.seq_len
    if options.stride > seq_len:
        raise errors.UserError(
            f"--stride={options.stride} must be from 1 to model.seq_len={seq_len}, or 0 for its "
            "default: choose a value there",
            page="evaluation.md#loss-perplexity-bits-per-byte",
        )
    results: Mapping[str, object]
    if options.tasks:
        results, report = _run_tasks(options, source)
    else:
        text_loss = measure(options, source)
        results, report = dataclasses.asdict(text_loss), "\n".join(_report_lines(text_loss))
    if options.json:
        evaluate_options.write(options.json, json.dumps(results, indent=2, default=str) + "\n")
    return report


def measure(options: evaluate_options.Options, source: parameters.Trained) -> TextLoss:
    """Return the loss of a text or a corpus.

    Raises:
        UserError: text, corpus or tokenizer cannot be used.
    """
    stream, why_no_bytes = _open(options, source.cfg)
    seq_len = source.cfg.model.seq_len
    stride = options.stride or max(1, seq_len // 2)
    scorer = token_losses.Scorer(
        source.params(), source.program, source.cfg.data, options.batch_size
    )
    begin = time.perf_counter()
    total = _sum_losses(scorer, stream, stride)
    seconds = time.perf_counter() - begin
    n_tokens, n_bytes = len(stream.tokens), stream.n_bytes
    return TextLoss(
        checkpoint=options.checkpoint,
        step=source.step,
        measured=options.text or options.data,
        seq_len=seq_len,
        stride=stride,
        tokens=n_tokens,
        bytes=n_bytes or None,
        loss=total / n_tokens,
        perplexity=float(np.exp(total / n_tokens)),
        bits_per_byte=total / math.log(2) / n_bytes if n_bytes else None,
        why_no_bytes=why_no_bytes or None,
        seconds=seconds,
        tokens_per_second=n_tokens / seconds,
    )


def _open(
    options: evaluate_options.Options, cfg: schema.Config
) -> tuple[token_stream.TokenStream, str]:
    """Return the tokens to score, and why their bytes are not known ("" if they are)."""
    if options.text:
        tokenizer = parameters.open_tokenizer(options.checkpoint, cfg, options.source)
        return token_stream.read_file(options.text, tokenizer, options.max_tokens), ""
    own_tokenizer: tokenization.Tokenizer | None = None
    why_no_bytes = ""
    try:
        own_tokenizer = parameters.open_tokenizer(options.checkpoint, cfg, options.source)
    except errors.UserError as error:
        if options.source != tokenizer_sources.Source():
            raise
        why_no_bytes = error.message
    stream = token_stream.read_corpus(options.data, own_tokenizer, cfg, options.max_tokens)
    return stream, why_no_bytes


def _sum_losses(
    scorer: token_losses.Scorer, stream: token_stream.TokenStream, stride: int
) -> float:
    """Return the sum of all tokens' losses (nats), with a progress bar."""
    rows = windows.window_rows(stream.tokens, stream.eod_id, scorer.seq_len, stride)
    n_tokens, sums = len(stream.tokens), []
    with tqdm.tqdm(total=n_tokens, desc="scoring", unit=" tokens", unit_scale=True) as bar:
        while batch := list(itertools.islice(rows, scorer.n_rows)):
            scored = scorer.score([row for row, _ in batch])
            for (losses, _), (_, n_counted) in zip(scored, batch, strict=True):
                sums.append(float(losses[len(losses) - n_counted :].sum(dtype=np.float64)))
                bar.update(n_counted)
    return math.fsum(sums)


def _report_lines(result: TextLoss) -> list[str]:
    bits = result.bits_per_byte
    lines = [
        f"{result.checkpoint}, step {result.step}: {result.measured}, "
        f"windows of {result.seq_len} tokens, stride {result.stride}",
        f"tokens         {result.tokens:,}",
        f"bytes          {result.bytes:,}" if result.bytes else "bytes          not known",
        f"loss           {result.loss:.6f} nats per token",
        f"perplexity     {result.perplexity:.4f}",
        f"bits per byte  {bits:.6f}" if bits else "bits per byte  not known",
        f"[{result.seconds:.1f} s, {result.tokens_per_second:,.1f} tokens/s]",
    ]
    if result.why_no_bytes:
        lines.append(f"The bytes are not known without a tokenizer: {result.why_no_bytes}")
    return lines


def _run_tasks(
    options: evaluate_options.Options, source: parameters.Trained
) -> tuple[Mapping[str, object], str]:
    from gpt3jax.evaluate import lm_eval_model  # it needs an extra

    tokenizer = parameters.open_tokenizer(options.checkpoint, source.cfg, options.source)
    model = lm_eval_model.CheckpointLM(source, tokenizer, options.batch_size, options.stride)
    names = [name.strip() for name in options.tasks.split(",")]
    return lm_eval_model.run(model, names, options.task_folder, options.n_fewshot, options.limit)
