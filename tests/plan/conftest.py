"""A small recipe, and a compiled step that no compiler made."""

import pytest

from gpt3jax.plan import compiler, hlo


@pytest.fixture
def recipe_file(tmp_path):
    """A GPT that compiles in seconds, and can use cuDNN's attention."""
    file = tmp_path / "small.py"
    file.write_text(
        "from gpt3jax.config import *\n"
        "def get_config():\n"
        "    return Config(\n"
        "        model=Model(n_layers=2, d_model=256, n_heads=4, seq_len=512, vocab_size=2000,\n"
        "                    attention_dropout=0.0),\n"
        "        optimizer=Optimizer(peak_lr=1e-4),\n"
        "        batch=Batch(global_batch_size=16),\n"
        "        mesh=Mesh(data=-1, fsdp=2, tensor=2),\n"
        "        train=Train(n_steps=10),\n"
        "    )\n"
    )
    return str(file)


@pytest.fixture
def fake_step():
    """Return a function that makes a step of this peak."""
    return _fake_step


def _fake_step(peak_bytes):
    text = "\nENTRY %main (p: f32[4]) -> f32[4] {\n  %a = f32[400000]{0} add(%p, %p)\n}\n"
    return compiler.Compiled(
        argument_bytes=0, temp_bytes=0, peak_bytes=peak_bytes, attention="cudnn",
        largest_buffers=[], cudnn={}, compile_seconds=1.0, host_bytes=0, versions={}, cached=False,
        text=text, program=hlo.parse(text),
    )  # fmt: skip
