"""GPT-3 2.7B, a row of Table 2.1 of the paper.

Source: Brown et al. 2020, "Language Models are Few-Shot Learners" (arXiv:2005.14165), Table 2.1
and appendix B; `gpt3jax/config/gpt3_table.py` has what all rows share.
Meant for 16 H100 80GB, or any other number: the layout is found.
Memory: 2.65B x 16 bytes (fp32 weight, gradient, two moments) = 42 GB, 5.3 GB a GPU over the 8 of
a node, and 20 bytes a token, width and layer of activations: 32 x 2560 x 2 x 2048 x 20 = 6.7 GB.
Should reach 67.1% on LAMBADA zero-shot, as the paper's did on its data (Table H.1).
To let the batch grow as in the paper, over 6B tokens: `--batch.ramp 32 96 2929688`.
"""

from gpt3jax import config
from gpt3jax.config import gpt3_table


def get_config() -> config.Config:
    """Return the recipe."""
    return gpt3_table.recipe(
        model=gpt3_table.model(n_layers=32, d_model=2560, n_heads=32),  # heads of 80
        peak_lr=1.6e-4,
        min_lr=1.6e-5,  # 10%
        batch=config.Batch(global_batch_size=512),  # 512 x 2048 = 1M tokens
    )
