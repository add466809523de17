"""Measure the training step of a config on this machine: tokens/s, compile time, peak memory.

    python benchmarks/train_step.py --config=configs/345m.py --data.mock [--group.field VALUE ...]
    python benchmarks/train_step.py --cpu-peers [--rounds 2] [--peers gpt3jax]

`--cpu-peers` runs the same workload with gpt3jax and with Hugging Face's GPT-2 in PyTorch, in turns
and each in its own process, and prints both and their ratio. The workload is fp32 without dropout:
forward, backward, clip, AdamW. Options change its sizes (12 x 512 x 8, sequence 1024, vocabulary
50304, batch 4). Hugging Face's peer needs `pip install torch transformers` (the extra `benchmark`);
`--peers gpt3jax` runs without it. On a shared machine, compare the CPU seconds.
"""

import argparse
import importlib.util
import json
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

from gpt3jax.config import recipe
from gpt3jax.data import global_batch
from gpt3jax.distributed import joining
from gpt3jax.run import layout_choice

N_STEPS = 4
PEERS = ("gpt3jax", "hf")
WORKLOAD = """
from gpt3jax.config import *

def get_config():
    return Config(
        model=Model(n_layers={o.layers}, d_model={o.width}, n_heads={o.heads}, seq_len={o.seq_len},
                    vocab_size={o.vocab_size}, dropout=0.0, attention_dropout=0.0, remat="dots",
                    n_loss_chunks=8),
        optimizer=Optimizer(peak_lr=1e-4, init_lr=1e-4, decay="constant"),
        precision=Precision(compute_dtype="float32"),
        batch=Batch(global_batch_size={o.batch}, microbatch_size={o.batch}),
        data=Data(paths=("random tokens",)),
        train=Train(n_steps=1000),
    )
"""


def parse(args):
    """Return the benchmark's own options and the recipe's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--cpu-peers", action="store_true")
    of_peers = parser.add_argument_group("with --cpu-peers")
    of_peers.add_argument("--rounds", type=int, default=2)
    of_peers.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS)
    of_peers.add_argument("--layers", type=int, default=12)
    of_peers.add_argument("--width", type=int, default=512)
    of_peers.add_argument("--heads", type=int, default=8)
    of_peers.add_argument("--seq-len", type=int, default=1024)
    of_peers.add_argument("--vocab-size", type=int, default=50_304)
    of_peers.add_argument("--batch", type=int, default=4)
    of_peers.add_argument("--worker", choices=PEERS, help=argparse.SUPPRESS)
    options, recipe_args = parser.parse_known_args(args)
    if options.cpu_peers and "hf" in options.peers and not importlib.util.find_spec("transformers"):
        parser.error("hf needs `pip install torch transformers`: or give --peers gpt3jax")
    return options, recipe_args


def main(args):
    options, recipe_args = parse(args)
    if options.worker == "hf":
        print(json.dumps(measure_hf(options)))
    elif options.worker == "gpt3jax":
        print(json.dumps(measure_ours(recipe_args)))
    elif options.cpu_peers:
        compare(options, args)
    else:
        show("gpt3jax", measure_ours(recipe_args))


def compare(options, args):
    """Run the peers in turns, so that a busy spell of the machine hits both."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = pathlib.Path(folder, "workload.py")
        recipe.write_text(WORKLOAD.format(o=options))
        results = {peer: [] for peer in options.peers}
        for _ in range(options.rounds):
            for peer in options.peers:
                command = [sys.executable, __file__, *args, "--worker", peer]
                command += [f"--config={recipe}"] if peer == "gpt3jax" else []
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                results[peer].append(json.loads(output.stdout.splitlines()[-1]))
                show(peer, results[peer][-1])
    if len(results) < len(PEERS):
        return
    best = {peer: max(r["tokens_per_second"] for r in results[peer]) for peer in results}
    cpu = {peer: min(r["cpu_seconds_per_step"] for r in results[peer]) for peer in results}
    print(
        f"gpt3jax / hf: {best['gpt3jax'] / best['hf']:.2f} in tokens/s (best step), "
        f"{cpu['hf'] / cpu['gpt3jax']:.2f} in steps per CPU second"
    )


def show(name, result):
    print(
        f"{name:8} {result['tokens_per_second']:8.0f} tokens/s (best of {result['n_steps']}; "
        f"median {result['median_tokens_per_second']:.0f}), "
        f"{result['cpu_seconds_per_step']:.1f} CPU s per step, "
        f"compile {result['compile_seconds']:.1f} s, peak {result['peak_gib']:.2f} GiB "
        f"({result['memory']}), on {result['device']}",
        flush=True,
    )


def timed(step, n_tokens):
    """Return the figures of `N_STEPS` calls of a step, each waiting until the step ends."""
    walls, cpus = [], []
    for _ in range(N_STEPS):
        wall, cpu = time.perf_counter(), time.process_time()
        step()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return {
        "n_steps": N_STEPS,
        "tokens_per_second": n_tokens / min(walls),
        "median_tokens_per_second": n_tokens / statistics.median(walls),
        "cpu_seconds_per_step": min(cpus),
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "memory": "process RSS",
    }


def prepare(args):
    """Return the step of a recipe in its layout, with a batch of random tokens for it."""
    cfg = recipe.parse(args)
    joining.start(cfg.distributed, cfg.mesh)
    choice = layout_choice.decide(cfg, dict)
    laid = layout_choice.built_first(choice, cfg.batch.global_batch_size, 10**9)
    cfg, mesh = laid.cfg, laid.mesh
    size, t = cfg.batch.global_batch_size, cfg.model.seq_len
    n_rows = global_batch.rows_per_microbatch(cfg, mesh)
    tokens = np.random.default_rng(0).integers(0, cfg.model.vocab_size, (size, t + 1), np.int32)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_mask": np.ones((size, t), np.float32),
        "positions": np.tile(np.arange(t, dtype=np.int32), (size, 1)),
        "samples": np.arange(size, dtype=np.int32),
    }
    cut = {k: v.reshape(-1, n_rows, *v.shape[1:]) for k, v in batch.items()}
    return laid, global_batch.device_put_rows(cut, mesh, n_rows)


def measure_ours(args):
    import jax

    laid, batch = prepare(args)
    program, n_tokens = laid.program, batch["tokens"].size
    state = program.init()

    def one():
        nonlocal state
        state, metrics = program.train(state, batch)
        jax.block_until_ready((state, metrics))

    begin = time.perf_counter()
    one()
    first = time.perf_counter() - begin
    result = timed(one, n_tokens)
    stats = jax.local_devices()[0].memory_stats()
    if stats:
        result |= {"peak_gib": stats["peak_bytes_in_use"] / 2**30, "memory": "per device"}
    seconds = first - n_tokens / result["tokens_per_second"]
    return result | {"compile_seconds": seconds, "device": jax.devices()[0].device_kind}


def measure_hf(options):
    import torch
    import transformers

    cfg = transformers.GPT2Config(
        vocab_size=options.vocab_size, n_positions=options.seq_len, n_embd=options.width,
        n_layer=options.layers, n_head=options.heads, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(cfg)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
    tokens = torch.randint(0, options.vocab_size, (options.batch, options.seq_len))

    def one():
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    one()
    result = timed(one, tokens.numel())
    return result | {"compile_seconds": 0.0, "device": "cpu, torch " + torch.__version__}


if __name__ == "__main__":
    main(sys.argv[1:])
