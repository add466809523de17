"""The run of 8 steps in float16 whose checkpoint of step 6 is in this folder."""

from gpt3jax import config


def get_config() -> config.Config:
    return config.Config(
        model=config.Model(
            n_layers=2, d_model=8, n_heads=2, seq_len=16, vocab_size=64, vocab_multiple=32
        ),
        optimizer=config.Optimizer(peak_lr=1e-2, warmup_samples=16, decay_samples=320),
        precision=config.Precision(
            compute_dtype="float16", initial_loss_scale=2.0**18, loss_scale_window=4
        ),
        batch=config.Batch(global_batch_size=8),
        data=config.Data(paths=("0.7", "first", "0.3", "second"), split="90,5,5", eod_id=0),
        mesh=config.Mesh(data=2, fsdp=2, tensor=2),
        train=config.Train(n_steps=8, eval_interval=0),
        checkpoint=config.Checkpoint(dir="checkpoints", save_interval=6),
        log=config.Log(dir="logs", interval=1),
    )
