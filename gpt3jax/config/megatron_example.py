"""What the recipes of Megatron-LM's examples/gpt3 share: `configs/345m.py`, `configs/175b.py`, ...

The values are those of its script, train_gpt3_175b_distributed.sh of commit d98e8a64dd. The script
gives --global-batch-size beside its schedule, which Megatron refuses at this commit; here it caps
the schedule.
"""

from gpt3jax.config import schema

FOUND = schema.Mesh()  # for the devices that are there
FLOAT16 = schema.Precision(compute_dtype="float16")  # --fp16
GROWING_BATCH = schema.Batch(
    global_batch_size=1536,
    schedule="0:16 2.4B:320 4.8B:624 7.2B:928 9.6B:1232 12B:1536",
)


def recipe(
    *,
    model: schema.Model,
    decay_samples: int,
    train: schema.Train,
    mesh: schema.Mesh = FOUND,
    precision: schema.Precision = FLOAT16,
    batch: schema.Batch = GROWING_BATCH,
) -> schema.Config:
    """Return the config of an example."""
    return schema.Config(
        model=model,
        optimizer=schema.Optimizer(
            peak_lr=6.0e-5,
            min_lr=6.0e-6,
            decay="cosine",
            decay_samples=decay_samples,
            warmup_fraction=0.001,
            weight_decay=0.1,
            beta1=0.9,
            beta2=0.95,
            clip_norm=1.0,
        ),
        precision=precision,
        batch=batch,
        data=schema.Data(split="949,50,1"),
        mesh=mesh,
        train=train,
        checkpoint=schema.Checkpoint(save_interval=10_000),
        log=schema.Log(interval=100),
    )


def model(
    *,
    n_layers: int,
    d_model: int,
    n_heads: int,
    seq_len: int,
    remat: schema.Remat = schema.AUTO,
) -> schema.Model:
    """Return the model of an example."""
    return schema.Model(
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        seq_len=seq_len,
        dropout=0.1,
        attention_dropout=0.1,
        init_std=0.006,
        remat=remat,
    )


def gpt3_175b(remat: schema.Remat = schema.AUTO) -> schema.Model:
    """Return the model of the script itself."""
    return model(
        n_layers=96,
        d_model=12_288,
        n_heads=96,  # x 128
        seq_len=2048,
        remat=remat,
    )
