"""GPT-3 175B in the best layout that the plan finds for 1,024 H100: fsdp 512 x tensor 2.

Source: Megatron-LM's examples/gpt3 (train_gpt3_175b_distributed.sh, commit d98e8a64dd), as
`configs/175b.py`, in the layout of
`python -m gpt3jax.plan --config=configs/175b.py --gpus=1024`, fixed.
Meant for 1024 H100 80GB in nodes of 8 with 400 Gb/s a GPU; other numbers of GPUs have other
layouts: search again.
Should reach: docs/plan.md has the estimate of its speed; the losses are those of `configs/175b.py`
but for its schedule.
Differs from it, besides what `configs/175b.py` lists, in:
- bfloat16, which needs no loss scale.
- remat mlp, microbatches of 3 sequences.
- a constant batch: the first 16 sequences of the schedule would leave 496 data-parallel ranks idle.
"""

from gpt3jax import config
from gpt3jax.config import megatron_example


def get_config() -> config.Config:
    """Return the recipe."""
    return megatron_example.recipe(
        model=megatron_example.gpt3_175b(remat="mlp"),
        decay_samples=126_953_125,  # x 2048 = 260B tokens
        mesh=config.Mesh(fsdp=512, tensor=2),
        train=config.Train(n_tokens=300_000_000_000),
        precision=config.Precision(compute_dtype="bfloat16"),
        batch=config.Batch(global_batch_size=1536, microbatch_size=3),
    )
