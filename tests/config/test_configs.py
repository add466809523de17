"""Every recipe: valid, runnable on the GPUs that it names, and written down as a golden text.

After a change on purpose: `GPT3JAX_UPDATE_GOLDENS=1 pytest tests/config/test_configs.py`, and read
the diff of tests/golden/configs.
"""

import dataclasses
import math
import os
import pathlib
import re

import pytest

from gpt3jax import errors
from gpt3jax.config import batch_schedule, recipe, schema, unused_fields, validation
from gpt3jax.hardware import flops

import tiny

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
GOLDENS = pathlib.Path(__file__).parents[1] / "golden" / "configs"
RECIPES = sorted(p.relative_to(CONFIGS).with_suffix("").as_posix() for p in CONFIGS.rglob("*.py"))
EXAMPLES = ["175b", "175b_tp8_pp16", "345m", "857m"]
SEARCHED = ["175b_fsdp512_tp2"]
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


def data_parallel_size(mesh, n_devices):
    """Return data x fsdp of a mesh over n_devices; all of them must be used."""
    sizes = [mesh.data, mesh.stage, mesh.fsdp, mesh.context, mesh.tensor]
    fixed = math.prod(size for size in sizes if size != -1)
    assert n_devices % fixed == 0 if -1 in sizes else n_devices == fixed
    return n_devices // (mesh.stage * mesh.context * mesh.tensor)


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
def test_every_batch_divides_over_the_devices_that_the_recipe_names(name):
    cfg = ready(name)
    schedule = batch_schedule.from_config(cfg.batch, cfg.model.seq_len)
    for n_devices in meant_for(name, cfg):
        n_ranks = data_parallel_size(cfg.mesh, n_devices)
        batch_schedule.check(schedule, cfg.batch.microbatch_size, n_ranks)


@pytest.mark.parametrize("name", PAPER)
def test_the_ramp_that_a_recipe_advises_runs_on_the_devices_that_it_names(name):
    advice = re.search(r"on (\d+) GPUs, over (\d+)B tokens:\s`([^`]+)`", docstring(name))
    flags = [f"--config={path_of(name)}", "--data.paths=corpus", *advice[3].split()]
    cfg = recipe.parse(flags)
    schedule = batch_schedule.from_config(cfg.batch, cfg.model.seq_len)
    n_ranks = data_parallel_size(cfg.mesh, int(advice[1]))
    batch_schedule.check(schedule, cfg.batch.microbatch_size, n_ranks)
    assert len(schedule.stages) <= 12  # one compilation each
    n_tokens = cfg.batch.ramp[2] * cfg.model.seq_len
    assert n_tokens == pytest.approx(int(advice[2]) * 1e9, rel=1e-6)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_fits_no_more_ranks_than_its_first_batch(name):
    cfg = ready(name)
    schedule = batch_schedule.from_config(cfg.batch, cfg.model.seq_len)
    with pytest.raises(errors.UserError, match="batch of 16 from sample 0"):
        batch_schedule.check(schedule, cfg.batch.microbatch_size, 32)


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
    cfg = ready(name).model
    assert tiny.count_params(cfg) == flops.n_params(cfg) == N_PARAMS[name]
