"""GPT-3 2.7B, a row of Table 2.1 of the paper.

Source: Brown et al. 2020, "Language Models are Few-Shot Learners" (arXiv:2005.14165), Table 2.1
and appendix B.
Meant for 16 H100 80GB; multiples of 8 that divide 256 (512 sequences in microbatches of 2).
Memory: 2.65B x 16 bytes (fp32 weight, gradient, two moments) = 42 GB, 5.3 GB a GPU over the 8 of
a node, and 32 bytes a token, width and layer of activations: 32 x 2560 x 2 x 2048 x 32 = 10.7 GB.
Should reach 67.1% on LAMBADA zero-shot, as the paper's did on its data (Table H.1).
The paper names no dropout, so there is none, and no width of the banded layers: 256 is ours. Its
batch grows from 32k tokens; here it is constant, for 16 sequences do not divide over a wide mesh
and each size is one compilation. To let it grow on 16 GPUs, over 6B tokens:
`--batch.ramp 32 96 2929688`.
"""

from gpt3jax import config


def get_config() -> config.Config:
    """Return the recipe."""
    return config.Config(
        model=config.Model(
            n_layers=32,
            d_model=2560,
            n_heads=32,  # x 80
            seq_len=2048,
            dropout=0.0,
            attention_dropout=0.0,
            remat="none",
            attention=config.Attention(pattern="alternating", band=256),
        ),
        optimizer=config.Optimizer(
            peak_lr=1.6e-4,
            min_lr=1.6e-5,  # 10%
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
            global_batch_size=512,  # x 2048 = 1M tokens
            microbatch_size=2,
        ),
        mesh=config.Mesh(data=-1, fsdp=8),
        train=config.Train(n_tokens=300_000_000_000),
    )
