"""Megatron's GPT-3 175B example: 96 layers, d_model 12288, 96 heads, 174.6B parameters.

Source: Megatron-LM's examples/gpt3, the script itself (train_gpt3_175b_distributed.sh, commit
d98e8a64dd).
Meant for 1024 H100 80GB in nodes of 8, or any other number from 64 on: the layout is found, for
each size of the growing batch. 174.6B x 16 bytes (fp32 weight, gradient, two moments) are 2794 GB
of state, 2.7 GB a GPU.
Should reach: Megatron gives no loss; the paper's had 76.2% on LAMBADA zero-shot (Brown et al.
2020, Table H.1). 300B tokens are 3.2e23 FLOPs: 72 days at 400 TFLOP/s a GPU.
It is float16 because the example says --fp16: on A100 or H100 add
`--precision.compute-dtype bfloat16`.
Differs from it, besides what docs/from_megatron.md lists for every recipe, in:
- the layout, which changes no loss: the example's TP 8 x PP 16 is `configs/175b_tp8_pp16.py`.
- 300B tokens, with decay over 260B, as in the paper: the example's 500,000 iterations are 1.33T.
"""

from gpt3jax import config
from gpt3jax.config import megatron_example


def get_config() -> config.Config:
    """Return the recipe."""
    return megatron_example.recipe(
        model=megatron_example.gpt3_175b(),
        decay_samples=126_953_125,  # x 2048 = 260B tokens
        train=config.Train(n_tokens=300_000_000_000),
    )
