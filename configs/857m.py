"""Megatron's second GPT-3 example, which its README calls 857M: 355.9M parameters.

Source: Megatron-LM's examples/gpt3, README's "857M" with the script's values
(train_gpt3_175b_distributed.sh, commit d98e8a64dd).
Meant for 8 GPUs, or any other number: the layout is found. 355.9M x 16 bytes (fp32 weight,
gradient, two moments) are 5.7 GB of state.
Should reach: Megatron gives no loss. The shape is GPT-3 Medium's, which had 54.3% on LAMBADA
zero-shot after 300B tokens of other data (Brown et al. 2020, Table H.1); 500,000 steps are 1.33T
tokens.
It is float16 because the example says --fp16: on A100 or H100 add
`--precision.compute-dtype bfloat16`.
Differs from it only as docs/from_megatron.md lists for every recipe, such as the masked padding
of the vocabulary.
"""

from gpt3jax import config
from gpt3jax.config import megatron_example


def get_config() -> config.Config:
    """Return the recipe."""
    return megatron_example.recipe(
        model=megatron_example.model(
            n_layers=24,
            d_model=1024,
            n_heads=16,  # x 64
            seq_len=2048,
        ),
        decay_samples=430_000 * 1536,  # the example's iterations, at its full batch
        train=config.Train(n_steps=500_000),
    )
