"""A small GPT on the source of Python's own library: from nothing to a trained model on a CPU.

Source: ours; small enough to watch. Meant for 2 CPU cores and a few minutes, no GPU, no download.
The first start makes the corpus and a byte-level BPE of 4096 tokens under runs/quickstart/data.
Stop it and run it again, and it resumes.
Should reach: a training loss of 4.4 nats a token after 400 steps, about 3 minutes; on held-out text
4.8. The loss starts near ln 4096 = 8.3, a guess among 4096 tokens. On held-out text a guess by the
frequency of tokens alone has 6.6, by the token before 4.8 (`gpt3jax.summary` measures them).
The mesh is 2 x 2 emulated devices, to show sharding at work. On one device the losses are the same
and the run is faster: `--mesh.cpu-devices 1 --mesh.data 1 --mesh.tensor 1`.
"""

from gpt3jax import config


def get_config() -> config.Config:
    """Return the recipe."""
    return config.Config(
        model=config.Model(
            n_layers=4,
            d_model=128,
            n_heads=4,  # x 32
            seq_len=128,
            vocab_size=4096,
            dropout=0.0,
            attention_dropout=0.0,
            remat="none",  # everything fits
        ),
        optimizer=config.Optimizer(
            peak_lr=2e-3,
            min_lr=2e-4,
            decay="cosine",  # over the run
            warmup_samples=20 * 16,
            weight_decay=0.1,
            beta1=0.9,
            beta2=0.95,
        ),
        precision=config.Precision(compute_dtype="float32"),
        batch=config.Batch(global_batch_size=16, microbatch_size=8),  # 16 x 128 = 2,048 tokens
        data=config.Data(
            from_text="python",
            paths=("runs/quickstart/data/python_text_document",),
            vocab_file="runs/quickstart/data/vocab.json",
            merge_file="runs/quickstart/data/merges.txt",
            eod_id=0,  # <|endoftext|> in a BPE that we train
        ),
        mesh=config.Mesh(cpu_devices=4, data=2, tensor=2),
        train=config.Train(n_steps=400, eval_interval=100, eval_batches=32),
        checkpoint=config.Checkpoint(dir="runs/quickstart/checkpoints", save_interval=100),
        log=config.Log(dir="runs/quickstart/logs", interval=10),
    )
