"""GPT-3 175B in Megatron's layout: TP 8 x PP 16, 174.6B parameters.

Source: Megatron-LM's examples/gpt3 (train_gpt3_175b_distributed.sh, commit d98e8a64dd), as
`configs/175b.py`, with the example's own parallelism.
Meant for 256 or 1024 H100 80GB in nodes of 8: tensor parallelism inside a node, one stage of 6
layers a node. `data` grows with the GPUs, to 16 at most: then the first batch of the schedule, of
16 sequences, has one for each replica. On 128, with one replica, a full batch does not fit.
Should reach: what `configs/175b.py` reaches; the losses are the same.
Differs from `configs/175b.py` only in the mesh.
"""

import dataclasses

from gpt3jax import config
from gpt3jax.config import megatron_example


def get_config() -> config.Config:
    """Return the recipe."""
    return megatron_example.recipe(
        model=megatron_example.gpt3_175b(remat="full"),
        decay_samples=126_953_125,  # x 2048 = 260B tokens
        mesh=config.Mesh(
            data=-1, stage=16, virtual_stages=1, fsdp=1, tensor=8, shard_optimizer=False
        ),
        batch=dataclasses.replace(megatron_example.GROWING_BATCH, microbatch_size=1),
        train=config.Train(n_tokens=300_000_000_000),
    )
