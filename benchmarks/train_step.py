"""Measure the training step of a config on this machine: tokens/s, compile time, peak memory.

    python benchmarks/train_step.py --config=configs/345m.py [--group.field VALUE ...]
    python benchmarks/train_step.py --cpu-peers

`--cpu-peers` runs one and the same workload (12 x 512 x 8, sequence 1024, vocabulary 50304, batch
4, fp32, no dropout; forward, backward, clip, AdamW) with gpt3jax and with Hugging Face's GPT-2 in
PyTorch, in turns and each in a process of its own, and prints both and their ratio. It needs
`pip install torch transformers` (the extra `benchmark`). CPU seconds are the figure to compare
where the machine is shared.
"""

import argparse
import json
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

N_STEPS = 4
PEERS = ("gpt3jax", "hf")
WORKLOAD = """
from gpt3jax.config import *

def get_config():
    return Config(
        model=Model(n_layers=12, d_model=512, n_heads=8, seq_len=1024, dropout=0.0,
                    attention_dropout=0.0, remat="dots", n_loss_chunks=8),
        optimizer=Optimizer(peak_lr=1e-4, init_lr=1e-4, decay="constant"),
        precision=Precision(compute_dtype="float32"),
        batch=Batch(global_batch_size=4, microbatch_size=4),
        data=Data(paths=("random tokens",)),
        train=Train(n_steps=1000),
    )
"""


def main():
    if "--worker" in sys.argv:
        args = sys.argv[sys.argv.index("--worker") + 1 :]
        print(json.dumps({"gpt3jax": measure_ours, "hf": measure_hf}[args[0]](args[1:])))
    elif "--cpu-peers" in sys.argv:
        compare()
    else:
        show("gpt3jax", measure_ours(sys.argv[1:]))


def compare():
    """Run the peers in turns, so that a busy spell of the machine hits both."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cpu-peers", action="store_true")
    parser.add_argument("--rounds", type=int, default=2)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        recipe = pathlib.Path(folder, "workload.py")
        recipe.write_text(WORKLOAD)
        results = {peer: [] for peer in PEERS}
        for _ in range(rounds):
            for peer in PEERS:
                args = [f"--config={recipe}"] if peer == "gpt3jax" else []
                command = [sys.executable, __file__, "--worker", peer, *args]
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                results[peer].append(json.loads(output.stdout.splitlines()[-1]))
                show(peer, results[peer][-1])
    best = {peer: max(r["tokens_per_second"] for r in results[peer]) for peer in PEERS}
    cpu = {peer: min(r["cpu_seconds_per_step"] for r in results[peer]) for peer in PEERS}
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
    """Return the figures of `N_STEPS` calls of a step that waits for its end."""
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


def measure_ours(args):
    import jax

    from gpt3jax import distributed, recipe, sharding, step

    cfg = recipe.parse(args)
    distributed.start(cfg.distributed, cfg.mesh)
    mesh = sharding.make_mesh(cfg.mesh)
    program = step.build(cfg, mesh, 10**9)
    size, t = cfg.batch.global_batch_size, cfg.model.seq_len
    n_rows = cfg.batch.microbatch_size * sharding.data_parallel_size(mesh)
    tokens = np.random.default_rng(0).integers(0, cfg.model.vocab_size, (size, t + 1), np.int32)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_mask": np.ones((size, t), np.float32),
        "positions": np.tile(np.arange(t, dtype=np.int32), (size, 1)),
        "samples": np.arange(size, dtype=np.int32),
    }
    cut = {k: v.reshape(-1, n_rows, *v.shape[1:]) for k, v in batch.items()}
    batch = sharding.device_put_rows(cut, mesh, n_rows)
    state = program.init()

    def one():
        nonlocal state
        state, metrics = program.train(state, batch)
        jax.block_until_ready((state, metrics))

    begin = time.perf_counter()
    one()
    first = time.perf_counter() - begin
    result = timed(one, size * t)
    stats = jax.local_devices()[0].memory_stats()
    if stats:
        result |= {"peak_gib": stats["peak_bytes_in_use"] / 2**30, "memory": "per device"}
    seconds = first - size * t / result["tokens_per_second"]
    return result | {"compile_seconds": seconds, "device": jax.devices()[0].device_kind}


def measure_hf(args):
    import torch
    import transformers

    cfg = transformers.GPT2Config(
        vocab_size=50304, n_positions=1024, n_embd=512, n_layer=12, n_head=8, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(cfg)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
    tokens = torch.randint(0, 50_257, (4, 1024))

    def one():
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    one()
    return timed(one, 4096) | {"compile_seconds": 0.0, "device": "cpu, torch " + torch.__version__}


if __name__ == "__main__":
    main()
