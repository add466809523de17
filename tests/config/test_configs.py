"""Every recipe: valid, runnable on the GPUs that it names, and written down as a golden text.

After a change on purpose: `GPT3JAX_UPDATE_GOLDENS=1 pytest tests/config/test_configs.py`, and read
the diff of tests/golden/configs.
"""

import dataclasses
import os
import pathlib
import re

import pytest

from gpt3jax import errors
from gpt3jax.config import batch_schedule, layout, recipe, schema, unused_fields, validation
from gpt3jax.hardware import flops, gpus
from gpt3jax.plan import memory_model, placement, ranking, search

import tiny

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
GOLDENS = pathlib.Path(__file__).parents[1] / "golden" / "configs"
RECIPES = sorted(p.relative_to(CONFIGS).with_suffix("").as_posix() for p in CONFIGS.rglob("*.py"))
EXAMPLES = ["175b", "175b_tp8_pp16", "345m", "857m"]
SEARCHED = ["175b_fsdp512_tp2"]
FOR_ONE_POD = ["quickstart", "175b_fsdp512_tp2", "175b_tp8_pp16"]
SIZES = ["125m", "350m", "760m", "1_3b", "2_7b", "6_7b", "13b", "175b"]
PAPER = [f"gpt3/{size}" for size in SIZES]


def path_of(name):
    return CONFIGS / f"{name}.py"


def docstring(name):
    return path_of(name).read_text().split('"""')[1]


def ready(name):
    """Return a recipe's config, with a corpus where the user has to give one."""
    cfg = recipe.load(str(path_of(name)))
    paths = cfg.data.paths or ("corpus",)
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, paths=paths))


def meant_for(name, cfg):
    """Return the numbers of devices that the docstring names."""
    if cfg.mesh.cpu_devices:
        return [cfg.mesh.cpu_devices]
    first = re.search(r"^Meant for ((?:\d+, )*\d+(?: or \d+)?)", docstring(name), re.MULTILINE)
    return [int(n) for n in re.findall(r"\d+", first[1])]


def layouts_of(cfg, n_gpus):
    """Return the layouts of each batch size on so many H100, and what is said about idle ones."""
    said, h100 = [], gpus.GPUS["h100"]
    network = gpus.network_of(h100)
    return ranking.all_candidates(cfg, n_gpus, h100, network, said.append), said


def smallest_steps(cfg):
    """Return a config around whose fields fewer layouts are found, of the least memory."""
    asked = {"model.remat": "full", "batch.microbatch_size": 1, "mesh.virtual_stages": 1}
    return layout.with_layout(cfg, {k: asked[k] for k in asked if k in layout.automatic(cfg)})


def test_the_recipes_are_these():
    assert sorted(RECIPES) == sorted(["quickstart", *EXAMPLES, *SEARCHED, *PAPER])


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_valid_and_a_function_of_nothing(name):
    validation.validate(ready(name))
    assert unused_fields.without_effect(ready(name)) == []
    assert recipe.load(str(path_of(name))) == recipe.load(str(path_of(name)))


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_names_its_source_its_devices_and_its_aim(name):
    for part in ("Source: ", "Meant for ", "Should reach"):
        assert part in docstring(name)


@pytest.mark.parametrize("name", RECIPES)
def test_every_batch_has_a_layout_on_the_devices_that_the_recipe_names(name):
    cfg = ready(name)
    for n_devices in meant_for(name, cfg):
        if cfg.mesh.cpu_devices:
            placement.lay_out(layout.plain(cfg), n_devices, n_devices)
            continue
        found, said = layouts_of(smallest_steps(cfg), n_devices)
        assert list(found) == search.batch_sizes(cfg) and all(found.values())
        assert not said, "GPUs idle"


@pytest.mark.parametrize("n_gpus", [8, 64, 100, 256, 1000, 1024])
@pytest.mark.parametrize("name", [name for name in RECIPES if name not in FOR_ONE_POD])
def test_every_batch_has_a_layout_on_any_pod_that_is_large_enough(name, n_gpus):
    cfg = ready(name)
    states = 16 * flops.n_params(cfg.model) / n_gpus  # fp32 weights, gradients, two moments
    if states > memory_model.pool(gpus.GPUS["h100"]):
        with pytest.raises(errors.UserError, match=f"fits {n_gpus} x .* use more GPUs"):
            layouts_of(smallest_steps(cfg), n_gpus)
        return
    found, said = layouts_of(smallest_steps(cfg), n_gpus)
    assert list(found) == search.batch_sizes(cfg) and all(found.values())
    used = {candidate.layout.n_gpus for rows in found.values() for candidate in rows}
    assert len(used) == 1 and n_gpus / 2 <= used.pop() <= n_gpus
    assert bool(said) == (n_gpus in (100, 1000))


@pytest.mark.parametrize("name", PAPER)
def test_the_ramp_that_a_recipe_advises_runs_on_the_devices_that_it_names(name):
    advice = re.search(r"over (\d+)B tokens: `([^`]+)`", docstring(name))
    cfg = recipe.parse([f"--config={path_of(name)}", "--data.paths=corpus", *advice[2].split()])
    schedule = batch_schedule.from_config(cfg.batch, cfg.model.seq_len)
    [n_gpus] = meant_for(name, cfg)
    found, said = layouts_of(smallest_steps(cfg), n_gpus)
    assert not said and len(found) == len(schedule.stages) > 2
    assert len(schedule.stages) <= 12  # one compilation each
    n_tokens = cfg.batch.ramp[2] * cfg.model.seq_len
    assert n_tokens == pytest.approx(int(advice[1]) * 1e9, rel=1e-6)


def test_flattened_recipes_are_the_golden_ones(recipe_texts):
    if os.environ.get("GPT3JAX_UPDATE_GOLDENS"):
        write_goldens(recipe_texts)
    golden = {
        p.relative_to(GOLDENS).with_suffix("").as_posix(): p.read_text()
        for p in GOLDENS.rglob("*.txt")
    }
    assert recipe_texts == golden


@pytest.fixture
def recipe_texts():
    flat = {name: schema.flatten(recipe.load(str(path_of(name)))) for name in RECIPES}
    return {
        name: "".join(f"{field} = {value!r}\n" for field, value in fields.items())
        for name, fields in flat.items()
    }


def write_goldens(texts):
    for old in GOLDENS.rglob("*.txt"):
        old.unlink()
    for name, text in texts.items():
        file = GOLDENS / f"{name}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


# With the vocabulary padded to 50,304 (quickstart: 4,096) and learned positions.
N_PARAMS = {
    "quickstart": 1_334_016,
    "345m": 64_109_568,
    "857m": 355_919_872,
    "175b": 174_604_836_864,
    "175b_fsdp512_tp2": 174_604_836_864,
    "175b_tp8_pp16": 174_604_836_864,
    "gpt3/125m": 125_262_336,
    "gpt3/350m": 355_919_872,
    "gpt3/760m": 760_372_224,
    "gpt3/1_3b": 1_315_819_520,
    "gpt3/2_7b": 2_651_673_600,
    "gpt3/6_7b": 6_658_596_864,
    "gpt3/13b": 12_853_626_880,
    "gpt3/175b": 174_604_836_864,
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_have_their_true_parameter_counts(name):
    cfg = layout.plain(ready(name)).model
    assert tiny.count_params(cfg) == flops.n_params(cfg) == N_PARAMS[name]
