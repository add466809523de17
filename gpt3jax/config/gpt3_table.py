"""What the recipes of GPT-3's Table 2.1 (`configs/gpt3/`) share: Brown et al. 2020, appendix B.

The paper states no dropout, so there is none, and no width of the banded layers: 256 is ours. Its
batch grows from 32k tokens; here it is constant, and each recipe says how to let it grow.
"""

from gpt3jax.config import schema


def recipe(
    *,
    model: schema.Model,
    peak_lr: float,
    min_lr: float,
    batch: schema.Batch,
) -> schema.Config:
    """Return the config of a row of the table; `min_lr` is 10% of `peak_lr`."""
    return schema.Config(
        model=model,
        optimizer=schema.Optimizer(
            peak_lr=peak_lr,
            min_lr=min_lr,
            decay="cosine",
            decay_samples=126_953_125,  # x 2048 = 260B tokens
            warmup_samples=183_105,  # x 2048 = 375M tokens
            weight_decay=0.1,
            beta1=0.9,
            beta2=0.95,
            eps=1e-8,
            clip_norm=1.0,
        ),
        precision=schema.Precision(compute_dtype="bfloat16"),
        batch=batch,
        train=schema.Train(n_tokens=300_000_000_000),
    )


def model(
    *,
    n_layers: int,
    d_model: int,
    n_heads: int,
    init_std: float = 0.02,
) -> schema.Model:
    """Return the model of a row: dense and locally banded layers alternate."""
    return schema.Model(
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        seq_len=2048,
        dropout=0.0,
        attention_dropout=0.0,
        init_std=init_std,
        attention=schema.Attention(pattern="alternating", band=256),
    )
