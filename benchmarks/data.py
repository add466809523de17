"""Measure the data path on this machine, and Megatron's in the same run for comparison.

    python benchmarks/data.py --vocab-file vocab.json --merge-file merges.txt [--megatron]

It measures four things: tokens encoded per CPU second of one worker; the time and memory to build
the sample index of 10M documents; samples read per second at 2,048 tokens; tokens per second that
the loader gives a process. Options change the sizes. `--megatron` alternates our code with
megatron-core's classes on the same input (`pip install -e '.[benchmark]'`; torch from the CPU index
is enough). Megatron's `preprocess_data.py` is not on PyPI. Instead the three steps of its worker
are timed, without its start and its pipes: parse JSON, encode with Hugging Face's GPT-2 tokenizer,
add to megatron-core's IndexedDatasetBuilder.
"""

import argparse
import contextlib
import filecmp
import json
import pathlib
import resource
import statistics
import sys
import sysconfig
import tempfile
import time
import tracemalloc

import numpy as np

from gpt3jax.config import batch_schedule, schema
from gpt3jax.data import indexed, loader, prepare, samples, splits, tokenizer_sources
from gpt3jax.sharding import meshes

SEQ_LEN = 2048


def parse(args):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab-file", required=True)
    parser.add_argument("--merge-file", required=True)
    parser.add_argument("--megatron", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--text-mb", type=float, default=20, help="size of the text to encode")
    parser.add_argument("--documents", type=int, default=10_000_000, help="documents in the index")
    parser.add_argument("--corpus-mb", type=float, default=80, help="size of the corpus to read")
    parser.add_argument("--samples", type=int, default=8192, help="the loader reads twice as many")
    return parser.parse_args(args)


def main(args):
    options = parse(args)
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        encoding(root, options)
        index(options)
        reading(root, options)
        loading(root, options)


def show(what, unit, ours, theirs=()):
    """Print medians and spread, and the ratio of medians; more is better."""
    line = f"{what}: gpt3jax {_figure(ours)} {unit}"
    if theirs:
        ratio = statistics.median(ours) / statistics.median(theirs)
        line += f", Megatron {_figure(theirs)} {unit}: {ratio:.2f} times as many"
    print(line, flush=True)


def _figure(values):
    return f"{statistics.median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})"


@contextlib.contextmanager
def timed(rates, n, clock=time.perf_counter):
    """Append how many of the n things the block does per second."""
    begin = clock()
    yield
    rates.append(n / (clock() - begin))


def encoding(root, options):
    """Write Python's own sources as JSON lines, and encode them."""
    files = options.vocab_file, options.merge_file
    paths = sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    size = 0
    with (root / "text.jsonl").open("w") as file:
        for path in paths:
            text = path.read_bytes().decode(errors="ignore")
            if size < options.text_mb * 1e6 and "-packages" not in str(path):
                size += file.write(json.dumps({"text": text}) + "\n")
    source = tokenizer_sources.Source(vocab_file=files[0], merge_file=files[1])
    job = prepare.Options(
        input=(str(root / "text.jsonl"),),
        output_prefix=str(root / "ours"),
        source=source,
        append_eod=True,
        workers=1,
    )
    n = prepare.prepare(job).n_tokens
    ours, theirs, wall = [], [], []
    for _ in range(options.rounds):
        with timed(wall, n), timed(ours, n, time.process_time):
            prepare.prepare(job)
        if options.megatron:
            with timed(theirs, n, time.process_time):
                megatron_encoding(root, files)
            same = filecmp.cmp(root / "theirs.bin", root / "ours_text_document.bin", shallow=False)
            assert same, "the two wrote different tokens"
    show("encoding, whole command, one worker", "tokens per CPU second", ours, theirs)
    show("  by the clock (two threads of it)", "tokens/s", wall)


def megatron_encoding(root, files):
    import torch
    import transformers
    from megatron.core.datasets import indexed_dataset

    gpt2 = transformers.GPT2TokenizerFast(*files)
    builder = indexed_dataset.IndexedDatasetBuilder(str(root / "theirs.bin"), dtype=np.uint16)
    for line in (root / "text.jsonl").open(encoding="utf-8"):
        ids = gpt2.encode(json.loads(line)["text"])
        if ids:
            ids.append(gpt2.eos_token_id)
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(str(root / "theirs.idx"))


class Lengths:
    """The part of a corpus that building indices needs; 10M documents have 9.0B tokens."""

    prefix = "synthetic"

    def __init__(self, n_documents):
        rng = np.random.default_rng(1234)
        lengths = rng.lognormal(6.3, 1.0, n_documents).clip(1, 200_000)
        self.lengths = lengths.astype(np.int32)
        self.n_tokens = int(self.lengths.sum(dtype=np.int64))

    def __len__(self):
        return len(self.lengths)


def index(options):
    corpus = Lengths(options.documents)
    whole = samples.SampleMap(corpus, (0, len(corpus)), samples.Request(seq_len=SEQ_LEN, seed=1))
    n, total, documents = len(whole), corpus.n_tokens, whole.document_index
    ours, theirs = [], []
    for _ in range(options.rounds):
        with timed(ours, n, time.process_time):
            built = samples.build_sample_index(corpus.lengths, documents, SEQ_LEN, n)
        if options.megatron:
            from megatron.core.datasets import helpers

            with timed(theirs, n, time.process_time):
                other = helpers.build_sample_idx(
                    corpus.lengths, documents, SEQ_LEN, 1, total, True, True
                )
            assert (built == other).all(), "the two built different indices"
    show(f"sample index of {options.documents:,} documents", "samples per CPU second", ours, theirs)
    tracemalloc.start()
    samples.build_sample_index(corpus.lengths, documents, SEQ_LEN, n)
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    begin = time.perf_counter()
    samples.SampleMap(corpus, (0, len(corpus)), samples.Request(seq_len=SEQ_LEN, seed=1))
    seconds = time.perf_counter() - begin
    print(
        f"  {n:,} samples: {peak:.0f} MiB at its peak, {built.nbytes / 2**20:.0f} MiB kept; "
        f"{seconds:.2f} s with both shuffles; process {_peak_mib():,.0f} MiB",
        flush=True,
    )


def write_corpus(root, n_megabytes):
    """Write random tokens, 2 bytes each, in documents of about 1,000."""
    rng = np.random.default_rng(5)
    with indexed.Writer(str(root / "random"), np.uint16) as writer:
        for length in rng.integers(1, 2000, int(n_megabytes * 500)):
            writer.add_document([rng.integers(0, 50_256, length, dtype=np.uint16)])
    return str(root / "random")


def reading(root, options):
    prefix = write_corpus(root, options.corpus_mb)
    corpus = indexed.IndexedCorpus(prefix)
    source = samples.SampleMap(corpus, (0, len(corpus)), samples.Request(seq_len=SEQ_LEN, seed=1))
    data = schema.Data(eod_id=50_256)
    other = megatron_dataset(prefix) if options.megatron else None
    rng = np.random.default_rng(2)
    batches, singles, theirs, limit = [], [], [], []
    for _ in range(options.rounds):
        numbers = rng.permutation(len(source))[: options.samples]
        with timed(batches, len(numbers)):
            for batch in cut(numbers):
                samples.read(source, data, batch)
        few = numbers[:2000]
        with timed(singles, len(few)):
            for number in few:
                samples.read(source, data, number[None])
        starts = rng.integers(0, corpus.n_tokens - SEQ_LEN - 1, len(numbers))
        with timed(limit, len(starts)):
            for batch in cut(starts):
                corpus.tokens[batch[:, None] + np.arange(SEQ_LEN + 1)].astype(np.int32)
        if other is not None:
            with timed(theirs, len(few)):
                for number in few:
                    other[int(number)]
    show("samples of 2,048 tokens, in batches of 128", "samples/s", batches, theirs)
    show("  one by one", "samples/s", singles, theirs)
    show("  the memory map alone, gathered by 128", "samples/s", limit)


def cut(numbers):
    """Return batches of 128 of them."""
    return np.split(numbers, range(128, len(numbers), 128))


def megatron_dataset(prefix):
    from megatron.core.datasets import gpt_dataset, indexed_dataset, utils

    class Tokens:
        eod, pad, vocab_size = 50_256, -1, 50_257
        unique_identifiers: dict = {}  # noqa: RUF012

    low_level = indexed_dataset.IndexedDataset(prefix)
    settings = gpt_dataset.GPTDatasetConfig(
        random_seed=1,
        sequence_length=SEQ_LEN,
        split="1,0,0",
        tokenizer=Tokens(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        blend=([prefix], None),
    )
    chosen = np.arange(len(low_level), dtype=np.int32)
    return gpt_dataset.GPTDataset(low_level, prefix, chosen, None, utils.Split.train, settings)


def loading(root, options):
    """Read batches of 256 through Grain onto the device of a one-device mesh."""
    cfg = schema.Config(
        model=schema.Model(n_layers=1, d_model=8, n_heads=1, seq_len=SEQ_LEN),
        optimizer=schema.Optimizer(peak_lr=1e-3),
        precision=schema.Precision(),
        batch=schema.Batch(global_batch_size=256, microbatch_size=8),
        data=schema.Data(paths=(str(root / "random"),), split="1"),
        train=schema.Train(n_steps=1, eval_interval=0),
    )
    mesh = meshes.make_mesh(cfg.mesh)
    n = -(-2 * options.samples // 256) * 256
    opened = splits.open_splits(cfg, 1, n)
    schedule = batch_schedule.from_config(cfg.batch, SEQ_LEN)
    rates = []
    for _ in range(options.rounds):
        with timed(rates, n * SEQ_LEN):
            for batch, _, _ in loader.train_batches(opened, cfg, schedule, mesh, 0, n):
                batch["tokens"].block_until_ready()
    show("the loader, per process", "tokens/s", rates)


def _peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main(sys.argv[1:])
