"""The search: its layouts fit, and it goes on where one fails."""

import json
import types

import pytest

from gpt3jax import errors
from gpt3jax.config import layout, recipe
from gpt3jax.hardware import gpus
from gpt3jax.plan import __main__ as plan
from gpt3jax.plan import (
    compiled_search,
    compiler,
    hlo,
    hlo_checks,
    memory_model,
    placement,
    ranking,
    search,
    step_choice,
)

H100 = gpus.GPUS["h100"]


def candidates_of(file, batch_size=16, n_gpus=8, options=()):
    cfg = recipe.parse([f"--config={file}", "--data.mock", *options])
    return search.candidates(cfg, batch_size, n_gpus, H100, gpus.network_of(H100))


def test_searched_layouts_fit_and_their_options_give_them(auto_file):
    candidates = candidates_of(auto_file)
    assert len(candidates) > 50
    seconds = [candidate.seconds for candidate in candidates]
    assert seconds == pytest.approx(sorted(seconds), rel=1e-4)  # equal ones by memory
    queue = search.Queue(candidates, H100)
    for candidate in (queue.next() for _ in range(20)):
        options = step_choice.options(16, candidate.fields)
        again = recipe.parse([f"--config={auto_file}", "--data.mock", *options])
        assert again == candidate.cfg
        placed = placement.lay_out(again, 8, 8)
        assert placed.sizes == candidate.layout.sizes
        assert sum(memory_model.memory(again, placed).values()) == candidate.peak_bytes
        assert candidate.layout.n_gpus == 8


def test_what_is_given_is_kept_and_the_rest_is_found_around_it(auto_file):
    given = {"mesh.tensor": 2, "mesh.shard_optimizer": True, "batch.microbatch_size": 2}
    candidates = candidates_of(auto_file, options=layout.options(given))
    assert len(candidates) > 10
    assert all(given.items() <= candidate.fields.items() for candidate in candidates)
    assert len({candidate.fields["model.remat"] for candidate in candidates}) > 2


def test_gpus_that_a_small_batch_leaves_over_compute_copies(auto_file):
    """Of a batch smaller than the full one alone."""
    copies = {candidate.fields["mesh.copies"] for candidate in candidates_of(auto_file, 2)}
    assert {1, 2, 4} <= copies
    assert {candidate.fields["mesh.copies"] for candidate in candidates_of(auto_file)} == {1}


def test_a_compiled_peak_corrects_the_closed_forms_of_its_kind(auto_file):
    candidates = candidates_of(auto_file)
    queue = search.Queue(candidates, H100)
    first = queue.next()
    assert first is candidates[0]
    queue.note(first, H100.memory_bytes * 1e6)  # the smallest would not fit either
    rest = list(iter(queue.next, None))
    assert rest and all(candidate.cfg.model.remat != first.cfg.model.remat for candidate in rest)
    meshes = [str(candidate.layout.sizes) for candidate in [first, *rest]]
    assert max(map(meshes.count, meshes)) <= search.PER_MESH


def test_search_prints_options_and_plans_the_fastest(growing_file, tmp_path, capsys):
    file, page = tmp_path / "plan.json", tmp_path / "plan.html"
    args = ["--gpus=8", "--search", "--no-compile", f"--json={file}", f"--html={page}"]
    assert plan.main([f"--config={growing_file}", *args]) == 0
    content, shown, text = json.loads(file.read_text()), capsys.readouterr().out, page.read_text()
    assert "http" not in text.replace("http-equiv", "")  # it needs nothing from elsewhere
    for batch in content["batches"]:
        rows = [row for row in content["search"] if row["batch_size"] == batch["batch_size"]]
        assert len(rows) == 4 and rows[0]["layout"] == batch["layout"]
        assert rows[0]["step_seconds"] <= ranking.NEAR * min(row["step_seconds"] for row in rows)
        assert batch["step_seconds"] == rows[0]["step_seconds"]
        assert " ".join(rows[0]["overrides"]) in shown
        assert " ".join(rows[0]["overrides"]) in text
    assert content["step_seconds"]["expected"] == content["batches"][-1]["step_seconds"]
    for words in ("Memory of a GPU", "matmul", f"remat {content['step']['remat']}"):
        assert words in text


def test_a_size_keeps_the_layout_of_the_one_before_where_it_is_near(fake_candidates):
    slow, near, fast = fake_candidates(1.2, 1.02, 1.0)
    ordered = [fast, near, slow]
    assert ranking.first_choice(ordered, near.fields) is near
    assert ranking.first_choice(ordered, slow.fields) is fast
    assert ranking.first_choice(ordered, {}) is fast


def test_a_search_keeps_the_layout_of_the_size_before_where_its_compiled_step_is_near(
    growing_file, fake_step, tmp_path, monkeypatch
):
    """All compiled steps take equally long here; closed forms would change the microbatch."""
    monkeypatch.setattr(compiler, "missing_extra", lambda: "")
    monkeypatch.setattr(compiler, "compile_step", lambda *_: fake_step(10**9))
    monkeypatch.setattr(hlo_checks, "check", lambda *_: None)
    monkeypatch.setattr(ranking, "NEAR", 10.0)  # closed forms try it first, whatever they say
    file = tmp_path / "plan.json"
    args = [f"--config={growing_file}", "--gpus=4", "--search", f"--json={file}"]
    assert plan.main([*args, "--n-compiled=3"]) == 0
    content = json.loads(file.read_text())
    before, *others = [row["layout"] for row in content["batches"]]
    assert others == [before, before]
    assert len({str(row["layout"]) for row in content["search"] if row["batch_size"] == 16}) == 3


def test_compiled_steps_are_ranked_by_what_fits_then_by_time(fake_candidates):
    def tried(candidate, seconds, *, fits=True):
        time = types.SimpleNamespace(step_seconds=types.SimpleNamespace(expected=seconds))
        step = types.SimpleNamespace(peak=types.SimpleNamespace(fits=fits), time=time)
        return compiled_search._Tried(candidate=candidate, step=step)

    a, b, c, d = fake_candidates(1.0, 1.0, 1.0, 1.0)
    failed = compiled_search._Tried(candidate=d, step=None, failed="it broke")
    rows = [failed, tried(a, 0.5, fits=False), tried(b, 1.02), tried(c, 1.0)]

    def order(before):
        return [each.candidate for each in compiled_search._best_first(rows, before)]

    assert order({}) == order(a.fields) == order(d.fields) == [c, b, a, d]
    assert order(b.fields) == [b, c, a, d]
    rows[2] = tried(b, 1.04)
    assert order(b.fields) == [c, b, a, d]


@pytest.fixture
def fake_candidates(auto_file):
    """Return a function that makes candidates of these seconds."""

    def make(*seconds):
        some = candidates_of(auto_file)
        return [
            search.Candidate(cfg=one.cfg, layout=one.layout, peak_bytes=1.0, seconds=s)
            for one, s in zip(some, seconds, strict=False)
        ]

    return make


def test_search_goes_on_after_a_failed_compile_and_while_nothing_fits(
    auto_file, fake_step, tmp_path, capsys, monkeypatch
):
    answers, known = [], {}

    def compile_step(cfg, args, sizes, gpu, network):
        key = str(layout.of(cfg))
        if key not in known:
            known[key] = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(known[key], Exception):
            raise known[key]
        return known[key]

    def plan_again(*new_answers):
        answers[:] = new_answers
        known.clear()
        file = tmp_path / "plan.json"
        args = [f"--config={auto_file}", "--gpus=8", "--search", "--verify", f"--json={file}"]
        return plan.main([*args, "--n-compiled=1"]), file

    monkeypatch.setattr(compiler, "missing_extra", lambda: "")
    monkeypatch.setattr(compiler, "compile_step", compile_step)
    monkeypatch.setattr(hlo_checks, "check", lambda *_: None)
    broke = errors.UserError("it broke", page="plan.md")
    status, file = plan_again(broke, *[fake_step(10**12)] * 2, fake_step(10**9))
    assert status == 0
    rows = json.loads(file.read_text())["search"]
    assert [row["fits"] for row in rows] == [True, False, False, False]
    assert [bool(row["failed"]) for row in rows] == [False, False, False, True]
    assert "(it broke)" in capsys.readouterr().out

    status, file = plan_again(fake_step(10**12))
    assert status == 1
    assert len(json.loads(file.read_text())["search"]) == 1 + compiled_search.MORE_COMPILED
    assert "It does not fit" in capsys.readouterr().out

    assert plan_again(broke)[0] == 2
    assert "none of 5 layouts compiled: it broke" in capsys.readouterr().err


def test_search_goes_on_where_a_program_cannot_be_read(auto_file, fake_step, capsys, monkeypatch):
    wrong = [hlo.unreadable("it is written in another way")]

    def check(*_):
        if wrong:
            raise wrong.pop()

    monkeypatch.setattr(compiler, "missing_extra", lambda: "")
    monkeypatch.setattr(compiler, "compile_step", lambda *_: fake_step(10**9))
    monkeypatch.setattr(hlo_checks, "check", check)
    assert plan.main([f"--config={auto_file}", "--gpus=8", "--search", "--n-compiled=2"]) == 0
    assert "it is written in another way" in capsys.readouterr().out


@pytest.mark.parametrize("search", [[], ["--search"]])
def test_a_plan_says_so_where_nothing_fits(repository, search, capsys):
    args = ["--gpus=2", "--no-compile", "--batch.schedule=", *search]
    assert plan.main([f"--config={repository / 'configs' / 'gpt3/13b.py'}", *args]) == 2
    assert "no layout of this model fits 2 x NVIDIA H100" in capsys.readouterr().err
