"""What reaches a config from a recipe and the command line, and what is refused, in which words."""

import ast
import contextlib
import dataclasses
import inspect
import json
import math
import re
import threading
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt3jax import errors, optimizer
from gpt3jax.config import batch_schedule, layout, ranges, recipe, schema, unused_fields, validation
from gpt3jax.hardware import flops
from gpt3jax.plan import memory_model, placement
from gpt3jax.run import numerical_faults

import documents

RECIPE = """
from gpt3jax import config

def get_config():
    return config.Config(
        model=config.Model(n_layers=2, d_model=64, n_heads=4, seq_len=32, vocab_size=500),
        optimizer=config.Optimizer(peak_lr=1e-3),
        batch=config.Batch(global_batch_size=8),
        data=config.Data(paths=("corpus",), eod_id=0),
        train=config.Train(n_steps=20),
    )
"""


@pytest.fixture
def recipe_file(tmp_path):
    file = tmp_path / "recipe.py"
    file.write_text(RECIPE)
    return file


@pytest.fixture
def valid(recipe_file):
    return recipe.load(str(recipe_file))


@pytest.fixture
def parse(recipe_file):
    return lambda *overrides: recipe.parse([f"--config={recipe_file}", *overrides])


def set_field(cfg, name, value):
    """Return the config with the field of this dotted name replaced."""
    group, _, rest = name.partition(".")
    new = set_field(getattr(cfg, group), rest, value) if rest else value
    return dataclasses.replace(cfg, **{group: new})


def test_overrides_reach_every_depth_and_leave_the_rest(parse, valid):
    cfg = parse(
        "--model.attention.band", "7", "--optimizer.peak-lr=3e-4", "--batch.ramp", "2", "2", "99",
        "--data.eod-mask-loss", "--log.dir", "logs", "--precision.compute-dtype=float32",
    )  # fmt: skip
    given = {
        "model.attention.band": 7,
        "optimizer.peak_lr": 3e-4,
        "batch.ramp": (2, 2, 99),
        "data.eod_mask_loss": True,
        "log.dir": "logs",
        "precision.compute_dtype": "float32",
    }
    assert schema.flatten(cfg) == schema.flatten(valid) | given


def test_a_recipe_may_be_given_as_two_words(recipe_file, valid):
    assert recipe.parse(["--config", str(recipe_file)]) == valid


def test_a_typo_names_the_nearest_field(parse, capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--optimizer.peak-lrr", "1")
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert "--optimizer.peak-lrr" in told
    assert re.search(r"--optimizer\.peak-lr FLOAT", told)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("--model.remat=half", ("--model.remat", "half", "none", "mlp", "full")),
        ("--model.n-layers=two", ("--model.n-layers", "two")),
        ("--train.n-steps=1.5", ("--train.n-steps", "1.5")),
    ],
)
def test_an_ill_typed_value_names_field_value_and_choices(parse, capsys, override, told):
    with pytest.raises(SystemExit):
        parse(override)
    err = capsys.readouterr().err
    assert all(word in err for word in told)


def test_help_shows_every_field_with_its_docstring(parse, valid, capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    text = re.sub(r"[\s│]", "", capsys.readouterr().out)
    for name in schema.flatten(valid):
        assert f"--{name.replace('_', '-')}" in text
    docs = field_docstrings()
    assert len(docs) == len(schema.flatten(valid))
    for doc in docs:
        assert re.sub(r"\s", "", doc) in text


def field_docstrings():
    """Return the string under each field that is not a group."""
    classes = [n for n in ast.parse(inspect.getsource(schema)).body if isinstance(n, ast.ClassDef)]
    docs = []
    for node in classes:
        for field, after in zip(node.body, node.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr):
                docs.append(after.value.value)
    return docs


def test_help_needs_no_recipe(capsys):
    with pytest.raises(SystemExit) as stop:
        recipe.parse(["--help"])
    assert stop.value.code == 0
    assert "--model.n-layers" in capsys.readouterr().out


def test_no_recipe_names_the_option():
    with pytest.raises(errors.UserError, match="add --config=FILE"):
        recipe.parse(["--model.n-layers=2"])


def test_a_missing_recipe_lists_those_beside_it(recipe_file):
    (recipe_file.parent / "other.py").touch()
    with pytest.raises(errors.UserError, match=r"recipes in .*: other\.py, recipe\.py") as error:
        recipe.parse([f"--config={recipe_file.parent / 'recip.py'}"])
    assert "recip.py: no such file" in str(error.value)
    with pytest.raises(errors.UserError, match=r"recipes in .*: none"):
        recipe.load(str(recipe_file.parent / "nowhere" / "recipe.py"))


def test_a_folder_as_recipe_lists_those_in_it(recipe_file):
    (recipe_file.parent / "config.json").touch()
    with pytest.raises(errors.UserError) as error:
        recipe.load(str(recipe_file.parent))
    assert "a folder, but not a checkpoint: name a file" in str(error.value)
    assert f"(recipes in {recipe_file.parent}: config.json, recipe.py)" in str(error.value)


@pytest.mark.parametrize(
    "written", [lambda flat: flat, lambda flat: flat | {"history": [{"step": 3}]}]
)
def test_a_runs_own_config_stands_in_place_of_a_recipe(parse, tmp_path, written):
    cfg = parse("--batch.ramp", "2", "2", "99", "--model.attention.band=7")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(written(schema.flatten(cfg))))
    assert recipe.parse([f"--config={file}"]) == cfg
    assert recipe.parse([f"--config={file}", "--train.seed=7"]).train.seed == 7


def test_a_checkpoints_config_stands_in_place_of_a_recipe(valid, tmp_path):
    (tmp_path / "10" / "meta").mkdir(parents=True)
    meta = {"step": 10, "config": schema.flatten(valid)}
    (tmp_path / "10" / "meta" / "metadata").write_text(json.dumps(meta))
    assert recipe.load(str(tmp_path / "10")) == valid


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model.n_layers": 2}', '{"config": 3}'])
def test_json_that_is_no_config_is_a_user_error(tmp_path, text):
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(errors.UserError, match="give a recipe, a run's config"):
        recipe.load(str(file))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "must define get_config"),
        ("def get_config(): return {}", "returned <class 'dict'>"),
        (
            "from gpt3jax import config\ndef get_config(): return config.Model(n_layer=2)",
            "unexpected keyword argument 'n_layer'",
        ),
    ],
)
def test_a_recipe_without_a_config_is_a_user_error(recipe_file, text, told):
    recipe_file.write_text(text)
    with pytest.raises(errors.UserError) as error:
        recipe.load(str(recipe_file))
    assert told in str(error.value) and str(recipe_file) in str(error.value)


def test_a_config_is_frozen_at_every_depth(valid):
    values = [getattr(valid, field.name) for field in dataclasses.fields(valid)]
    groups = [value for value in values if dataclasses.is_dataclass(value)]
    for group in (valid, valid.model.attention, *groups):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(group, dataclasses.fields(group)[0].name, None)


def test_derived_sizes(valid):
    model = valid.model
    assert (model.d_head, model.d_ff, model.padded_vocab_size) == (16, 256, 512)
    assert dataclasses.replace(model, vocab_size=512).padded_vocab_size == 512


# Overrides that do not go together, and words of the message: fields, values, and the fix.
IN_8_BITS = "--precision.matmul-dtype=float8"
REFUSED = [
    (
        f"{IN_8_BITS} --precision.compute-dtype=float16",
        "precision.matmul_dtype=float8", "precision.compute_dtype=float16", "use bfloat16",
    ),
    (
        f"{IN_8_BITS} --precision.compute-dtype=bfloat16 --precision.end-layers=1",
        "precision.end_layers=1", "model.n_layers=2", "use at most 0",
    ),
    (
        f"{IN_8_BITS} --precision.compute-dtype=bfloat16 --precision.end-layers=1 "
        "--model.n-layers=4 --mesh.stage=2",
        "precision.end_layers=1", "mesh.stage=2", "all stages run one program",
    ),
    ("--model.n-heads=5", "model.n_heads=5", "model.d_model=64", "use one of 1, 2, 4, 8, 16, 32"),
    ("--model.n-loss-chunks=3", "model.n_loss_chunks=3", "model.seq_len=32", "use one of 1, 2, 4"),
    (
        "--data.eod-id=500 --data.reset-position-ids",
        "data.eod_id=500", "model.vocab_size=500", "give the end-of-document token",
    ),
    ("--optimizer.min-lr=2", "optimizer.min_lr=2.0", "exceeds optimizer.peak_lr=0.001: lower it"),
    (
        "--optimizer.warmup-samples=5 --optimizer.warmup-fraction=.1",
        "optimizer.warmup_samples=5", "optimizer.warmup_fraction=0.1", "set one of them to 0",
    ),
    (
        "--optimizer.warmup-samples=9 --optimizer.decay-samples=9",
        "optimizer.warmup_samples=9", "must be below optimizer.decay_samples=9",
    ),
    ("--optimizer.decay=wsd", "optimizer.decay=wsd", "wsd_decay_samples=0", "needs the length"),
    (
        "--optimizer.decay=wsd --optimizer.wsd-decay-samples=9 --optimizer.decay-samples=8",
        "optimizer.wsd_decay_samples=9", "exceeds optimizer.decay_samples=8", "shorten the decay",
    ),
    (
        "--optimizer.decay=wsd --optimizer.wsd-decay-samples=6 --optimizer.warmup-samples=3 "
        "--optimizer.decay-samples=8",
        "wsd_decay_samples=6 after a warm-up of 3 samples takes 9 ", "optimizer.decay_samples=8",
    ),
    ("--optimizer.wsd-decay-samples=9", "decay=cosine", "wsd_decay_samples=9", "only wsd, needs"),
    (
        "--optimizer.start-weight-decay=.5",
        "optimizer.start_weight_decay=0.5", "weight_decay_growth=constant", "linear or cosine",
    ),
    (
        "--precision.compute-dtype=float16 --precision.initial-loss-scale=2 "
        "--precision.min-loss-scale=4",
        "precision.initial_loss_scale=2.0", "precision.min_loss_scale=4.0", "raise it",
    ),
    (
        "--precision.static-loss-scale=8",
        "precision.static_loss_scale=8.0", "precision.compute_dtype=bfloat16", "only float16",
    ),
    (
        "--model.attention.implementation=cudnn",
        "model.attention_dropout=0.1", "implementation=cudnn", "use auto, triton or xla",
    ),
    (
        "--model.attention.implementation=triton --precision.compute-dtype=float32",
        "precision.compute_dtype=float32", "implementation=triton", "bfloat16 or float16, or xla",
    ),
    (
        "--model.attention.implementation=cudnn --model.attention-dropout=0 "
        "--precision.compute-dtype=float32",
        "precision.compute_dtype=float32", "implementation=cudnn", "bfloat16 or float16, or xla",
    ),
    ("--data.from-text t --data.paths a b", "data.paths has 2 entries", "give one prefix"),
    (
        "--mesh.data=-1 --mesh.fsdp=-1",
        "mesh.data and mesh.fsdp are all -1", "only one axis can be the rest",
    ),
    ("--mesh.tensor=3", "mesh.tensor=3", "model.n_heads=4", "use one of 1, 2, 4"),
    (
        "--mesh.tensor=4 --model.vocab-multiple=2 --model.vocab-size=10",
        "mesh.tensor=4", "model.padded_vocab_size=10", "use one of 1, 2, 5, 10",
    ),
    (
        "--mesh.stage=1 --mesh.virtual-stages=2",
        "mesh.virtual_stages=2 has no effect", "set it to 1",
    ),
    ("--train.loss-mean=microbatches", "auto cannot choose it", "--batch.microbatch-size 1"),
    ("--mesh.stage=3", "mesh.stage=3 x mesh.virtual_stages=1", "model.n_layers=2", "one of 1, 2"),
    ("--mesh.context=3", "model.seq_len=32 must be a multiple of 6", "mesh.context=3", "use 36"),
    (
        "--mesh.context=2 --mesh.tensor=4 --model.seq-len=28",
        "model.seq_len=28 must be a multiple of 8", "mesh.tensor=4", "use 32",
    ),
    (
        "--mesh.context=2 --model.n-loss-chunks=32",
        "model.n_loss_chunks=32", "the 16 positions", "mesh.context=2", "use one of 1, 2, 4, 8, 16",
    ),
    ("--train.n-steps=0", "the run has no length", "train.n_samples or train.n_tokens"),
    ("--batch.schedule=0:8 --batch.ramp 2 2 9", "batch.schedule and batch.ramp both", "clear one"),
    ("--data.paths", "data.paths is empty", "give --data.paths PREFIX"),
    ("--data.mock", "data.paths and data.mock each say", "keep one"),
    ("--data.train-paths=t", "data.paths and data.train_paths each say", "keep one"),
    ("--data.test-paths=t", "data.test_paths go with data.train_paths", "in place of data.paths"),
    ("--data.vocab-file=v", "data.vocab_file and data.merge_file", "give both or neither"),
    ("--data.merge-file=m", "data.vocab_file and data.merge_file", "give both or neither"),
    (
        "--data.tokenizer=t --data.vocab-file=v --data.merge-file=m",
        "data.tokenizer=t and data.vocab_file=v each name a tokenizer", "keep one",
    ),
    ("--log.profile-steps 3 2 --log.dir=x", "log.profile_steps=3 2", "a first and a last step"),
    ("--log.profile-steps 2 3", "log.profile_steps=2 3", "needs a log.dir"),
    ("--log.wandb-project=gpt3", "log.wandb_project=gpt3", "needs a log.dir"),
    ("--log.profile-memory=3", "log.profile_memory=3", "needs a log.dir"),
    (
        "--checkpoint.dir=x --checkpoint.save-timeout=3600",
        "checkpoint.save_timeout=3600", "below watchdog.slow_phase_seconds=3600",
    ),
    ("--log.profile-steps 0 3 --log.dir=x", "log.profile_steps=0 3", "from 1 on"),
    (
        "--checkpoint.allow-new-data-order",
        "checkpoint.allow_new_data_order has no effect", "without a checkpoint.dir",
    ),
    (
        "--checkpoint.keep-period=15 --checkpoint.save-interval=10",
        "checkpoint.keep_period=15", "checkpoint.save_interval=10", "use 20",
    ),
    ("--checkpoint.only-params", "checkpoint.only_params has no effect", "checkpoint.load"),
]  # fmt: skip


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case[0])
def test_values_that_do_not_go_together_name_field_value_and_fix(parse, case):
    overrides, *told = case
    with pytest.raises(errors.UserError) as error:
        parse(*overrides.split())
    for words in told:
        assert words in str(error.value)


def numbers():
    """Return (name, its range) of every number of a config; those of a tuple count as one."""
    return {name: ranges.range_of(hint) for name, hint in number_hints(schema.Config)}


def number_hints(kind, prefix=""):
    """Yield (name, type) of each number of a tree of dataclasses."""
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        if dataclasses.is_dataclass(hint):
            yield from number_hints(hint, f"{prefix}{name}.")
        elif has_number(hint):
            yield prefix + name, hint


def has_number(hint):
    return hint in (int, float) or any(map(has_number, typing.get_args(hint)))


def set_number(cfg, name, value):
    """Return the config with a number in a field, or in all places of a tuple."""
    old = schema.flatten(cfg)[name]
    return set_field(cfg, name, (value,) * (len(old) or 3) if isinstance(old, tuple) else value)


def test_every_number_has_a_range_that_its_default_is_in(valid):
    found = numbers()
    assert len(found) > 50 and {"log.profile_steps", "batch.ramp", "mesh.data"} <= found.keys()
    for name, bounds in found.items():
        assert bounds is not None, f"{name} has no range: see `ranges`"
        assert math.isfinite(bounds.least) and math.isfinite(bounds.most)
    validation.check_ranges(valid)


@pytest.mark.parametrize("name", numbers())
def test_a_number_beyond_its_range_names_field_value_and_bounds(valid, name):
    bounds = numbers()[name]
    beyond = [bounds.least - 1, bounds.most * 2 + 1, math.nan, math.inf, -math.inf]
    for value in (*beyond, *([] if bounds.excluded is None else [bounds.excluded])):
        with pytest.raises(errors.UserError) as error:
            validation.validate(set_number(valid, name, value))
        assert f"{name}={value} must be {bounds}: " in str(error.value)
        assert documents.points_on(str(error.value))
    with pytest.raises(errors.UserError, match=f"{name}=many is a str: give a number"):
        validation.validate(set_number(valid, name, "many"))


def test_a_range_tells_which_of_its_ends_are_in():
    told = {(1, 9): "at least 1 and at most 9", (0, 1, "", 0): "above 0 and at most 1"}
    told |= {(0, 1, "", 1): "at least 0 and below 1"}
    told |= {(-1, 9, "", 0): "at least -1 and at most 9, and not 0"}
    for ends, words in told.items():
        assert str(ranges.Range(*ends)) == words


@pytest.mark.parametrize("name", numbers())
def test_both_ends_of_a_range_hold_in_what_first_uses_the_number(valid, name):
    bounds = numbers()[name]
    for value in (bounds.least, bounds.most):
        cfg = set_field(valid, "precision.compute_dtype", "float16")  # it has numbers of its own
        with contextlib.suppress(errors.UserError):  # nothing else
            validation.validate(set_number(cfg, name, value))
            use_numbers(set_number(cfg, name, value))


def use_numbers(cfg):
    """Do what a run does with its numbers, without building a program."""
    schedule = batch_schedule.from_config(cfg.batch, cfg.model.seq_len)
    n_steps, n_samples = schedule.end(cfg.train, cfg.model.seq_len)
    if n_samples <= ranges.INT32:  # else `step.build` refuses
        for samples in (0, n_samples):
            for xp, count in ((np, samples), (jnp, jnp.int32(samples))):
                optimizer.learning_rate(cfg.optimizer, n_samples, count, xp)
                optimizer.weight_decay(cfg.optimizer, n_samples, count, xp)
    scale = optimizer.init_loss_scale(cfg.precision)
    optimizer.next_loss_scale(cfg.precision, scale, jnp.bool_(True))
    jax.random.key(cfg.train.seed)
    np.random.RandomState(cfg.train.seed)
    np.int32([cfg.data.eod_id, cfg.model.vocab_size - 1, cfg.model.padded_vocab_size - 1])
    numerical_faults.Faults(cfg, ()).loss_limit(n_steps)
    flops.n_params(cfg.model)
    limit = 2 * max(cfg.watchdog.slow_phase_seconds, cfg.watchdog.step_multiple)
    assert max(limit, cfg.checkpoint.retry_pause) < threading.TIMEOUT_MAX
    np.int32([1000 * cfg.distributed.start_timeout, 1000 * cfg.distributed.heartbeat_timeout])
    cfg = layout.plain(cfg)
    memory_model.memory(cfg, placement.lay_out(cfg, 1, 1))


# What people mean by a 0 that is not allowed, and how it is said.
OFF = [
    ("--train.eval-batches=0", "train.eval_interval=0 turns evaluation off"),
    ("--checkpoint.save-interval=0", "without checkpoint.dir nothing is saved"),
    ("--checkpoint.max-to-keep=0", "keep_period equal to save_interval keeps all"),
    ("--log.interval=0", "a large number logs little"),
    ("--faults.max-skipped-steps=0", "faults.nonfinite=warn has no limit"),
    ("--faults.spike-window=0", "faults.spike=off"),
    ("--data.read-threads=0", "data.prefetch=0"),
    ("--watchdog.min-seconds=0", "watchdog.step_multiple=0 turns the watchdog off"),
    ("--mesh.fsdp=0", "at least 1, or -1 for the rest"),
]


@pytest.mark.parametrize(("override", "told"), OFF)
def test_a_0_that_turns_nothing_off_says_what_does(parse, override, told):
    with pytest.raises(errors.UserError) as error:
        parse(override)
    assert told in str(error.value)
    with pytest.raises(errors.UserError) as error:
        parse(override.replace("=0", f"={10**12}"))
    assert told not in str(error.value)


@pytest.mark.parametrize(
    ("text", "count"),
    [("300B", 300 * 10**9), ("2.4b", 2_400_000_000), ("1k", 1000), ("1e6", 10**6), ("1T", 10**12)],
)
def test_counts_of_tokens_and_samples_read_multiples_alike(parse, text, count):
    assert parse(f"--train.n-tokens={text}").train.n_tokens == count
    assert batch_schedule.parse_schedule(f"0:8 {text}:16", 1)[1] == (count, 16)
    assert ranges.read_count(text) == count


def test_samples_read_multiples_too(parse):
    cfg = parse(
        "--train.n-samples=1M", "--optimizer.decay-samples=.5M", "--optimizer.warmup-samples=10K",
        "--batch.ramp", "2", "2", "4.8K", "--data.skip-samples", "8K:8.5K",
    )  # fmt: skip
    assert (cfg.train.n_samples, cfg.optimizer.decay_samples) == (10**6, 500_000)
    assert (cfg.optimizer.warmup_samples, cfg.batch.ramp) == (10_000, (2, 2, 4800))
    assert validation.stretch(cfg.data.skip_samples[0]) == (8000, 8500)


@pytest.mark.parametrize("text", ["", "K", "1.5", "3X", "nan", "infB", "many"])
def test_what_is_no_count_is_named(parse, capsys, text):
    with pytest.raises(SystemExit):
        parse(f"--train.n-tokens={text}")
    told = capsys.readouterr().err
    assert "--train.n-tokens" in told and f"'{text}' is not a count" in told


@pytest.mark.parametrize(
    "split",
    ["90,5,5", "90/5/5", "90 5 5", " 90, 5 ,5", "90:5:5", "[90, 5, 5]", "90%,5%,5%", "90.,5.0,5"],
)
def test_a_split_is_read_as_megatron_reads_it(parse, split):
    """There, `re.findall(r"[.0-9]+", split)`."""
    parse("--data.split", split)
    assert validation.split_weights(split) == [90, 5, 5]


@pytest.mark.parametrize("split", ["", "a,b", "90,-5,5", "0,0,0", "1,2,3,4", "1.2.3,1", "1e1,5"])
def test_what_is_no_split_is_refused(parse, split):
    with pytest.raises(errors.UserError, match="up to three weights"):
        parse("--data.split", split)


# Overrides of which one decides nothing, its field, and why.
WITHOUT_EFFECT = [
    ("--model.attention.band=7", "model.attention.band=7", "model.attention.pattern=dense"),
    ("--optimizer.wsd-decay=linear", "optimizer.wsd_decay=linear", "optimizer.decay=cosine"),
    ("--optimizer.decay=constant --optimizer.min-lr=1e-4", "min_lr=0.0001", "decay=constant"),
    ("--optimizer.init-lr=1e-4", "optimizer.init_lr=0.0001", "no warm-up"),
    ("--precision.loss-scale-window=9", "precision.loss_scale_window=9", "dtype=bfloat16"),
    (
        "--precision.compute-dtype=float16 --precision.static-loss-scale=8 "
        "--precision.initial-loss-scale=8", "precision.initial_loss_scale=8.0", "static_loss_scale",
    ),
    ("--data.paths --data.train-paths x --data.split=8,1,1", "data.split=8,1,1", "train_paths"),
    ("--data.paths --data.mock --data.split=8,1,1", "data.split=8,1,1", "data.mock"),
    ("--data.prefetch=0 --data.read-threads=9", "data.read_threads=9", "data.prefetch=0"),
    ("--mesh.data=1 --mesh.shard-optimizer=True", "mesh.shard_optimizer=True", "mesh.data=1"),
    (
        "--mesh.tensor=1 --mesh.sequence-parallel=False",
        "mesh.sequence_parallel=False", "mesh.tensor=1",
    ),
    ("--train.eval-interval=0 --train.eval-batches=9", "eval_batches=9", "train.eval_interval=0"),
    ("--faults.max-skipped-steps=9", "faults.max_skipped_steps=9", "at skip"),
    ("--faults.spike-window=9", "faults.spike_window=9", "faults.spike=off"),
    ("--watchdog.step-multiple=0 --watchdog.min-seconds=9", "min_seconds=9.0", "multiple=0"),
    ("--train.max-fruitless-starts=9", "train.max_fruitless_starts=9", "no log.dir"),
]  # fmt: skip


@pytest.mark.parametrize("case", WITHOUT_EFFECT, ids=lambda case: case[0])
def test_a_field_that_was_set_and_decides_nothing_is_named(parse, case):
    overrides, *told = case
    (line,) = unused_fields.without_effect(parse(*overrides.split()))
    assert all(words in line for words in (*told, "has no effect"))


def test_nothing_is_said_of_fields_that_were_not_set_or_have_an_effect(parse):
    assert unused_fields.without_effect(parse()) == []
    used = parse(
        "--precision.compute-dtype=float16", "--precision.loss-scale-window=9",
        "--faults.spike=skip", "--faults.max-skipped-steps=3", "--faults.spike-window=9",
        "--optimizer.warmup-samples=2", "--optimizer.init-lr=1e-4", "--train.eval-batches=2",
    )  # fmt: skip
    assert unused_fields.without_effect(used) == []


def test_every_error_of_validate_is_provoked_above(parse, valid):
    cases = [case[0] for case in REFUSED]
    provoked = {line_of_error(lambda o=o: parse(*o.split())) for o in cases}
    broken = set_field(valid, "model.n_layers", -1)
    provoked.add(line_of_error(lambda: validation.validate(broken)))
    assert provoked == lines_that_raise()


def line_of_error(call):
    with pytest.raises(errors.UserError) as error:
        call()
    return error.traceback[-1].lineno + 1  # pytest counts from 0


def lines_that_raise():
    """Return the line of each `raise` in the checks that `validate` calls."""
    functions = ast.parse(inspect.getsource(validation)).body
    checks = [
        f
        for f in functions
        if isinstance(f, ast.FunctionDef) and f.name.lstrip("_").startswith("check")
    ]
    return {node.lineno for f in checks for node in ast.walk(f) if isinstance(node, ast.Raise)}
