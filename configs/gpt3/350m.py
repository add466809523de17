"""GPT-3 Medium (350M), a row of Table 2.1 of the paper.

Source: Brown et al. 2020, "Language Models are Few-Shot Learners" (arXiv:2005.14165), Table 2.1
and appendix B.
Meant for 8 H100 80GB; any number that divides 64 (256 sequences in microbatches of 4).
Memory: 0.356B x 16 bytes (fp32 weight, gradient, two moments) = 5.7 GB, and 32 bytes a token,
width and layer of activations: 24 x 1024 x 4 x 2048 x 32 = 6.4 GB. Nothing needs sharding.
Should reach 54.3% on LAMBADA zero-shot, as the paper's did on its data (Table H.1).
The paper names no dropout, so there is none, and no width of the banded layers: 256 is ours. Its
batch grows from 32k tokens; here it is constant, for 16 sequences do not divide over a wide mesh
and each size is one compilation. To let it grow on 8 GPUs, over 4B tokens:
`--batch.microbatch-size 2 --batch.ramp 16 48 1953125`.
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
            dropout=0.0,
            attention_dropout=0.0,
            remat="none",
            attention=config.Attention(pattern="alternating", band=256),
        ),
        optimizer=config.Optimizer(
            peak_lr=3.0e-4,
            min_lr=3.0e-5,  # 10%
            decay="cosine",
            decay_samples=126_953_125,  # x 2048 = 260B tokens
            warmup_samples=183_105,  # x 2048 = 375M tokens
            weight_decay=0.1,
            beta1=0.9,
            beta2=0.95,
            eps=1e-8,
            clip_norm=1.0,
        ),
        precision=config.Precision(compute_dtype="bfloat16"),
        batch=config.Batch(
            global_batch_size=256,  # x 2048 = 0.5M tokens
            microbatch_size=4,
        ),
        mesh=config.Mesh(data=-1),
        train=config.Train(n_tokens=300_000_000_000),
    )
