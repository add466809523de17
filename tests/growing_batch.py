"""Files of layouts, which force another layout on each batch size of a run."""

import json

from gpt3jax.config import layout, schema
from gpt3jax.plan import ranking


def write_layouts(folder, layouts, n_devices=8):
    """Write a file of one layout a batch size, and return the option that names it.

    Fields that are not named have the value that changes nothing.
    """
    plain = layout.plain_fields(schema.Config(
        model=schema.Model(n_layers=1, d_model=1, n_heads=1, seq_len=1),
        optimizer=schema.Optimizer(peak_lr=0.0),
        batch=schema.Batch(global_batch_size=1),
    )) | {"mesh.data": 1}  # fmt: skip
    rows = {size: [ranking.Ranked(fields=plain | fields)] for size, fields in layouts.items()}
    content = ranking.as_json(
        ranking.Ranking(origin="a test", n_devices=n_devices, device="cpu", given={}, by_size=rows)
    )
    (folder / "layouts.json").write_text(json.dumps(content))
    return "--layouts=layouts.json"
