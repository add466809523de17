"""The command line of run.json in our words; takes over weights that `--checkpoint.load` names."""

import pathlib

from gpt3jax import config

CORPUS = pathlib.Path(__file__).resolve().parent / "shakespeare"  # resolve: a link may lead here


def get_config() -> config.Config:
    """Return the recipe."""
    return config.Config(
        model=config.Model(
            n_layers=4, d_model=32, n_heads=4, seq_len=32, vocab_size=66, mask_padded_vocab=False,
            dropout=0.0, attention_dropout=0.0, init_std=0.1,
        ),
        optimizer=config.Optimizer(
            peak_lr=0.006, min_lr=0.0006, decay_samples=40 * 8, warmup_fraction=0.1,
            weight_decay=0.1, beta1=0.9, beta2=0.95, clip_norm=1.0,
        ),
        precision=config.Precision(compute_dtype="float32"),
        batch=config.Batch(global_batch_size=8, microbatch_size=2),
        data=config.Data(paths=(str(CORPUS),), split="949,50,1", eod_id=65),
        train=config.Train(n_steps=30, eval_interval=10, eval_batches=2, seed=1234),
        checkpoint=config.Checkpoint(load="weights", only_params=True),
        log=config.Log(dir="logs", interval=1),
    )  # fmt: skip
