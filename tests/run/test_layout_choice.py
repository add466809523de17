"""Which layout a run takes: given, from a file, kept, found; and the first that fits."""

import json
import types

import jax
import pytest

from gpt3jax import errors
from gpt3jax.config import layout, recipe, schema
from gpt3jax.hardware import gpus
from gpt3jax.plan import ranking
from gpt3jax.run import layout_choice
from gpt3jax.watch import phases

import tiny

AUTO = schema.Mesh()
H100 = types.SimpleNamespace(
    platform="gpu", device_kind="NVIDIA H100 80GB HBM3", compute_capability="9.0"
)


def config(**groups):
    """Return a tiny config whose mesh is to be found."""
    cfg = tiny.make_config(data={"paths": (), "mock": True}, **groups)
    mesh = dict.fromkeys(layout.FIELDS, schema.AUTO)
    return layout.with_layout(cfg, mesh | {"model.remat": "full"})


def ranked(*rows):
    """Return a ranking of layouts of one batch of 16; fields not named change nothing."""
    plain = layout.plain_fields(config()) | {"model.remat": "full", "mesh.data": 1}
    by_size = {16: [ranking.Ranked(fields=plain | fields) for fields in rows]}
    return ranking.Ranking(
        origin="a test", n_devices=8, device="cpu", given={"model.remat": "full"}, by_size=by_size
    )


def choice_of(*rows, cfg=None):
    return layout_choice.Choice(
        given=cfg or config(),
        ranking=ranked(*rows),
        lines=(),
        before_compiling=lambda *_: None,
    )


WHOLE, SHARDED = {"mesh.data": 8}, {"mesh.fsdp": 8}


def needs_of(choice):
    """Return the compiled bytes of each layout of a choice."""
    found = []
    for row in choice.ranking.by_size[16]:
        laid = layout_choice._build(choice.given, row.fields, 320, None)
        found.append(layout_choice._compiled_bytes(choice, laid, 16, phases.Phases(), print))
    return found


def lay_out(choice, monkeypatch, limit):
    said = []
    monkeypatch.setattr(layout_choice, "memory_limit", lambda: limit)
    left, laid = layout_choice.lay_out(choice, 16, 320, phases.Phases(), said.append)
    return left, laid, "\n".join(said)


def test_the_first_layout_whose_compiled_step_fits_is_taken(monkeypatch):
    choice = choice_of(WHOLE, SHARDED)
    whole, sharded = needs_of(choice)
    assert sharded < 0.8 * whole
    left, laid, said = lay_out(choice, monkeypatch, limit=2 * whole)
    assert laid.mesh.shape["data"] == 8 and len(left.ranking.by_size[16]) == 2
    left, laid, said = lay_out(choice, monkeypatch, limit=int(0.99 * whole))
    assert laid.mesh.shape["fsdp"] == 8 and laid.cfg.mesh.fsdp == 8
    assert "WARNING: data 8, microbatch 1, remat full needs" in said
    assert [row.fields["mesh.fsdp"] for row in left.ranking.by_size[16]] == [8]


def test_where_none_fits_the_message_says_what_the_nearest_needs(monkeypatch):
    choice = choice_of(WHOLE, SHARDED)
    _, sharded = needs_of(choice)
    _, laid, _ = lay_out(choice, monkeypatch, limit=sharded)  # without anything to spare
    assert laid.mesh.shape["fsdp"] == 8
    needed = f"the nearest, fsdp 8, microbatch 1, remat full, needs {sharded / 2**30:.1f} GiB"
    with pytest.raises(errors.UserError, match=needed):
        lay_out(choice, monkeypatch, limit=sharded - 1)


def test_a_layout_that_was_given_is_refused_only_where_it_cannot_fit(monkeypatch):
    choice = choice_of(WHOLE)
    [needed] = needs_of(choice)
    assert lay_out(choice, monkeypatch, limit=needed)[1].mesh.shape["data"] == 8
    with pytest.raises(errors.UserError, match="no layout fits into"):
        lay_out(choice, monkeypatch, limit=needed - 1)


def test_a_compiler_that_runs_out_of_memory_makes_the_run_take_the_next(monkeypatch):
    def compile_step(on_mesh, *args):
        if on_mesh.mesh.shape["data"] == 8:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 90 GiB")
        return 1000

    monkeypatch.setattr("gpt3jax.step.OnMesh.compile", compile_step)
    _, laid, said = lay_out(choice_of(WHOLE, SHARDED), monkeypatch, limit=2000)
    assert laid.mesh.shape["fsdp"] == 8 and "needs inf GiB" in said


def test_programs_are_compared_before_they_are_compiled(monkeypatch):
    compared = []
    choice = choice_of(WHOLE)
    choice = layout_choice.Choice(
        given=choice.given, ranking=choice.ranking, lines=(),
        before_compiling=lambda built, cfg, size: compared.append((cfg.mesh.data, size)),
    )  # fmt: skip
    lay_out(choice, monkeypatch, limit=1 << 40)
    assert compared == [(8, 16)]


def test_on_cpus_auto_is_data_parallelism():
    found = layout_choice.decide(config(), dict).ranking
    assert found.origin == "data parallelism where nothing is given"
    assert found.by_size[16][0].fields["mesh.data"] == 8
    cfg = layout.with_layout(config(), {"mesh.tensor": 4})
    assert layout_choice.decide(cfg, dict).ranking.by_size[16][0].fields["mesh.data"] == 2


def on_gpus(monkeypatch, n):
    monkeypatch.setattr(jax, "device_count", lambda: n)
    monkeypatch.setattr(jax, "devices", lambda: [H100] * n)
    monkeypatch.setattr(layout_choice.joining, "check_all_work", lambda n: None)


def found_on(monkeypatch, n, cfg, kept=dict):
    on_gpus(monkeypatch, n)
    monkeypatch.setattr(layout_choice, "_devices_per_node", lambda timeout: 8)
    return layout_choice.decide(cfg, kept).ranking


@pytest.fixture
def recipe_13b(repository):
    return recipe.parse([f"--config={repository}/configs/gpt3/13b.py", "--data.mock"])


def test_on_gpus_the_plans_closed_forms_find_it(recipe_13b, monkeypatch):
    found = found_on(monkeypatch, 64, recipe_13b)
    h100 = gpus.find("h100")
    planned = ranking.find(recipe_13b, 64, h100, gpus.network_of(h100))
    assert found.by_size == planned.by_size and found.device == H100.device_kind


def test_what_was_given_is_kept_and_the_rest_is_found_around_it(recipe_13b, monkeypatch):
    cfg = layout.with_layout(recipe_13b, {"mesh.tensor": 8, "model.remat": "full"})
    for rows in found_on(monkeypatch, 64, cfg).by_size.values():
        for row in rows:
            assert (row.fields["mesh.tensor"], row.fields["model.remat"]) == (8, "full")
            assert layout.n_devices(row.fields) == 64


def test_a_resumed_run_keeps_its_layouts_until_something_changes(recipe_13b, monkeypatch):
    before = found_on(monkeypatch, 64, recipe_13b)
    second = {size: rows[1:] for size, rows in before.by_size.items()}  # the first did not fit
    stored = json.loads(json.dumps(ranking.as_json(before) | {
        "by_size": {k: [vars(r) for r in v] for k, v in second.items()}
    }))  # fmt: skip
    kept = found_on(monkeypatch, 64, recipe_13b, lambda: stored)
    assert kept.origin == "as before" and kept.by_size == second
    fewer = found_on(monkeypatch, 32, recipe_13b, lambda: stored)
    assert fewer.n_devices == 32 and fewer.origin == "found by closed forms"
    told = layout.with_layout(recipe_13b, {"mesh.tensor": 2})
    assert found_on(monkeypatch, 64, told, lambda: stored).origin == "found by closed forms"


def test_devices_that_idle_are_named(recipe_13b, monkeypatch):
    on_gpus(monkeypatch, 100)
    monkeypatch.setattr(layout_choice, "_devices_per_node", lambda timeout: 8)
    choice = layout_choice.decide(recipe_13b, dict)
    [line] = choice.lines
    assert "of 100 devices idle" in line and choice.ranking.n_used <= 96
    assert line in layout_choice.table(choice)
