"""The program of a step: XLA's options go with it."""

import jax
import pytest

from gpt3jax import step
from gpt3jax.hardware import devices, xla_flags

import tiny


def build(monkeypatch, **axes):
    """Build the program of a mesh whose devices say that they are H100s."""
    monkeypatch.setattr(devices, "compute_capability", lambda device: (9, 0))
    cfg = tiny.make_config(model={"n_layers": 2}, mesh=axes)
    return cfg, step.build(cfg, tiny.make_mesh(**axes), 320)


def test_programs_of_one_process_have_the_options_of_their_own_layouts(monkeypatch):
    _, plain = build(monkeypatch, data=8)
    _, staged = build(monkeypatch, data=4, stage=2)
    for program, n_stages in ((plain, 1), (staged, 2)):
        options = xla_flags.compiler_options((9, 0), n_stages, {})
        assert program.train.options == program.eval.options == options
    assert "optimization_level" in plain.train.options.keys() - staged.train.options.keys()


@pytest.mark.parametrize(
    ("axes", "asked", "expected"),
    [
        ({"data": 8}, False, False),
        ({"data": 8}, True, True),
        ({"copies": 2, "data": 4}, False, True),
    ],
)
def test_copies_and_those_who_ask_get_the_same_bits_each_time(monkeypatch, axes, asked, expected):
    monkeypatch.setattr(devices, "compute_capability", lambda device: (9, 0))
    cfg = tiny.make_config(mesh=axes, precision={"deterministic": asked})
    options = step.build(cfg, tiny.make_mesh(**axes), 320).train.options
    assert options.get("xla_gpu_exclude_nondeterministic_ops", False) == expected


@pytest.mark.parametrize("name", ["train", "eval"])
def test_options_reach_the_compiler(monkeypatch, name):
    """XLA refuses one that it does not have."""
    monkeypatch.setattr(
        xla_flags, "compiler_options", lambda *_, **__: {"xla_no_such_option": True}
    )
    cfg, program = build(monkeypatch, data=8)
    state, batch = step.abstract_args(program, cfg, cfg.batch.global_batch_size)
    args = {"train": (state, batch), "eval": (state.params, batch)}[name]
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        getattr(program, name).compile(*args)
