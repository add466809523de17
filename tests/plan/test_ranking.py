"""The layouts of a run: found, given, or from a file that a plan wrote."""

import dataclasses
import json

import pytest

from gpt3jax import errors
from gpt3jax.config import layout, recipe
from gpt3jax.hardware import gpus
from gpt3jax.plan import __main__ as plan
from gpt3jax.plan import placement, ranking

H100 = gpus.GPUS["h100"]


def layouts_of(file, *options, n_gpus=8, say=lambda line: None):
    cfg = recipe.parse([f"--config={file}", "--data.mock", *options])
    return ranking.of_config(cfg, n_gpus, H100, gpus.network_of(H100), say)


@pytest.fixture
def stored(growing_file, tmp_path):
    """A file of layouts for 8 GPUs."""
    file = tmp_path / "layouts.json"
    args = [f"--config={growing_file}", "--gpus=8", "--no-compile", f"--write-layouts={file}"]
    assert plan.main(args) == 0
    return file


def test_the_file_that_a_plan_writes_is_what_is_read(growing_file, stored):
    found = layouts_of(growing_file)
    again = layouts_of(growing_file, f"--layouts={stored}")
    assert again.origin == str(stored)
    assert list(again.by_size) == [4, 8, 16]
    for size, rows in again.by_size.items():
        assert [row.fields for row in rows] == [row.fields for row in found.by_size[size]]
        assert rows[0].step_seconds == pytest.approx(found.by_size[size][0].step_seconds)
    assert (again.n_devices, again.device) == (8, H100.name)


def test_a_file_has_what_a_search_compared(growing_file, tmp_path):
    file = tmp_path / "layouts.json"
    args = [f"--config={growing_file}", "--gpus=8", "--no-compile", "--search", "--n-compiled=3"]
    assert plan.main([*args, f"--write-layouts={file}", f"--json={tmp_path / 'plan.json'}"]) == 0
    rows = json.loads((tmp_path / "plan.json").read_text())["search"]
    for size, ranked in layouts_of(growing_file, f"--layouts={file}").by_size.items():
        tried = [row["layout"] for row in rows if row["batch_size"] == size]
        assert len(tried) == 3 and [row.fields for row in ranked][:3] == tried
        smaller = [row.peak_bytes for row in (ranked[0], *ranked[3:])]
        assert len(smaller) > 1 and smaller == sorted(smaller, reverse=True)


def test_a_file_has_only_what_is_given_too(growing_file, stored):
    fields = layouts_of(growing_file).by_size[16][-1].fields
    option = f"--model.remat={fields['model.remat']}"
    kept = layouts_of(growing_file, f"--layouts={stored}", option)
    for rows in kept.by_size.values():
        assert {row.fields["model.remat"] for row in rows} == {fields["model.remat"]}


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda text: "", [], "write it with gpt3jax.plan"),
        (lambda text: text[: len(text) // 2], [], "write it with gpt3jax.plan"),
        (lambda text: "[]", [], "has no layouts"),
        (lambda text: text.replace("by_size", "sizes"), [], "has no layouts"),
        (lambda text: text.replace("step_seconds", "seconds"), [], "has no layouts"),
        (lambda text: text.replace("model.remat", "model.rematerialize"), [], "model.remat"),
        (lambda text: text.replace('"mesh.stage": ', '"mesh.stage": 0.'), [], "mesh.stage"),
        (lambda text: text, ["--batch.schedule=0:2 1M:16"], "no layout for a batch of 2"),
        (lambda text: text, ["--mesh.context=8"], "with mesh.context=8, as given"),
    ],
)
def test_a_file_that_does_not_serve_is_an_error(change, options, message, growing_file, stored):
    stored.write_text(change(stored.read_text()))
    with pytest.raises(errors.UserError, match=message) as error:
        layouts_of(growing_file, f"--layouts={stored}", *options)
    assert str(stored) in str(error.value)


def test_a_file_for_other_devices_is_an_error(growing_file, stored):
    with pytest.raises(errors.UserError, match="is for 8 devices, and here are 16"):
        layouts_of(growing_file, f"--layouts={stored}", n_gpus=16)


def test_a_layout_that_is_given_is_that_of_all_batch_sizes(recipe_file):
    given = layouts_of(recipe_file, "--batch.schedule=0:4 1M:16")
    assert list(given.by_size) == [4, 16]
    [fields] = {tuple(row.fields.items()) for [row] in given.by_size.values()}
    assert dict(fields)["mesh.data"] == 2  # the rest of 8 / (2 x 2)
    assert given.given == {k: v for k, v in fields if k != "mesh.data"}


def test_gpus_that_idle_are_told(auto_file, recipe_file, tmp_path):
    said = []
    assert layouts_of(auto_file, n_gpus=20, say=said.append).n_used == 16
    assert "4 of 20 devices idle, numbers 16 to 19" in said.pop()
    given = layouts_of(recipe_file, n_gpus=20, say=said.append)
    assert (given.n_devices, given.n_used) == (20, 16)
    assert "4 of 20 devices idle, numbers 16 to 19: they fill no node of 8" in said.pop()
    file = tmp_path / "layouts.json"
    file.write_text(json.dumps(ranking.as_json(given)))
    assert layouts_of(auto_file, f"--layouts={file}", n_gpus=20, say=said.append).n_used == 16
    assert "4 of 20 devices idle" in said.pop()
    assert layouts_of(auto_file, n_gpus=16, say=said.append).n_used == 16 and not said


def test_a_model_that_fits_on_fewer_gpus_leaves_the_others_idle(repository):
    """On 96 GPUs a batch of 928 would need stages: 3 x 32 ranks do not divide it."""
    said = []
    option = "--batch.schedule=0:928 1B:1536"
    kept = ["--model.remat=full", "--batch.microbatch-size=1", "--mesh.virtual-stages=1"]
    file = repository / "configs" / "175b.py"
    assert layouts_of(file, option, *kept, n_gpus=100, say=said.append).n_used == 64
    [line] = said
    assert "36 of 100 devices idle, numbers 64 to 99" in line and "64 and 128" in line


@pytest.mark.parametrize(
    ("n_gpus", "whole"), [(1, 1), (7, 7), (8, 8), (9, 8), (100, 96), (1024, 1024)]
)
def test_only_whole_nodes_work(n_gpus, whole, recipe_file):
    assert placement.in_whole_nodes(n_gpus, 8) == whole
    if n_gpus != whole:
        cfg = layout.plain(recipe.load(recipe_file))
        cfg = dataclasses.replace(cfg, mesh=dataclasses.replace(cfg.mesh, fsdp=1, tensor=1))
        with pytest.raises(errors.UserError, match=f"{n_gpus} GPUs fills no whole nodes"):
            placement.lay_out(cfg, n_gpus, 8)
