"""GPT-3 XL (1.3B), a row of Table 2.1 of the paper.

Source: Brown et al. 2020, "Language Models are Few-Shot Learners" (arXiv:2005.14165), Table 2.1
and appendix B; `gpt3jax/config/gpt3_table.py` has what all rows share.
Meant for 8 H100 80GB, or any other number: the layout is found.
Memory: 1.32B x 16 bytes (fp32 weight, gradient, two moments) = 21 GB, and 20 bytes a token, width
and layer of activations: 24 x 2048 x 4 x 2048 x 20 = 8.1 GB. Nothing needs sharding.
Should reach 63.6% on LAMBADA zero-shot, as the paper's did on its data (Table H.1).
The table prints 24 heads of 128, but 24 x 128 = 3072 is not its d_model of 2048; 16 of them have
the stated 1.3B parameters, 24 would have 1.5B, so there are 16.
To let the batch grow as in the paper, over 6B tokens: `--batch.ramp 32 96 2929688`.
"""

from gpt3jax import config
from gpt3jax.config import gpt3_table


def get_config() -> config.Config:
    """Return the recipe."""
    return gpt3_table.recipe(
        model=gpt3_table.model(n_layers=24, d_model=2048, n_heads=16),  # heads of 128
        peak_lr=2.0e-4,
        min_lr=2.0e-5,  # 10%
        batch=config.Batch(global_batch_size=512),  # 512 x 2048 = 1M tokens
    )
