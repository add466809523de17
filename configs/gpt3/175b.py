"""GPT-3 175B, a row of Table 2.1 of the paper.

Source: Brown et al. 2020, "Language Models are Few-Shot Learners" (arXiv:2005.14165), Table 2.1
and appendix B.
Meant for 1024 H100 80GB in nodes of 8, or 2, 3, 4, 6 or 12 times as many (1536 sequences, one at
a time).
Memory: 174.6B x 16 bytes (fp32 weight, gradient, two moments) = 2794 GB, 2.7 GB a GPU over 1024.
Activations, 32 bytes a token, width and layer, are 96 x 12288 x 2048 x 32 / 8 = 9.7 GB if kept;
full recomputation keeps 0.6 GB and is the safe choice: try `--model.remat mlp` for speed.
Should reach 76.2% on LAMBADA zero-shot, as the paper's did on its data (Table H.1).
The table prints batches of 3.2M tokens: 1536 x 2048 = 3.1M, which divides by powers of two. The
paper points to GPT-2's initialisation, of std 0.02; 0.006 is that of Megatron's example, for this
width. The paper names no dropout, so there is none, and no width of the banded layers: 256 is
ours. Its batch grows from 32k tokens; here it is constant, for 16 sequences do not divide over a
wide mesh and each size is one compilation. To let it grow on 1024 GPUs, over 12B tokens:
`--batch.ramp 128 128 5859375`.
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
            dropout=0.0,
            attention_dropout=0.0,
            init_std=0.006,
            remat="full",
            attention=config.Attention(pattern="alternating", band=256),
        ),
        optimizer=config.Optimizer(
            peak_lr=0.6e-4,
            min_lr=0.6e-5,  # 10%
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
            global_batch_size=1536,  # x 2048 = 3.1M tokens, the table's 3.2M
            microbatch_size=1,
        ),
        mesh=config.Mesh(data=-1, fsdp=128, tensor=8),
        train=config.Train(n_tokens=300_000_000_000),
    )
