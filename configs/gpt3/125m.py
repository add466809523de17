"""GPT-3 Small (125M), a row of Table 2.1 of the paper.

Source: Brown et al. 2020, "Language Models are Few-Shot Learners" (arXiv:2005.14165), Table 2.1
and appendix B; `gpt3jax/config/gpt3_table.py` has what all rows share.
Meant for 8 H100 80GB, or any other number: the layout is found.
Memory: 0.125B x 16 bytes (fp32 weight, gradient, two moments) = 2.0 GB, and 20 bytes a token,
width and layer of activations: 12 x 768 x 4 x 2048 x 20 = 1.5 GB. Nothing needs sharding.
Should reach 42.7% on LAMBADA zero-shot, as the paper's did on its data (Table H.1).
To let the batch grow as in the paper, over 4B tokens: `--batch.ramp 16 48 1953125`.
"""

from gpt3jax import config
from gpt3jax.config import gpt3_table


def get_config() -> config.Config:
    """Return the recipe."""
    return gpt3_table.recipe(
        model=gpt3_table.model(n_layers=12, d_model=768, n_heads=12),  # heads of 64
        peak_lr=6.0e-4,
        min_lr=6.0e-5,  # 10%
        batch=config.Batch(global_batch_size=256),  # 256 x 2048 = 0.5M tokens
    )
