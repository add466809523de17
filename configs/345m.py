"""Megatron's smallest GPT-3 example, which its README calls 345M: 64.1M parameters.

Source: Megatron-LM's examples/gpt3, README's "345M" with the script's values
(train_gpt3_175b_distributed.sh, commit d98e8a64dd).
Meant for 8 GPUs, or any other number: the layout is found. 64.1M x 16 bytes (fp32 weight, gradient,
two moments) are 1.0 GB of state, so any GPU will do.
Should reach: Megatron gives no loss. 500,000 steps are 531M sequences, 544B tokens; the learning
rate is then still 1.1e-5, for its decay is counted in full batches.
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
            n_layers=12,
            d_model=512,
            n_heads=8,  # x 64
            seq_len=1024,
        ),
        decay_samples=430_000 * 1536,  # the example's iterations, at its full batch
        train=config.Train(n_steps=500_000),
    )
