"""A small recipe, and a compiled step that no compiler made."""

import pytest

from gpt3jax.plan import compiler, hlo

RECIPE = """
from gpt3jax.config import *

def get_config():
    return Config(
        model=Model(n_layers=2, d_model=256, n_heads=4, seq_len=512, vocab_size=2000,
                    attention_dropout=0.0{model}),
        optimizer=Optimizer(peak_lr=1e-4),
        batch=Batch(global_batch_size=16{batch}),
        mesh=Mesh({mesh}),
        train=Train(n_steps=10),
    )
"""
GIVEN = {
    "model": ", remat='full', n_loss_chunks=1",
    "batch": ", microbatch_size=1",
    "mesh": "copies=1, data=-1, stage=1, fsdp=2, context=1, tensor=2, virtual_stages=1, "
    "shard_optimizer=False, sequence_parallel=True",
}
AUTO = {"model": "", "batch": "", "mesh": ""}
GROWING = {**AUTO, "batch": ", schedule='0:4 16384:8 49152:16'"}


@pytest.fixture
def recipe_file(tmp_path):
    """A GPT that compiles in seconds, and can use cuDNN's attention, in a layout that is given."""
    return write(tmp_path / "small.py", GIVEN)


@pytest.fixture
def auto_file(tmp_path):
    """The same GPT, whose layout is to be found."""
    return write(tmp_path / "auto.py", AUTO)


@pytest.fixture
def growing_file(tmp_path):
    """The same, with batches of 4, 8 and 16: 8, 8 and then 2 of 10 or more steps."""
    return write(tmp_path / "growing.py", GROWING)


def write(file, parts):
    file.write_text(RECIPE.format(**parts))
    return str(file)


@pytest.fixture
def fake_step():
    """Return a function that makes a step of this peak."""
    return _fake_step


def _fake_step(peak_bytes):
    text = "\nENTRY %main (p: f32[4]) -> f32[4] {\n  %a = f32[400000]{0} add(%p, %p)\n}\n"
    return compiler.Compiled(
        argument_bytes=0, temp_bytes=0, peak_bytes=peak_bytes, attention="cudnn",
        largest_buffers=[], fused_attention={}, compile_seconds=1.0, host_bytes=0, versions={},
        cached=False,
        text=text, program=hlo.parse(text),
    )  # fmt: skip
