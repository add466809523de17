"""The command: the JSON contract, errors, search, the page, and a step compiled for H100s."""

import json
import os
import pathlib
import re

import pytest

from gpt3jax import gpus, recipe
from gpt3jax.plan import __main__ as plan
from gpt3jax.plan import compiler, memory_model, search

CONTRACT = {
    "fits", "peak_bytes_per_gpu", "memory", "step_seconds", "mfu", "tokens_per_second_per_gpu",
    "exposed_communication_seconds", "collectives", "compile_seconds", "versions",
}  # fmt: skip
GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "plan" / "small_step.txt"
compiles = pytest.mark.skipif(bool(compiler.missing_extra()), reason="needs the extra plan")


@pytest.fixture
def recipe_file(tmp_path):
    """A GPT small enough to compile in seconds, and with what cuDNN's attention needs."""
    file = tmp_path / "small.py"
    file.write_text(
        "from gpt3jax.config import *\n"
        "def get_config():\n"
        "    return Config(\n"
        "        model=Model(n_layers=2, d_model=256, n_heads=4, seq_len=512, vocab_size=1000,\n"
        "                    attention_dropout=0.0),\n"
        "        optimizer=Optimizer(peak_lr=1e-4),\n"
        "        batch=Batch(global_batch_size=16),\n"
        "        mesh=Mesh(data=-1, fsdp=2, tensor=2),\n"
        "        train=Train(n_steps=10),\n"
        "    )\n"
    )
    return str(file)


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--gpus=12"], "not a multiple of --gpus-per-node=8"),
        (["--gpus=8", "--mesh.data=4"], "the axes' product must be 8"),
        (["--gpus=16", "--mesh.data=2"], "--mesh.data=4"),
        (["--gpus=8", "--gpu=h1000"], "use one of h100"),
        (["--gpus=64"], "global_batch_size=16 is not divisible"),
        (["--gpus=8", "--mesh.tensor=8"], "does not divide"),
        (["--gpus=8", "--nic-gbytes=0"], "must be above 0"),
        (["--gpus=8", "--json=/nowhere/plan.json"], "cannot be written"),
        (["--gpus=8", "--dump-hlo=x", "--no-compile"], "--dump-hlo needs"),
    ],
)
def test_what_a_user_can_mend_is_one_line(recipe_file, args, told, capsys):
    assert plan.main([f"--config={recipe_file}", "--no-compile", *args]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


def test_report_without_compiling_keeps_the_contract(recipe_file, tmp_path, capsys):
    file = tmp_path / "plan.json"
    args = [f"--config={recipe_file}", "--gpus=8", "--no-compile", f"--json={file}", "--price=2"]
    assert plan.main(args) == 0
    found = json.loads(file.read_text())
    assert found.keys() >= CONTRACT
    assert found["step_seconds"].keys() == {"low", "expected", "high"}
    low, expected, high = found["step_seconds"].values()
    assert 0 < low < expected < high
    assert sum(found["memory"].values()) == pytest.approx(found["peak_bytes_per_gpu"], abs=8)
    assert found["mesh"]["data"] == 2 and found["compile_seconds"] is None
    assert found["cost"] == pytest.approx(2 * found["gpu_hours"])
    assert "Times are estimates" in capsys.readouterr().out


def test_verify_fails_what_does_not_fit_or_would_be_refused(repository, capsys):
    def status(*args):
        path = repository / "configs" / "175b.py"
        return plan.main([f"--config={path}", "--no-compile", "--verify", *args])

    constant = "--batch.schedule="
    assert status("--gpus=1024", constant) == 0
    assert status("--gpus=1024") == 1  # the schedule's 16 sequences on 128 ranks
    assert "would refuse" in capsys.readouterr().out
    assert status("--gpus=16", "--mesh.fsdp=2", constant) == 1
    assert "NO" in capsys.readouterr().out


def test_searched_layouts_fit_and_their_options_give_them(recipe_file):
    cfg = recipe.parse([f"--config={recipe_file}", "--data.mock"])
    gpu = gpus.GPUS["h100"]
    found = search.candidates(cfg, 8, gpu, gpus.network_of(gpu))
    assert len(found) > 50
    assert [one.seconds for one in found] == sorted(one.seconds for one in found)
    for one in search.to_compile(found, 20):
        again = recipe.parse([f"--config={recipe_file}", "--data.mock", *one.overrides])
        layout = memory_model.lay_out(again, 8, 8)
        assert layout.sizes == one.layout.sizes
        assert sum(memory_model.memory(again, layout).values()) == one.peak_bytes
        assert one.layout.n_gpus == 8


def test_search_prints_options_and_plans_the_fastest(recipe_file, tmp_path, capsys):
    file, page = tmp_path / "plan.json", tmp_path / "plan.html"
    args = ["--gpus=8", "--search", "--no-compile", f"--json={file}", f"--html={page}"]
    assert plan.main([f"--config={recipe_file}", *args]) == 0
    found = json.loads(file.read_text())
    best = found["search"][0]
    assert best["step_seconds"] == min(row["step_seconds"] for row in found["search"])
    assert best["step_seconds"] == pytest.approx(found["step_seconds"]["expected"])
    assert " ".join(best["overrides"]) in capsys.readouterr().out
    text = page.read_text()
    assert "http" not in text.replace("http-equiv", "")  # it needs nothing from elsewhere
    for told in ("Memory of a GPU", "matmul", "all-gather" if "all-gather" in str(found) else ""):
        assert told in text


def test_search_says_so_where_nothing_fits(repository, capsys):
    args = ["--gpus=8", "--search", "--no-compile"]
    assert plan.main([f"--config={repository / 'configs' / '175b.py'}", *args]) == 2
    assert "no layout of this model fits --gpus=8" in capsys.readouterr().err


@compiles
def test_small_step_compiles_for_h100_with_cudnn_and_known_collectives(
    recipe_file, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    report, program = tmp_path / "plan.json", tmp_path / "step.hlo"
    args = [f"--config={recipe_file}", "--gpus=8", "--verify", f"--json={report}"]
    assert plan.main([*args, f"--dump-hlo={program}"]) == 0
    found = json.loads(report.read_text())
    assert found.keys() >= CONTRACT
    assert found["compiled"]["cudnn"] == {"forward": True, "backward": True}
    told = "".join(
        f"{c['kind']} {c['axis']} {c['count']} x {c['bytes_per_step'] / c['count'] / 1e3:.1f} kB\n"
        for c in sorted(found["collectives"], key=lambda c: (c["axis"], c["kind"]))
    )
    if os.environ.get("GPT3JAX_UPDATE_GOLDENS"):
        GOLDEN.write_text(told)
    assert told == GOLDEN.read_text()
    assert found["compiled"]["largest_buffers"][0]["source"].startswith("gpt3jax/")
    states = sum(found["memory"][name] for name in ("parameters", "optimizer", "batch"))
    assert found["compiled"]["argument_bytes"] == pytest.approx(states, rel=0.01)
    text = program.read_text()
    assert "reduce-scatter-start" in text or "all-gather-start" in text
    assert not re.search(r"all-gather[^=]*\(.*\[\d+,512,1024\]", text)  # whole logits
    assert plan.main(args) == 0
    assert json.loads(report.read_text())["compiled"]["cached"]
