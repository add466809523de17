"""Each batch size gets the first of its layouts whose compiled step fits, as a run does."""

import json

import pytest

from gpt3jax.config import layout, recipe
from gpt3jax.hardware import gpus
from gpt3jax.plan import __main__ as plan
from gpt3jax.plan import compiler, hlo_checks, ranking

TOO_MUCH = 10**12


@pytest.fixture
def compiled(fake_step, monkeypatch):
    """The layouts that were compiled, and the peaks of some: others need a thousandth of it."""
    calls, peaks = [], {}

    def compile_step(cfg, args, sizes, gpu, network):
        assert recipe.parse(args) == cfg  # what the compiling process reads
        assert {f"mesh.{axis}": n for axis, n in sizes.items()}.items() <= layout.of(cfg).items()
        key = (cfg.batch.global_batch_size, *layout.of(cfg).values())
        calls.append(key)
        return fake_step(peaks.get(key, TOO_MUCH // 1000))

    monkeypatch.setattr(compiler, "missing_extra", lambda: "")
    monkeypatch.setattr(compiler, "compile_step", compile_step)
    monkeypatch.setattr(hlo_checks, "check", lambda *_: None)
    return calls, peaks


@pytest.fixture
def found(growing_file):
    """The layouts of a growing batch on 8 GPUs, by closed forms."""
    cfg = recipe.parse([f"--config={growing_file}", "--data.mock"])
    h100 = gpus.GPUS["h100"]
    return ranking.of_config(cfg, 8, h100, gpus.network_of(h100)).by_size


def key(size, row):
    return size, *row.fields.values()


def report_of(file, tmp_path, *options):
    """Return the exit status, the report and the layouts that a plan writes."""
    report, layouts = tmp_path / "plan.json", tmp_path / "layouts.json"
    args = [f"--config={file}", "--gpus=8", "--verify", f"--json={report}"]
    status = plan.main([*args, f"--write-layouts={layouts}", *options])
    return status, json.loads(report.read_text()), json.loads(layouts.read_text())["by_size"]


def test_the_first_layout_of_each_size_is_compiled_and_taken(
    growing_file, found, compiled, tmp_path
):
    status, report, layouts = report_of(growing_file, tmp_path)
    assert status == 0
    assert compiled[0] == [key(size, rows[0]) for size, rows in found.items()]
    assert [row["layout"] for row in report["batches"]] == [
        rows[0].fields for rows in found.values()
    ]
    for size, rows in found.items():
        assert [row["fields"] for row in layouts[str(size)]] == [row.fields for row in rows]
        assert [row["is_compiled"] for row in layouts[str(size)]] == [True] + [False] * (
            len(rows) - 1
        )


def test_a_compiled_peak_that_is_too_large_makes_the_next_one_be_taken(
    growing_file, found, compiled, tmp_path
):
    calls, peaks = compiled
    peaks.update({key(8, row): TOO_MUCH for row in found[8][:2]})
    status, report, layouts = report_of(growing_file, tmp_path)
    assert status == 0 and len(calls) == 5
    assert report["batches"][1]["layout"] == found[8][2].fields
    assert [row["fields"] for row in layouts["8"]] == [row.fields for row in found[8][2:]]
    assert report["batches"][0]["layout"] == found[4][0].fields


def test_where_none_fits_the_smallest_is_shown(growing_file, found, compiled, tmp_path, capsys):
    _, peaks = compiled
    peaks.update({key(16, row): TOO_MUCH - i % 3 for i, row in enumerate(found[16])})
    status, report, _ = report_of(growing_file, tmp_path)
    assert status == 1
    assert [row["fits"] for row in report["batches"]] == [True, True, False]
    assert report["batches"][2]["layout"] == found[16][2].fields and not report["fits"]
    assert "It does not fit" in capsys.readouterr().out


def test_layouts_of_a_file_are_compiled_as_they_are(growing_file, found, compiled, tmp_path):
    _, first, _ = report_of(growing_file, tmp_path)
    kept = tmp_path / "layouts.json"
    calls = compiled[0]
    del calls[:]
    assert plan.main([f"--config={growing_file}", "--gpus=8", f"--layouts={kept}"]) == 0
    assert calls == [(row["batch_size"], *row["layout"].values()) for row in first["batches"]]


def test_sizes_that_a_given_layout_does_not_divide_are_problems(recipe_file, compiled, tmp_path):
    """Two are refused, each is told, and the others are planned."""
    growth = "--batch.schedule=0:2 1M:6 2M:8 4M:16"
    status, report, _ = report_of(recipe_file, tmp_path, growth)
    assert status == 1
    assert [row["layout"] is None for row in report["batches"]] == [True, True, False, False]
    assert [row["fits"] for row in report["batches"]] == [False, False, True, True]
    first, second = report["problems"]
    assert "the batch of 2 from sample 0 on" in first and "= 4" in first
    assert "the batch of 6 from sample 1953 on" in second
    assert len(compiled[0]) == 2


def test_microbatches_of_a_small_batch_need_not_divide_the_full_one(tmp_path):
    report = tmp_path / "plan.json"
    args = ["--config=configs/345m.py", "--gpus=8", "--no-compile", f"--json={report}"]
    assert plan.main(args) == 0
    content = json.loads(report.read_text())
    microbatches = {row["layout"]["batch.microbatch_size"] for row in content["batches"]}
    assert any(content["batches"][-1]["batch_size"] % size for size in microbatches)
    assert content["problems"] == []
