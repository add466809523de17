"""Megatron's second GPT-3 example, which its README calls 857M: 355.9M parameters.

Source: Megatron-LM's examples/gpt3, README's "857M" with the script's values
(train_gpt3_175b_distributed.sh, commit d98e8a64dd).
Meant for 1, 2, 4, 8 or 16 GPUs of 40 GB or more: their number must divide the schedule's first
batch of 16. 355.9M x 16 bytes (fp32 weight, gradient, two moments) are 5.7 GB of state.
Should reach: Megatron gives no loss. The shape is GPT-3 Medium's, which had 54.3% on LAMBADA
zero-shot after 300B tokens of other data (Brown et al. 2020, Table H.1); 500,000 steps are 1.33T
tokens.
It is float16 because the example says --fp16: on A100 or H100 add
`--precision.compute-dtype bfloat16`.
The example gives --global-batch-size beside its schedule, which Megatron at this commit refuses;
here the first caps the second.
Departs only in what docs/from_megatron.md lists for every recipe, such as the masked padding of
the vocabulary.
"""

from gpt3jax import config


def get_config() -> config.Config:
    """Return the recipe."""
    return config.Config(
        model=config.Model(
            n_layers=24,
            d_model=1024,
            n_heads=16,  # x 64
            seq_len=2048,
            dropout=0.1,
            attention_dropout=0.1,
            init_std=0.006,
            remat="none",  # 34 bytes x 24 x 2048 x 1024 = 1.7 GB a sequence
        ),
        optimizer=config.Optimizer(
            peak_lr=6.0e-5,
            min_lr=6.0e-6,
            decay="cosine",
            decay_samples=430_000 * 1536,  # the example's iterations, at its full batch
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
        mesh=config.Mesh(data=-1),
        train=config.Train(n_steps=500_000, eval_interval=1000, eval_batches=10),
        checkpoint=config.Checkpoint(save_interval=10_000),
        log=config.Log(interval=100),
    )
