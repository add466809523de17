"""GPT-3 175B in Megatron's layout: TP 8 x PP 16, 174.6B parameters.

Source: Megatron-LM's examples/gpt3 (train_gpt3_175b_distributed.sh, commit d98e8a64dd), as
`configs/175b.py`, with the example's own parallelism.
Meant for 128 H100 80GB in nodes of 8: tensor parallelism inside a node, one stage of 6 layers a
node. With more GPUs `data` grows; every batch of the schedule must then hold 16 microbatches a
replica: give a larger first stage, as --batch.schedule "0:128 ..." for data 8.
Should reach: what `configs/175b.py` reaches; the losses are the same.
Departs, besides what `configs/175b.py` lists, in nothing but the mesh.
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
            remat="full",
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
        precision=config.Precision(compute_dtype="float16"),
        batch=config.Batch(
            global_batch_size=1536,
            microbatch_size=1,
            schedule="0:16 2.4B:320 4.8B:624 7.2B:928 9.6B:1232 12B:1536",
        ),
        data=config.Data(split="949,50,1"),
        mesh=config.Mesh(data=-1, stage=16, tensor=8),
        train=config.Train(n_tokens=300_000_000_000, eval_interval=1000, eval_batches=10),
        checkpoint=config.Checkpoint(save_interval=10_000),
        log=config.Log(interval=100),
    )
