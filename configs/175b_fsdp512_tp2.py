"""GPT-3 175B in the layout that the plan's search finds for 1,024 H100: fsdp 512 x tensor 2.

Source: Megatron-LM's examples/gpt3 (train_gpt3_175b_distributed.sh, commit d98e8a64dd), as
`configs/175b.py`, in the layout of
`python -m gpt3jax.plan --config=configs/175b.py --gpus=1024 --search`.
Meant for 1024 H100 80GB in nodes of 8 with 400 Gb/s a GPU; other numbers of GPUs have other
layouts: search again.
Should reach: docs/plan.md has the estimate; the losses are those of `configs/175b.py` up to its
schedule.
Departs, besides what `configs/175b.py` lists, in:
- bfloat16, as the paper's successors; float16 needs a loss scale.
- remat mlp, microbatches of 3 sequences.
- no growing batch: its 16 sequences would leave 496 data-parallel ranks without one.
"""

from gpt3jax import config


def get_config() -> config.Config:
    """Return the recipe."""
    return config.Config(
        model=config.Model(
            n_layers=96,
            d_model=12_288,
            n_heads=96,  # x 128
            seq_len=2048,
            dropout=0.1,
            attention_dropout=0.0,
            init_std=0.006,
            remat="mlp",
        ),
        optimizer=config.Optimizer(
            peak_lr=6.0e-5,
            min_lr=6.0e-6,
            decay="cosine",
            decay_samples=126_953_125,  # x 2048 = 260B tokens
            warmup_fraction=0.001,
            weight_decay=0.1,
            beta1=0.9,
            beta2=0.95,
            clip_norm=1.0,
        ),
        precision=config.Precision(compute_dtype="bfloat16"),
        batch=config.Batch(global_batch_size=1536, microbatch_size=3),
        data=config.Data(split="949,50,1"),
        mesh=config.Mesh(fsdp=512, tensor=2),
        train=config.Train(n_tokens=300_000_000_000, eval_interval=1000, eval_batches=10),
        checkpoint=config.Checkpoint(save_interval=10_000),
        log=config.Log(interval=100),
    )
