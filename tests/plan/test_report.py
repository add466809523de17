"""The JSON of a report, key for key and figure for figure, against golden/plan.

After a change on purpose: `GPT3JAX_UPDATE_GOLDENS=1 pytest tests/plan/test_report.py`, and read the
diff. Programs read this JSON: keys are added, and never renamed.
"""

import dataclasses
import json
import os

import pytest

from gpt3jax.config import schema
from gpt3jax.hardware import gpus
from gpt3jax.plan import (
    buffer_assignment,
    compiler,
    hlo,
    hlo_checks,
    placement,
    ranking,
    report,
    step_report,
)

CFG = schema.Config(
    model=schema.Model(
        n_layers=2,
        d_model=256,
        n_heads=4,
        seq_len=512,
        vocab_size=2000,
        attention_dropout=0.0,
        remat="full",
        n_loss_chunks=1,
    ),
    optimizer=schema.Optimizer(peak_lr=1e-4),
    batch=schema.Batch(global_batch_size=16, microbatch_size=1),
    data=schema.Data(mock=True),
    mesh=schema.Mesh(
        copies=1,
        data=2,
        stage=1,
        fsdp=2,
        context=1,
        tensor=2,
        virtual_stages=1,
        shard_optimizer=False,
        sequence_parallel=True,
    ),
    train=schema.Train(n_steps=10),
)


def build(price, compiled=None):
    h100 = gpus.GPUS["h100"]
    target = step_report.Target(gpu=h100, network=gpus.network_of(h100), price=price)
    layouts = ranking.of_config(CFG, 8, h100, target.network)
    step = step_report.build(CFG, placement.lay_out(CFG, 8, 8), target, compiled)
    return report.build(CFG, layouts, {16: step}, target)


def check(plan, file):
    content = json.loads(json.dumps(report.as_json(plan))) | {"versions": {}}
    if os.environ.get("GPT3JAX_UPDATE_GOLDENS"):
        file.write_text(json.dumps(content, indent=2) + "\n")
    leaves, expected = flat(content), flat(json.loads(file.read_text()))
    assert list(leaves) == list(expected)
    for path, value in expected.items():
        # From Python 3.12 on, `sum` loses fewer bits.
        exact = not isinstance(value, float)
        assert leaves[path] == (value if exact else pytest.approx(value, rel=1e-12)), path


def flat(tree, prefix=""):
    """Return the leaves of a tree of JSON by their paths; an empty container is a leaf."""
    if not isinstance(tree, dict | list):
        return {prefix: tree}
    if not tree:
        return {prefix: repr(tree)}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {k: v for name, part in items for k, v in flat(part, f"{prefix}/{name}").items()}


@pytest.fixture
def golden(repository):
    return repository / "tests" / "golden" / "plan"


def test_json_of_closed_forms_is_the_golden_one(golden):
    check(build(0.0), golden / "report_estimated.json")


def test_json_of_a_compiled_step_is_the_golden_one(golden, monkeypatch):
    monkeypatch.setattr(
        hlo_checks, "check", lambda *_: None
    )  # the program is a small part of a step
    text = (golden / "step.hlo").read_text()
    compiled = compiler.Compiled(
        argument_bytes=10_000_000, temp_bytes=9_000_000, peak_bytes=26_000_000, attention="cudnn",
        largest_buffers=[
            buffer_assignment.Buffer(
                4_194_304, "bf16[2,512,2048]", "while/body/add", "gpt3jax/model/gpt.py:12"
            )
        ],
        fused_attention={"forward": True, "backward": False}, compile_seconds=1.5,
        host_bytes=5_000_000,
        versions={}, cached=True, text=text, program=hlo.parse(text),
    )  # fmt: skip
    check(build(2.5, compiled), golden / "report_compiled.json")


def test_json_of_a_search_lists_its_layouts():
    options = {"overrides": ["--mesh.data=8"], "batch_size": 16, "layout": {"mesh.data": 8}}
    failed = report.SearchedLayout(**options, failed="it broke", step_seconds_closed_form=0.5)
    plan = dataclasses.replace(build(0.0), search=[failed])
    [row] = report.as_json(plan)["search"]
    assert list(row.items()) == [
        *options.items(), ("failed", "it broke"), ("fits", False), ("peak_bytes_per_gpu", None),
        ("step_seconds", None), ("step_seconds_closed_form", 0.5), ("mfu", None),
    ]  # fmt: skip
