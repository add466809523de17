"""Every benchmark runs, at a tiny size; what it measures is not looked at."""

import importlib.util
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
        "data", "faults", "messages", "move", "overhead", "plan", "report", "sample", "train_step",
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
