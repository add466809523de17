"""Every benchmark runs, at a tiny size; what it measures is not looked at."""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import pytest

from gpt3jax.plan import compiler

import corpus

BENCHMARKS = corpus.REPOSITORY / "benchmarks"
NETWORK = ["--layers=2", "--width=32", "--heads=4", "--vocab-size=300", "--rounds=1"]
GPT2 = corpus.REPOSITORY / "tests" / "golden" / "gpt2"
OURS = ["--peers", "gpt3jax"]


def load(name):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name, *args):
    """Return what a benchmark prints, as a process of its own."""
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_each_benchmark_has_a_test_here():
    names = {path.stem for path in BENCHMARKS.glob("*.py")}
    assert names == {
        "data", "faults", "gpu", "messages", "move", "overhead", "plan", "report", "sample",
        "train_step",
    }  # fmt: skip


def test_messages_grow_with_nodes_in_large_runs():
    """From 1,024 processes on; its patches of our modules stay in its own process."""
    _, _, *rows = run("messages", "--processes", "512", "1024").splitlines()
    (_, _, mb, looks, posts, _), (_, _, large_mb, large_looks, large_posts, _) = [
        [float(word.replace(",", "")) for word in row.split()] for row in rows
    ]
    assert (looks, large_looks) == (512, 1024 / 8)
    assert posts == pytest.approx((512 + 2) / 10, abs=0.1)
    assert large_posts == pytest.approx((1024 / 8 + 2) / 10, abs=0.1)
    assert large_mb < 2.5 * mb < 5, "the text of a value that all have is sent once"


DATA = [
    f"--vocab-file={GPT2}/vocab.json", f"--merge-file={GPT2}/merges.txt", "--rounds=1",
    "--text-mb=0.02", "--documents=1000", "--corpus-mb=1.2", "--samples=128",
]  # fmt: skip


def test_data_measures_the_way_from_text_to_batches(capsys):
    load("data").main(DATA)
    told = capsys.readouterr().out
    for words in ("encoding", "sample index of 1,000 documents", "one by one", "the loader"):
        assert words in told


@pytest.mark.slower
def test_data_is_compared_with_megatrons():
    pytest.importorskip("megatron.core.datasets")
    assert run("data", *DATA, "--megatron").count(", Megatron ") == 4


def test_report_times_the_page_of_a_made_up_run(capsys, tmp_path):
    load("report").main(["--steps=300", "--runs=2", f"--folder={tmp_path}"])
    assert "2 x 300 logged steps" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    assert "layout change" in page and "not finite" in page and "lost steps" in page


@pytest.mark.slow
def test_overhead_compares_bare_steps_with_watched_ones(tmp_path, capsys):
    corpus.write_run(tmp_path)
    args = [f"--config={tmp_path}/recipe.py", f"--devices={jax.device_count()}"]
    load("overhead").main([*args, "--steps=2", "--rounds=1"])
    assert "without and" in capsys.readouterr().out


@pytest.mark.slow
def test_train_step_measures_the_step_of_a_recipe(tmp_path, capsys):
    corpus.write_run(tmp_path)
    load("train_step").main([f"--config={tmp_path}/recipe.py", "--batch.global-batch-size=16"])
    assert "tokens/s (best of 4" in capsys.readouterr().out


@pytest.mark.slower
def test_train_step_measures_one_peer_in_a_process_of_its_own(capfd):
    load("train_step").main(["--cpu-peers", *OURS, *NETWORK, "--seq-len=16", "--batch=2"])
    assert capfd.readouterr().out.startswith("gpt3jax ")


@pytest.mark.slower
def test_sample_measures_one_peer_in_a_process_of_its_own(capfd):
    sizes = ["--seq-len=32", "--prompt=4", "--new=3", "--batches", "1", "2"]
    load("sample").main([*OURS, *NETWORK, *sizes])
    told = capfd.readouterr().out
    assert "batch 2 gpt3jax" in told and "DIFFERENT" not in told


@pytest.mark.parametrize("name, args", [("sample", []), ("train_step", ["--cpu-peers"])])
def test_a_peer_that_is_not_installed_is_named_with_the_way_without(
    monkeypatch, capsys, name, args
):
    benchmark = load(name)
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(args)
    assert stopped.value.code == 2 and "--peers gpt3jax" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name, args", [
    ("sample", [*NETWORK, "--seq-len=32", "--prompt=4", "--new=3", "--batches", "1"]),
    ("train_step", ["--cpu-peers", *NETWORK, "--seq-len=16", "--batch=2"]),
])  # fmt: skip
def test_both_peers_are_compared(name, args):
    pytest.importorskip("transformers")
    told = run(name, *args)
    assert "gpt3jax / hf: " in told and "DIFFERENT" not in told


def test_plan_prints_closed_forms_without_the_compiler(capsys, tmp_path):
    plan = load("plan")
    plan.main(["runs", "--no-compile"])
    plan.main(["memory", "--no-compile"])
    file = tmp_path / "rows.md"
    plan.main(["layouts", "--no-compile", "--gpus=8", "--recipes=345m", f"--rows={file}"])
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 2 * 3 + len(plan.RUNS) + len(plan.LAYOUTS) + 1
    *_, head, lines, row = rows
    assert row.startswith("| 345m | 8 | ") and not file.exists()
    assert head.count("|") == lines.count("|") == row.count("|")
    *_, ratio = plan.cells(row)
    assert 0.99 < float(ratio) < 1.04  # the first of a search, but for what is near the size before
    plan.main(["layouts", "--no-compile", "--gpus=8", "--recipes=175b", f"--rows={file}"])
    row = capsys.readouterr().out.splitlines()[-1]
    assert "no layout of this model fits 8 x" in row and row.count("|") == head.count("|")


def test_plan_says_what_it_needs_to_compile(monkeypatch, capsys):
    monkeypatch.setattr(compiler, "missing_extra", lambda: "install the extra")
    with pytest.raises(SystemExit):
        load("plan").main(["memory"])
    assert "install the extra; or give --no-compile" in capsys.readouterr().err


@pytest.mark.slower
def test_plan_keeps_the_rows_that_it_compiled(capsys, tmp_path):
    if compiler.missing_extra():
        pytest.skip(compiler.missing_extra())
    args = ["layouts", "--gpus=8", "--recipes=345m", f"--rows={tmp_path / 'rows.md'}"]
    load("plan").main(args)
    row = (tmp_path / "rows.md").read_text()
    load("plan").main(args)
    assert capsys.readouterr().out.count(row) == 2


def test_move_says_what_it_needs_to_compile(monkeypatch, capsys):
    monkeypatch.setattr(compiler, "missing_extra", lambda: "install the extra")
    with pytest.raises(SystemExit):
        load("move").main([])
    assert "install the extra" in capsys.readouterr().err


@pytest.mark.slower
def test_move_prints_a_row_for_each_direction():
    if compiler.missing_extra():
        pytest.skip(compiler.missing_extra())
    layouts = ["data=2,stage=2,tensor=4,virtual-stages=3,shard-optimizer", "fsdp=16"]
    rows = run("move", *layouts, "--recipe=gpt3/1_3b").splitlines()[2:]
    first, second = ([cell.strip() for cell in row.strip("|").split("|")] for row in rows)
    assert (first[1], first[2]) == (second[2], second[1])
    assert float(first[3]) > max(float(first[1]), float(first[2]))


@pytest.mark.slower
def test_faults_finds_a_killed_run_equal():
    told = run("faults", "--kills=1", "--processes=1", "--steps=24", "--seed=1")
    assert told.splitlines()[-1].endswith("all equal")


@pytest.fixture
def gpu(monkeypatch, tmp_path, repository):
    """Return a function that checks the "GPU" of this machine: its exit status and its results."""
    monkeypatch.setenv("XLA_FLAGS", corpus.XLA_FLAGS)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(repository / ".cache" / "jax"))

    def check(*args):
        status = load("gpu").main(["--cpu", f"--output={tmp_path}", *args])
        lines = (tmp_path / "results.jsonl").read_text().splitlines()
        return status, {result["part"]: result for result in map(json.loads, lines)}

    return check


@pytest.mark.slower
def test_gpu_has_all_parts_end_to_end_without_one(gpu, capsys, tmp_path):
    status, results = gpu("--limit=5")
    benchmark = load("gpu")
    assert status == 0 and list(results) == list(benchmark.PARTS), capsys.readouterr().out
    skipped = {name for name, result in results.items() if result["status"] == "skipped"}
    assert skipped == {"345m triton"}
    check_training(results, {name for name in results if name[0].isdigit()} - skipped)
    values = {name: result["values"] for name, result in results.items()}
    assert len(values["golden"]) == 4 and len(values["attention"]) >= 3
    assert values["repeat"]["arrays resumed"] == {"error": 0, "of": 54, "limit": 0}
    assert values["decoding"]["float32 highest"] == {"error": 0, "of": 90, "limit": 0}
    tables = (tmp_path / "tables.md").read_text()
    assert tables.count("\n| 350m") == 2 * 4 and tables in capsys.readouterr().out


def check_training(results, names):
    """Compare what a step took with the plan, of which only the order of size can be right."""
    for name in names:
        values = results[name]["values"]
        assert values["planned for"].startswith("NVIDIA H200"), name
        assert 0.5 < values["plan GiB"] / values["compiled GiB"] < 5, name
        assert 100 < values["tokens/s"] < values["plan tokens/s"][0], name


@pytest.mark.slow
def test_gpu_runs_the_parts_that_are_asked_for(gpu, tmp_path, capfd):
    """With the project's own settings, and the user's flags."""
    status, results = gpu("--limit=5", "--parts", "environment", "350m", "profile")
    assert status == 0 and list(results) == ["environment", "350m", "profile"]
    check_training(results, {"350m"})
    found = results["environment"]["values"]
    assert found["versions"]["jax"] == jax.__version__
    assert found["variables"]["XLA_FLAGS"] == corpus.XLA_FLAGS
    assert "6 steps, 24 samples of 64 tokens" in (tmp_path / "log.txt").read_text()
    assert capfd.readouterr().out.count("| profile | ok |") == 1


def test_gpu_goes_on_after_a_part_that_fails_or_does_not_end(gpu, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_no_such_flag")  # XLA ends the process
    status, results = gpu("--parts", "rates")
    assert status == 1 and results["rates"]["status"] == "failed"
    assert "exit status 1: " in results["rates"]["why"]
    assert "--xla_no_such_flag" in results["rates"]["why"]
    status, results = gpu("--limit=0.001", "--parts", "environment", "repeat")
    assert status == 1 and [r["status"] for r in results.values()] == ["timeout"] * 2
    assert results["repeat"]["why"] == "it had not ended after 0.09 s: --limit=2 doubles the time"


def test_gpu_leaves_out_what_the_eight_minutes_have_no_room_for(gpu, monkeypatch, tmp_path):
    benchmark = load("gpu")
    monkeypatch.setattr(benchmark, "SECONDS", 0.0)
    assert benchmark.main(["--cpu", f"--output={tmp_path}", "--parts", "rates"]) == 1
    (line,) = (tmp_path / "results.jsonl").read_text().splitlines()
    assert json.loads(line)["status"] == "left out" and "--limit=2" in json.loads(line)["why"]


@pytest.mark.parametrize(
    ("status", "found", "expected"),
    [
        (0, {"a": {"error": 0.1, "limit": 0.1}, "tokens/s": 3.0, "b": {"error": 5}}, "ok"),
        (0, {"a": {"error": 0.2, "limit": 0.1}}, "wrong"),
        (0, {"a": {"error": "nan", "limit": 0.1}}, "wrong"),
        (0, {"a": {"error": "XlaRuntimeError: no cuDNN", "limit": 0.1}}, "wrong"),
        (0, {"skipped": "it needs a GPU"}, "skipped"),
        (1, {"error": "UserError: no"}, "failed"),
        (-9, {}, "failed"),
        (None, {"a": {"error": 0.2, "limit": 0.1}}, "timeout"),
    ],
)
def test_gpu_tells_how_a_part_ended(status, found, expected):
    ended, why = load("gpu").outcome(status, found, 60, "last words")
    assert ended == expected and bool(why) == (expected != "ok")
    assert ("last words" in why) == (status == -9)


def test_gpu_writes_a_cases_failure_as_json_can_hold_it():
    found = {"a": float("nan"), "b": None, "c": [1.23456789, True], "d": {"e": 3, "f": None}}
    assert load("gpu").plain(found) == {"a": "nan", "c": [1.235, True], "d": {"e": 3}}


def test_gpu_refuses_a_part_and_a_limit_that_there_cannot_be(capsys):
    for args, message in (
        (["--parts", "350"], "invalid choice: '350'"),
        (["--limit=0"], "above 0"),
    ):
        with pytest.raises(SystemExit):
            load("gpu").main(args)
        assert message in capsys.readouterr().err


def test_gpu_keeps_the_users_flags_and_adds_those_of_a_part(monkeypatch, tmp_path):
    benchmark = load("gpu")
    monkeypatch.setenv("XLA_FLAGS", "--xla_of_user=1")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    part = benchmark.PARTS["350m command buffers"]
    variables = benchmark.environment(part, tmp_path, cpu=False)
    assert variables["XLA_FLAGS"] == f"--xla_of_user=1 {part.xla_flags}"
    assert variables["JAX_COMPILATION_CACHE_DIR"] == f"{tmp_path}/compiled"
    assert variables.get("JAX_PLATFORMS") == os.environ.get("JAX_PLATFORMS")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/kept")
    variables = benchmark.environment(benchmark.PARTS["350m 8 connections"], tmp_path, cpu=True)
    assert variables["JAX_COMPILATION_CACHE_DIR"] == "/kept"
    assert (variables["CUDA_DEVICE_MAX_CONNECTIONS"], variables["JAX_PLATFORMS"]) == ("8", "cpu")
