"""GPT-3 6.7B, a row of Table 2.1 of the paper.

Source: Brown et al. 2020, "Language Models are Few-Shot Learners" (arXiv:2005.14165), Table 2.1
and appendix B; `gpt3jax/config/gpt3_table.py` has what all rows share.
Meant for 32 H100 80GB, or any other number: the layout is found.
Memory: 6.66B x 16 bytes (fp32 weight, gradient, two moments) = 107 GB, 13.3 GB a GPU over the 8
of a node, and 20 bytes a token, width and layer of activations: 32 x 4096 x 2 x 2048 x 20 = 10.7
GB.
Should reach 70.3% on LAMBADA zero-shot, as the paper's did on its data (Table H.1).
To let the batch grow as in the paper, over 8B tokens: `--batch.ramp 64 192 3906250`.
"""

from gpt3jax import config
from gpt3jax.config import gpt3_table


def get_config() -> config.Config:
    """Return the recipe."""
    return gpt3_table.recipe(
        model=gpt3_table.model(n_layers=32, d_model=4096, n_heads=32),  # heads of 128
        peak_lr=1.2e-4,
        min_lr=1.2e-5,  # 10%
        batch=config.Batch(global_batch_size=1024),  # 1024 x 2048 = 2M tokens
    )
