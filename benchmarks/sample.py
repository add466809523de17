"""Measure decoding on this machine, beside Hugging Face's `generate` with the same weights.

    python benchmarks/sample.py [--threads 1] [--rounds 2]

12 x 512 x 8, vocabulary 50304, prompts of 64 tokens, 128 new ones, greedy, fp32, batch 1 and 8; on
the CPU, each in a process of its own, in turns, held to the same number of cores. It needs
`pip install torch transformers` (the extra `benchmark`). Figures are of whole calls, prefill
included, after one to warm up; CPU seconds are the figure to compare where the machine is shared.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np

PROMPT, NEW, BATCHES, CALLS = 64, 128, (1, 8), 2
PEERS = ("gpt3jax", "hf")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--worker", nargs=2, metavar=("PEER", "FOLDER"))
    args = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])  # children too
    if args.worker:
        peer, folder = args.worker
        run = {"gpt3jax": load_ours, "hf": load_hf}[peer](pathlib.Path(folder), args.threads)
        print(json.dumps(measure(run)))
    else:
        compare(args)


def compare(args):
    """Run the peers in turns, so that a busy spell of the machine hits both."""
    results = {peer: [] for peer in PEERS}
    with tempfile.TemporaryDirectory() as folder:
        write_weights(folder)
        for _ in range(args.rounds):
            for peer in PEERS:
                command = [sys.executable, __file__, "--threads", str(args.threads)]
                command += ["--worker", peer, folder]
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                results[peer].append(json.loads(output.stdout.splitlines()[-1]))
    for i, size in enumerate(BATCHES):
        rows = {peer: [r for result in results[peer] for r in result[i]] for peer in PEERS}
        wall = {peer: size * NEW / min(r["wall"] for r in rows[peer]) for peer in PEERS}
        cpu = {peer: size * NEW / min(r["cpu"] for r in rows[peer]) for peer in PEERS}
        for peer in PEERS:
            print(
                f"batch {size} {peer:8} {wall[peer]:6.1f} tokens/s (best call), "
                f"{cpu[peer]:6.1f} tokens per CPU second"
            )
        print(
            f"batch {size} gpt3jax / hf: {wall['gpt3jax'] / wall['hf']:.2f} in tokens/s, "
            f"{cpu['gpt3jax'] / cpu['hf']:.2f} per CPU second"
        )
        same = {str(r["tokens"]) for peer in PEERS for r in rows[peer]}
        print(f"batch {size}: {'the same tokens' if len(same) == 1 else 'DIFFERENT tokens'}")
    print(f"{args.threads} thread(s), load {os.getloadavg()[0]:.1f}")


def write_weights(folder):
    import transformers

    cfg = transformers.GPT2Config(
        vocab_size=50304, n_positions=1024, n_embd=512, n_layer=12, n_head=8, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.06,
    )  # fmt: skip
    transformers.GPT2LMHeadModel(cfg).save_pretrained(folder)


def measure(run):
    """Return wall and CPU seconds of the calls, by batch size."""
    results = []
    for size in BATCHES:
        prompts = np.random.default_rng(0).integers(0, 50_257, (size, PROMPT))
        run(prompts)
        rows = []
        for _ in range(CALLS):
            wall, cpu = time.perf_counter(), time.process_time()
            tokens = run(prompts)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            assert len(tokens) == size and all(len(row) == NEW for row in tokens)
            rows.append({"wall": wall, "cpu": cpu, "tokens": tokens})
        results.append(rows)
    return results


def load_ours(folder, threads):
    import jax

    jax.config.update("jax_platforms", "cpu")
    from gpt3jax import config, model, sharding
    from gpt3jax.convert import hf_gpt2
    from gpt3jax.sample import generate, text_options

    cfg, _ = hf_gpt2.read_config(folder)
    weights = hf_gpt2.Weights(folder, cfg)

    def read(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
        return jax.numpy.asarray(weights.parameter(name, leaf.shape))

    abstract = jax.eval_shape(lambda: model.GPT(cfg, jax.random.key(0)))
    params = jax.tree.map_with_path(read, abstract)
    mesh = sharding.make_mesh(config.Mesh())
    generator = generate.Generator(params, model.Compute(), mesh, -1)
    options = text_options.Options(temperature=0.0, max_new_tokens=NEW)

    def run(prompts):
        out = [[] for _ in prompts]
        rows = list(range(len(prompts)))
        for new in generator.stream(prompts.tolist(), [options] * len(prompts), rows):
            for row, tokens in zip(out, new, strict=True):
                row.extend(tokens)
        return out

    return run


def load_hf(folder, threads):
    import torch
    import transformers

    torch.set_num_threads(threads)
    model = transformers.GPT2LMHeadModel.from_pretrained(folder, attn_implementation="sdpa").eval()

    def run(prompts):
        with torch.inference_mode():
            out = model.generate(
                torch.as_tensor(prompts), max_new_tokens=NEW, do_sample=False, use_cache=True,
                eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        return out[:, PROMPT:].tolist()

    return run


if __name__ == "__main__":
    main()
