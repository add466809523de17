"""GPT-3 13B, a row of Table 2.1 of the paper.

Source: Brown et al. 2020, "Language Models are Few-Shot Learners" (arXiv:2005.14165), Table 2.1
and appendix B; `gpt3jax/config/gpt3_table.py` has what all rows share.
Meant for 64 H100 80GB, or any other number: the layout is found.
Memory: 12.85B x 16 bytes (fp32 weight, gradient, two moments) = 206 GB, 12.9 GB a GPU over 2
nodes of 8, and 20 bytes a token, width and layer of activations: 40 x 5120 x 2048 x 20 = 8.4 GB.
Should reach 72.5% on LAMBADA zero-shot, as the paper's did on its data (Table H.1).
The table prints a d_model of 5140, but its 40 heads of 128 make 5120, so that is the width here.
To let the batch grow as in the paper, over 8B tokens: `--batch.ramp 64 192 3906250`.
"""

from gpt3jax import config
from gpt3jax.config import gpt3_table


def get_config() -> config.Config:
    """Return the recipe."""
    return gpt3_table.recipe(
        model=gpt3_table.model(n_layers=40, d_model=5120, n_heads=40),  # heads of 128
        peak_lr=1.0e-4,
        min_lr=1.0e-5,  # 10%
        batch=config.Batch(global_batch_size=1024),  # 1024 x 2048 = 2M tokens
    )
