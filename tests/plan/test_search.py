"""The search: its layouts fit, and it goes on where one fails."""

import json

import pytest

from gpt3jax import errors
from gpt3jax.config import recipe
from gpt3jax.hardware import gpus
from gpt3jax.plan import __main__ as plan
from gpt3jax.plan import compiler, hlo, hlo_checks, memory_model, placement, planning, search


def test_searched_layouts_fit_and_their_options_give_them(recipe_file):
    cfg = recipe.parse([f"--config={recipe_file}", "--data.mock"])
    gpu = gpus.GPUS["h100"]
    candidates = search.candidates(cfg, 8, gpu, gpus.network_of(gpu))
    assert len(candidates) > 50
    seconds = [candidate.seconds for candidate in candidates]
    assert seconds == sorted(seconds)
    queue = search.Queue(candidates, gpu)
    for candidate in (queue.next() for _ in range(20)):
        again = recipe.parse([f"--config={recipe_file}", "--data.mock", *candidate.overrides])
        assert again == candidate.cfg
        layout = placement.lay_out(again, 8, 8)
        assert layout.sizes == candidate.layout.sizes
        assert sum(memory_model.memory(again, layout).values()) == candidate.peak_bytes
        assert candidate.layout.n_gpus == 8


def test_a_compiled_peak_corrects_the_closed_forms_of_its_kind(recipe_file):
    cfg = recipe.parse([f"--config={recipe_file}", "--data.mock"])
    gpu = gpus.GPUS["h100"]
    candidates = search.candidates(cfg, 8, gpu, gpus.network_of(gpu))
    queue = search.Queue(candidates, gpu)
    first = queue.next()
    assert first is candidates[0]
    queue.note(first, gpu.memory_bytes * 1e6)  # the smallest would not fit either
    rest = list(iter(queue.next, None))
    assert rest and all(candidate.cfg.model.remat != first.cfg.model.remat for candidate in rest)
    meshes = [str(candidate.layout.sizes) for candidate in [first, *rest]]
    assert max(map(meshes.count, meshes)) <= search.PER_MESH


def test_search_prints_options_and_plans_the_fastest(recipe_file, tmp_path, capsys):
    file, page = tmp_path / "plan.json", tmp_path / "plan.html"
    args = ["--gpus=8", "--search", "--no-compile", f"--json={file}", f"--html={page}"]
    assert plan.main([f"--config={recipe_file}", *args]) == 0
    content = json.loads(file.read_text())
    best = content["search"][0]
    assert best["step_seconds"] == min(row["step_seconds"] for row in content["search"])
    assert best["step_seconds"] == pytest.approx(content["step_seconds"]["expected"])
    assert " ".join(best["overrides"]) in capsys.readouterr().out
    text = page.read_text()
    assert "http" not in text.replace("http-equiv", "")  # it needs nothing from elsewhere
    for words in (
        "Memory of a GPU",
        "matmul",
        f"remat {content['step']['remat']}",
        *best["overrides"],
    ):
        assert words in text
    assert f"--model.remat={content['step']['remat']}" in best["overrides"]


@pytest.mark.parametrize(
    ("growth", "dropped"),
    [("--batch.schedule=0:4 1M:16", "--batch.schedule="), ("--batch.ramp 4 4 100", "--batch.ramp")],
)
def test_search_says_where_it_drops_a_growing_batch(recipe_file, growth, dropped, capsys):
    option, _, values = growth.partition(" ")
    growth = [option, *values.split()] if "ramp" in growth else [growth]
    args = [f"--config={recipe_file}", "--gpus=16", "--data.mock", *growth]
    cfg, gpu = recipe.parse([args[0], *args[2:]]), gpus.GPUS["h100"]
    candidates = search.candidates(cfg, 16, gpu, gpus.network_of(gpu))
    assert {dropped in candidate.overrides for candidate in candidates} == {True, False}
    for candidate in candidates:
        grows = bool(candidate.cfg.batch.schedule or candidate.cfg.batch.ramp)
        assert candidate.drops_schedule == (dropped in candidate.overrides) != grows
    first = next(candidate for candidate in candidates if candidate.drops_schedule)
    again = recipe.parse([args[0], *args[2:], *first.overrides])
    assert again == first.cfg
    assert plan.main([*args, "--search", "--no-compile", "--n-compiled=20"]) == 0
    assert "leave out the recipe's growing batch" in capsys.readouterr().out


def test_search_goes_on_after_a_failed_compile_and_while_nothing_fits(
    recipe_file, fake_step, tmp_path, capsys, monkeypatch
):
    answers = [
        errors.UserError("it broke", page="plan.md"),
        *[fake_step(10**12)] * 2,
        fake_step(10**9),
    ]

    def compile_step(cfg, args, sizes, gpu, network):
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(compiler, "missing_extra", lambda: "")
    monkeypatch.setattr(compiler, "compile_step", compile_step)
    monkeypatch.setattr(hlo_checks, "check", lambda *_: None)
    file = tmp_path / "plan.json"
    args = [f"--config={recipe_file}", "--gpus=8", "--search", "--verify", f"--json={file}"]
    assert plan.main([*args, "--n-compiled=1"]) == 0
    rows = json.loads(file.read_text())["search"]
    assert [row["fits"] for row in rows] == [True, False, False, False]
    assert [bool(row["failed"]) for row in rows] == [False, False, False, True]
    assert "(it broke)" in capsys.readouterr().out

    answers[:] = [fake_step(10**12)]
    assert plan.main([*args, "--n-compiled=1"]) == 1
    assert len(json.loads(file.read_text())["search"]) == 1 + planning.MORE_COMPILED
    assert "none of these layouts fits" in capsys.readouterr().out

    answers[:] = [errors.UserError("it broke", page="plan.md")]
    assert plan.main(args) == 2
    assert "none of 8 layouts compiled: it broke" in capsys.readouterr().err


def test_search_goes_on_where_a_program_cannot_be_read(recipe_file, fake_step, capsys, monkeypatch):
    wrong = [hlo.unreadable("it is written in another way")]

    def check(*_):
        if wrong:
            raise wrong.pop()

    monkeypatch.setattr(compiler, "missing_extra", lambda: "")
    monkeypatch.setattr(compiler, "compile_step", lambda *_: fake_step(10**9))
    monkeypatch.setattr(hlo_checks, "check", check)
    assert plan.main([f"--config={recipe_file}", "--gpus=8", "--search", "--n-compiled=2"]) == 0
    assert "it is written in another way" in capsys.readouterr().out


def test_search_says_so_where_nothing_fits(repository, capsys):
    args = ["--gpus=8", "--search", "--no-compile"]
    assert plan.main([f"--config={repository / 'configs' / '175b.py'}", *args]) == 2
    assert "no layout of this model fits --gpus=8" in capsys.readouterr().err
