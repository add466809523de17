"""The command: errors, the report's contract, advice, the exit status of --verify."""

import json
import re

import pytest

from gpt3jax.plan import __main__ as plan
from gpt3jax.plan import compiler

CONTRACT = {
    "fits", "peak_bytes_per_gpu", "memory", "step_seconds", "mfu", "tokens_per_second_per_gpu",
    "exposed_communication_seconds", "collectives", "compile_seconds", "versions",
}  # fmt: skip
SEARCH = ["--search", "--mesh.fsdp=auto"]
WSD = ["--optimizer.decay=wsd", "--optimizer.wsd-decay-samples=200"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--gpus=0"], "--gpus=0 must be at least 1"),
        (["--gpus=8", "--mesh.data=4"], "does not fit 8 GPUs: the axes' product must be 8"),
        (["--gpus=16", "--mesh.data=2"], "--mesh.data=4"),
        (["--gpus=8", "--gpu=h1000"], "use one of h100"),
        (["--gpus=64"], "global_batch_size=16 is not divisible"),
        (["--gpus=8", "--mesh.tensor=8"], "does not divide"),
        (["--gpus=8", "--nic-gbytes=0"], "--nic-gbytes=0.0 must be at least 0.001"),
        (["--gpus=8", "--nic-gbytes=nan"], "--nic-gbytes=nan must be at least"),
        (["--gpus=8", "--latency-us=inf"], "--latency-us=inf must be at least"),
        (["--gpus=8", "--price=-3"], "--price=-3.0 must be at least 0"),
        (["--gpus=8", "--json=/nowhere/plan.json"], "cannot be written"),
        (["--gpus=8", "--html=/"], "cannot be written"),
        (["--gpus=8", "--dump-hlo=x", "--no-compile"], "--dump-hlo needs"),
        (["--gpus=8", "--batch.schedule=0:4 x"], 'entry "x" must be'),
        (["--gpus=8", *SEARCH, "--batch.schedule=0:4 x"], 'entry "x" must be'),
        (["--gpus=8", *WSD], "takes 200 samples, which exceeds the run's 160"),
        (["--gpus=8", *SEARCH, *WSD], "takes 200 samples, which exceeds the run's 160"),
        (["--gpus=8", "--search"], "--search finds no layouts where the recipe gives one"),
        (["--gpus=8", "--search", "--layouts=x"], "where layouts=x has them"),
        (["--gpus=8", "--layouts=x"], "No such file"),
        (["--gpus=8", "--write-layouts=/"], "cannot be written"),
        (["--gpus=8", "--mesh.tensor=auto", "--mesh.fsdp=3"], "no mesh of 8 GPUs divides a batch"),
    ],
)
def test_what_a_user_can_fix_is_one_line_and_comes_first(recipe_file, args, message, capsys):
    assert plan.main([f"--config={recipe_file}", "--no-compile", *args]) == 2
    shown = capsys.readouterr()
    assert message in shown.err and shown.err.count("\n") == 1 and not shown.out


def test_report_without_compiling_keeps_the_contract(recipe_file, tmp_path, capsys):
    file = tmp_path / "plan.json"
    args = [f"--config={recipe_file}", "--gpus=8", "--no-compile", f"--json={file}", "--price=2"]
    assert plan.main(args) == 0
    content = json.loads(file.read_text())
    assert content.keys() >= CONTRACT
    assert content["step_seconds"].keys() == {"low", "expected", "high"}
    low, expected, high = content["step_seconds"].values()
    assert 0 < low < expected < high
    assert sum(content["memory"].values()) == pytest.approx(content["peak_bytes_per_gpu"], abs=8)
    assert content["mesh"]["data"] == 2 and content["compile_seconds"] is None
    assert content["cost"] == pytest.approx(2 * content["gpu_hours"])
    assert "Times are estimates" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "of the step waits for communication: --search"),
        (["--model.d-model=65536", "--model.n-layers=48"], "It does not fit: give fewer fields"),
        (["--nic-gbytes=1e6", "--nvlink-gbytes=1e6", "--latency-us=1e-3"], ""),
        (SEARCH, ""),
    ],
)
def test_search_is_advised_where_it_may_help(recipe_file, args, message, capsys):
    assert plan.main([f"--config={recipe_file}", "--gpus=16", "--no-compile", *args]) == 0
    shown = capsys.readouterr().out
    assert message in shown and ("waits for" in shown or "does not fit" in shown) == bool(message)


def test_verify_fails_what_does_not_fit_or_would_be_refused(recipe_file, capsys):
    def status(*args):
        return plan.main([f"--config={recipe_file}", "--no-compile", "--verify", *args])

    assert status("--gpus=8") == 0
    assert status("--gpus=8", "--batch.schedule=0:4 1M:16") == 0
    capsys.readouterr()
    assert status("--gpus=8", "--batch.schedule=0:2 1M:16") == 1  # 2 sequences on 4 ranks
    assert "would refuse" in capsys.readouterr().out
    assert status("--gpus=8", "--model.d-model=65536", "--model.n-layers=48") == 1
    assert re.search(r"fits +NO\b", capsys.readouterr().out)


def test_a_run_says_what_its_growing_batch_costs(growing_file, tmp_path, capsys):
    file, page = tmp_path / "plan.json", tmp_path / "plan.html"
    args = ["--gpus=8", "--no-compile", "--train.n-steps=20", "--price=2"]
    files = [f"--json={file}", f"--html={page}"]
    assert plan.main([f"--config={growing_file}", *args, *files]) == 0
    content, shown = json.loads(file.read_text()), capsys.readouterr().out
    hours = [row["hours"] for row in content["batches"]]
    assert [row["steps"] for row in content["batches"]] == [8, 8, 4]
    assert content["run_days"] == pytest.approx(sum(hours) / 24)
    assert content["ramp_hours"] == pytest.approx(sum(hours[:2]))
    assert 0 < content["ramp_extra_hours"] < content["ramp_hours"]
    share = content["ramp_extra_hours"] / sum(hours)
    for text in (shown.replace("\n", ""), page.read_text()):
        assert f"{share:.1%} of the run" in text
        assert "layouts: found by closed forms" in text


def test_gpus_that_idle_are_in_the_report_and_cost_too(auto_file, tmp_path, capsys):
    file, page = tmp_path / "plan.json", tmp_path / "plan.html"
    args = ["--gpus=20", "--no-compile", "--price=2", f"--json={file}", f"--html={page}"]
    assert plan.main([f"--config={auto_file}", *args]) == 0
    content, shown = json.loads(file.read_text()), capsys.readouterr().out
    [note] = content["notes"]
    assert "4 of 20 devices idle, numbers 16 to 19" in note
    assert "none idles: 16 and 32" in note
    assert note in shown and note in page.read_text()
    assert (content["gpus"], content["gpus_idle"]) == (20, 4)
    assert content["gpu_hours"] == pytest.approx(20 * 24 * content["run_days"])
    assert content["cost"] == pytest.approx(2 * content["gpu_hours"])


def test_users_text_is_printed_as_it_is(recipe_file, capsys, monkeypatch):
    """Rich would read text in brackets as its markup."""
    monkeypatch.setattr(compiler, "missing_extra", lambda: "run pip install -e '.[plan]'")
    assert plan.main([f"--config={recipe_file}", "--gpus=8"]) == 0
    assert "'.[plan]'" in capsys.readouterr().out
