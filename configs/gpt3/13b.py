"""GPT-3 13B, a row of Table 2.1 of the paper.

Source: Brown et al. 2020, "Language Models are Few-Shot Learners" (arXiv:2005.14165), Table 2.1
and appendix B.
Meant for 64 H100 80GB; multiples of 16 that divide 1024 (1024 sequences, one at a time).
Memory: 12.85B x 16 bytes (fp32 weight, gradient, two moments) = 206 GB, 12.9 GB a GPU over 2
nodes of 8, and 32 bytes a token, width and layer of activations: 40 x 5120 x 2048 x 32 = 13.4 GB.
Should reach 72.5% on LAMBADA zero-shot, as the paper's did on its data (Table H.1).
The table prints a d_model of 5140, but its 40 heads of 128 make 5120, so that is the width here.
The paper names no dropout, so there is none, and no width of the banded layers: 256 is ours. Its
batch grows from 32k tokens; here it is constant, for 16 sequences do not divide over a wide mesh
and each size is one compilation. To let it grow on 64 GPUs, over 8B tokens:
`--batch.ramp 64 192 3906250`.
"""

from gpt3jax import config


def get_config() -> config.Config:
    """Return the recipe."""
    return config.Config(
        model=config.Model(
            n_layers=40,
            d_model=5120,
            n_heads=40,  # x 128
            seq_len=2048,
            dropout=0.0,
            attention_dropout=0.0,
            remat="none",
            attention=config.Attention(pattern="alternating", band=256),
        ),
        optimizer=config.Optimizer(
            peak_lr=1.0e-4,
            min_lr=1.0e-5,  # 10%
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
            global_batch_size=1024,  # x 2048 = 2M tokens
            microbatch_size=1,
        ),
        mesh=config.Mesh(data=-1, fsdp=16),
        train=config.Train(n_tokens=300_000_000_000),
    )
