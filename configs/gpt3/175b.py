"""GPT-3 175B, a row of Table 2.1 of the paper.

Source: Brown et al. 2020, "Language Models are Few-Shot Learners" (arXiv:2005.14165), Table 2.1
and appendix B; `gpt3jax/config/gpt3_table.py` has what all rows share.
Meant for 1024 H100 80GB, or any other number: the layout is found.
Memory: 174.6B x 16 bytes (fp32 weight, gradient, two moments) = 2794 GB, 2.7 GB a GPU over 1024.
Activations, 32 bytes a token, width and layer, are 96 x 12288 x 2048 x 32 / 8 = 9.7 GB if kept;
full recomputation keeps 0.6 GB.
Should reach 76.2% on LAMBADA zero-shot, as the paper's did on its data (Table H.1).
The table prints batches of 3.2M tokens: 1536 x 2048 = 3.1M, which divides by powers of two. The
paper refers to GPT-2's initialisation, of std 0.02; 0.006 is that of Megatron's example, for this
width.
To let the batch grow as in the paper, over 12B tokens: `--batch.ramp 128 128 5859375`.
"""

from gpt3jax import config
from gpt3jax.config import gpt3_table


def get_config() -> config.Config:
    """Return the recipe."""
    return gpt3_table.recipe(
        model=gpt3_table.model(
            n_layers=96,
            d_model=12_288,
            n_heads=96,  # heads of 128
            init_std=0.006,
        ),
        peak_lr=0.6e-4,
        min_lr=0.6e-5,  # 10%
        batch=config.Batch(global_batch_size=1536),  # 3.1M tokens
    )
