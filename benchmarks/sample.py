"""Compare decoding on this machine with Hugging Face's `generate` on the same weights.

    python benchmarks/sample.py [--threads 1] [--rounds 2] [--peers gpt3jax]

The default is 12 layers x 512 x 8 heads, a vocabulary of 50304, prompts of 64 tokens, 128 new ones,
greedy, fp32, batches of 1 and 8; options change all of these. It runs on the CPU; the peers take
turns, each in its own process on the same number of cores. Hugging Face's peer needs
`pip install torch transformers` (the extra `benchmark`); `--peers gpt3jax` runs without it. A
figure covers a whole call, including prefill, after one warm-up call. On a shared machine,
compare the CPU seconds.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np

from gpt3jax.checkpoint import parameters
from gpt3jax.config import schema
from gpt3jax.convert import __main__ as convert
from gpt3jax.sample import generate, sampling_options

PEERS = ("gpt3jax", "hf")
CALLS = 2


def parse(args):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--vocab-size", type=int, default=50_304)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens to generate")
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 8))
    parser.add_argument("--worker", nargs=2, metavar=("PEER", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args(args)
    if "hf" in options.peers and not importlib.util.find_spec("transformers"):
        parser.error("hf needs `pip install torch transformers`: or give --peers gpt3jax")
    return options


def main(args):
    options = parse(args)
    if not options.worker:
        compare(options, args)
        return
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    peer, folder = options.worker
    run = {"gpt3jax": load_ours, "hf": load_hf}[peer](pathlib.Path(folder), options)
    print(json.dumps(measure(run, options)))


def compare(options, args):
    """Run the peers in turns, so that a busy spell of the machine hits both."""
    results = {peer: [] for peer in options.peers}
    with tempfile.TemporaryDirectory() as folder:
        write_weights(pathlib.Path(folder), options)
        for _ in range(options.rounds):
            for peer in options.peers:
                command = [sys.executable, __file__, *args, "--worker", peer, folder]
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                results[peer].append(json.loads(output.stdout.splitlines()[-1]))
    for i, size in enumerate(options.batches):
        calls = {peer: [call for run in results[peer] for call in run[i]] for peer in results}
        n = size * options.new
        wall = {peer: n / min(call["wall"] for call in calls[peer]) for peer in results}
        cpu = {peer: n / min(call["cpu"] for call in calls[peer]) for peer in results}
        for peer in results:
            print(
                f"batch {size} {peer:8} {wall[peer]:6.1f} tokens/s (best call), "
                f"{cpu[peer]:6.1f} tokens per CPU second"
            )
        if len(results) == len(PEERS):
            print(
                f"batch {size} gpt3jax / hf: {wall['gpt3jax'] / wall['hf']:.2f} in tokens/s, "
                f"{cpu['gpt3jax'] / cpu['hf']:.2f} per CPU second"
            )
        same = {str(call["tokens"]) for peer in results for call in calls[peer]}
        print(f"batch {size}: {'the same tokens' if len(same) == 1 else 'DIFFERENT tokens'}")
    print(f"{options.threads} thread(s), load {os.getloadavg()[0]:.1f}")


def write_weights(folder, options):
    """Write the same random weights for each peer: `folder/gpt3jax` and `folder/hf`."""
    import jax

    jax.config.update("jax_platforms", "cpu")

    model = schema.Model(
        n_layers=options.layers, d_model=options.width, n_heads=options.heads,
        seq_len=options.seq_len, vocab_size=options.vocab_size,
    )  # fmt: skip
    rng, weights = np.random.default_rng(0), {}

    def rows(name, shape, first, stop):
        if name not in weights:
            array = 0.06 * rng.standard_normal(shape, np.float32)
            weights[name] = array + 1 if name.endswith("scale_D") else array
        return weights[name][first:stop]

    ours = str(folder / "gpt3jax")
    parameters.write(
        parameters.new_store(ours), parameters.untrained(model, schema.Data(eod_id=0)), rows
    )
    if "hf" in options.peers:
        convert.to_hf(convert.ToHf(checkpoint=ours, output=str(folder / "hf")))


def measure(run, options):
    """Return wall and CPU seconds of the calls, by batch size."""
    results = []
    for size in options.batches:
        shape = size, options.prompt
        prompts = np.random.default_rng(0).integers(0, options.vocab_size, shape)
        run(prompts)
        rows = []
        for _ in range(CALLS):
            wall, cpu = time.perf_counter(), time.process_time()
            tokens = run(prompts)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            assert len(tokens) == size and all(len(row) == options.new for row in tokens)
            rows.append({"wall": wall, "cpu": cpu, "tokens": tokens})
        results.append(rows)
    return results


def load_ours(folder, options):
    import jax

    jax.config.update("jax_platforms", "cpu")

    source = parameters.open_for_use(str(folder / "gpt3jax"), schema.Mesh(), "float32")
    program = source.program
    generator = generate.Generator(source.params(), program.compute, program.mesh, -1)
    greedy = sampling_options.Options(temperature=0.0, max_new_tokens=options.new)

    def run(prompts):
        rows = [
            generate.Row(prompt=prompt, options=greedy, number=number)
            for number, prompt in enumerate(prompts.tolist())
        ]
        generated = [[] for _ in rows]
        for new in generator.stream(rows):
            for ids, tokens in zip(generated, new, strict=True):
                ids.extend(tokens)
        return generated

    return run


def load_hf(folder, options):
    import torch
    import transformers

    torch.set_num_threads(options.threads)
    model = transformers.GPT2LMHeadModel.from_pretrained(
        folder / "hf", attn_implementation="sdpa"
    ).eval()

    def run(prompts):
        with torch.inference_mode():
            out = model.generate(
                torch.as_tensor(prompts), max_new_tokens=options.new, do_sample=False,
                use_cache=True, eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        return out[:, options.prompt :].tolist()

    return run


if __name__ == "__main__":
    main(sys.argv[1:])
