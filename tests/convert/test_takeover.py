"""Taking over a Megatron project: its corpus, weights and options give its console's numbers.

`golden/megatron_run` is Megatron's own program from end to end. Its initial weights are there as
safetensors that `gpt3jax.convert` made of its checkpoint, so that no torch is needed here.
"""

import json
import math
import pathlib

import numpy as np
import pytest

from gpt3jax.convert import megatron
from gpt3jax.data import loader
from gpt3jax.run import startup
from gpt3jax.sharding import meshes
from gpt3jax.watch import phases

import corpus
import tiny

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "megatron_run"
RUN = json.loads((GOLDEN / "run.json").read_text())
MESH = ("--batch.microbatch-size=1", "--mesh.data=2", "--mesh.stage=2", "--mesh.tensor=2")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "recipe.py").symlink_to(GOLDEN / "recipe.py")
    return tmp_path


def take_over(monkeypatch, folder, weights, *args):
    """Convert a checkpoint and train on from it; return the records of the log."""
    options = megatron.FromMegatron(folder=str(weights), output=str(folder / "weights"))
    megatron.from_megatron(options)
    assert corpus.call_main(monkeypatch, folder, *args) == 0
    return corpus.records(folder)


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param("one device", marks=pytest.mark.slow),
        pytest.param("data 2 x stage 2 x tensor 2", marks=pytest.mark.slower),
    ],
)
def test_a_megatron_project_goes_on_with_megatrons_numbers(monkeypatch, folder, mesh):
    """Losses, gradient norms, learning rates and evaluations, as far as its console shows them."""
    if mesh == "one device":
        monkeypatch.setattr(meshes, "make_mesh", lambda *_: tiny.one_device_mesh())
    args = ("--checkpoint.dir=saved", *(() if mesh == "one device" else MESH))
    records = take_over(monkeypatch, folder, GOLDEN / "initial", *args)
    steps = [record for record in records if "loss" in record]
    assert [s["consumed_samples"] for s in steps] == [s["consumed_samples"] for s in RUN["steps"]]
    loss, grad_norm, lr = (
        np.array([step[name] for step in steps]) for name in ("loss", "grad_norm", "learning_rate")
    )
    loss[1] = loss[:2].mean()  # Megatron's line of iteration 2 is that
    printed = {name: np.array([s[name] for s in RUN["steps"]]) for name in RUN["steps"][0]}
    # Seven digits and three decimals are printed: these are a fraction of the last but one.
    np.testing.assert_allclose(loss, printed["loss"], atol=3e-6, rtol=0)
    np.testing.assert_allclose(grad_norm, printed["grad_norm"], atol=2e-3, rtol=0)
    # Its lines show the learning rate of the next step.
    np.testing.assert_allclose(lr[1:], printed["lr_printed"][:-1], rtol=1e-6)
    measured = [
        (record["step"], name, record[f"{name}_loss"], record[f"{name}_ppl"])
        for record in records
        for name in ("validation", "test")
        if f"{name}_loss" in record
    ]
    evaluations = [e for e in RUN["evaluations"] if e["on"] != "on validation set"]
    for (step, name, *values), expected in zip(measured, evaluations, strict=True):
        assert (step, name) == (expected["iteration"], expected["on"][3:7] or "validation")
        np.testing.assert_allclose(values, [expected["loss"], expected["ppl"]], rtol=1e-6)
    # After the last step Megatron measures validation twice, we do once.
    [expected] = [e["loss"] for e in RUN["evaluations"] if e["on"] == "on validation set"]
    np.testing.assert_allclose(evaluate_once_more(folder, *args), expected, rtol=1e-6)


def evaluate_once_more(folder, *args):
    """Return the loss on the validation samples that follow those of the run."""
    cfg = corpus.config_of(folder, *args)
    started = startup.start_or_resume(cfg, phases.Phases())
    run, state = started.run, started.state
    assert started.position == (30, 240)
    batches = loader.eval_batches(run.splits, cfg, run.mesh, "validation", 3)
    sums = [run.program.eval(state.params, batch) for batch in batches]
    loss_sum, n_tokens = (math.fsum(map(float, xs)) for xs in zip(*sums, strict=True))
    return loss_sum / n_tokens


def test_shards_of_two_tensor_and_two_pipeline_ranks_merge(monkeypatch, folder):
    pytest.importorskip("torch")
    records = take_over(monkeypatch, folder, GOLDEN / "tp2_pp2", "--train.n-steps=1", *MESH)
    expected = RUN["tp2_pp2_first_step"]
    np.testing.assert_allclose(records[0]["loss"], expected["loss"], atol=3e-6)
    np.testing.assert_allclose(records[0]["grad_norm"], expected["grad_norm"], atol=2e-3)
