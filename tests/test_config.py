"""What reaches a config from a recipe and the command line, and what is refused, in which words."""

import ast
import dataclasses
import inspect
import math
import re

import pytest

from gpt3jax import config, recipe, validation

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
    assert config.flatten(cfg) == config.flatten(valid) | given


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
    for name in config.flatten(valid):
        assert f"--{name.replace('_', '-')}" in text
    docs = field_docstrings()
    assert len(docs) == len(config.flatten(valid))
    for doc in docs:
        assert re.sub(r"\s", "", doc) in text


def field_docstrings():
    """Return the string under each field that is not a group."""
    classes = [n for n in ast.parse(inspect.getsource(config)).body if isinstance(n, ast.ClassDef)]
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
    with pytest.raises(config.UserError, match="add --config=FILE"):
        recipe.parse(["--model.n-layers=2"])


def test_a_missing_recipe_lists_those_beside_it(recipe_file):
    (recipe_file.parent / "other.py").touch()
    with pytest.raises(config.UserError, match=r"recipes in .*: other\.py, recipe\.py") as error:
        recipe.parse([f"--config={recipe_file.parent / 'recip.py'}"])
    assert "recip.py: no such file" in str(error.value)
    with pytest.raises(config.UserError, match=r"recipes in .*: none"):
        recipe.load(str(recipe_file.parent / "nowhere" / "recipe.py"))


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
    with pytest.raises(config.UserError) as error:
        recipe.load(str(recipe_file))
    assert told in str(error.value) and str(recipe_file) in str(error.value)


def test_a_config_is_frozen_at_every_depth(valid):
    groups = [getattr(valid, field.name) for field in dataclasses.fields(valid)]
    for group in (valid, valid.model.attention, *groups):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(group, dataclasses.fields(group)[0].name, None)


def test_derived_sizes(valid):
    model = valid.model
    assert (model.d_head, model.d_ff, model.padded_vocab_size) == (16, 256, 512)
    assert dataclasses.replace(model, vocab_size=512).padded_vocab_size == 512


# Overrides that do not go together, and words of the message: fields, values, and the fix.
REFUSED = [
    ("--model.n-heads=5", "model.n_heads=5", "model.d_model=64", "use one of 1, 2, 4, 8, 16, 32"),
    ("--model.n-loss-chunks=3", "model.n_loss_chunks=3", "model.seq_len=32", "use one of 1, 2, 4"),
    (
        "--data.eod-id=500 --data.reset-position-ids",
        "data.eod_id=500", "model.vocab_size=500", "give the corpus's own",
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
        "optimizer.wsd_decay_samples=9", "exceeds optimizer.decay_samples=8", "shorten it",
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
        "model.attention_dropout=0.1", "implementation=cudnn", "set it to 0, or use xla",
    ),
    (
        "--model.attention.implementation=cudnn --model.attention-dropout=0 "
        "--precision.compute-dtype=float32",
        "precision.compute_dtype=float32", "implementation=cudnn", "bfloat16 or float16, or xla",
    ),
    ("--data.from-text t --data.paths a b", "data.paths has 2 entries", "give one prefix"),
    ("--mesh.fsdp=0", "mesh.fsdp=0", "at least 1, or -1 for the rest"),
    ("--mesh.tensor=-2", "mesh.tensor=-2", "at least 1, or -1 for the rest"),
    ("--mesh.fsdp=-1", "mesh.data and mesh.fsdp are all -1", "only one axis can take the rest"),
    ("--mesh.tensor=3", "mesh.tensor=3", "model.n_heads=4", "use one of 1, 2, 4"),
    (
        "--mesh.tensor=4 --model.vocab-multiple=2 --model.vocab-size=10",
        "mesh.tensor=4", "model.padded_vocab_size=10", "use one of 1, 2, 5, 10",
    ),
    ("--mesh.virtual-stages=2", "mesh.virtual_stages=2 has no effect", "set it to 1"),
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
    ("--train.n-steps=0", "the run has no length", "train.n_steps, train.n_samples or n_tokens"),
    ("--batch.schedule=0:8 --batch.ramp 2 2 9", "batch.schedule and batch.ramp both", "clear one"),
    ("--data.paths", "data.paths is empty", "give --data.paths PREFIX"),
    ("--data.mock", "data.paths and data.mock each say", "keep one"),
    ("--data.train-paths=t", "data.paths and data.train_paths each say", "keep one"),
    ("--data.test-paths=t", "data.test_paths go with data.train_paths", "in place of data.paths"),
    ("--data.vocab-file=v", "data.vocab_file and data.merge_file", "give both or neither"),
    ("--data.merge-file=m", "data.vocab_file and data.merge_file", "give both or neither"),
    ("--log.profile-steps 3 2 --log.dir=x", "log.profile_steps=3 2", "a first and a last step"),
    ("--log.profile-steps 2 3", "log.profile_steps=2 3", "needs log.dir"),
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
    with pytest.raises(config.UserError) as error:
        parse(*overrides.split())
    for words in told:
        assert words in str(error.value)


@pytest.mark.parametrize("name", validation._AT_LEAST)
def test_a_number_below_its_range_names_field_value_and_bound(valid, name):
    least = validation._AT_LEAST[name]
    bound = f"must be at least {least:g}"
    for value, told in (
        (least - 1, bound), (float("nan"), "must be finite"), (float("inf"), "must be finite"),
    ):  # fmt: skip
        with pytest.raises(config.UserError) as error:
            validation.validate(set_field(valid, name, value))
        assert f"{name}={value} {told}" in str(error.value)


@pytest.mark.parametrize("name", validation._BELOW_ONE)
def test_a_share_outside_of_0_to_1_names_field_and_value(valid, name):
    for value in (1.0, 1.5):
        with pytest.raises(config.UserError) as error:
            validation.validate(set_field(valid, name, value))
        assert f"{name}={value} must be in [0, 1)" in str(error.value)


def test_every_number_has_a_range(valid):
    numbers = {
        name
        for name, value in config.flatten(valid).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    elsewhere = {f"mesh.{axis}" for axis in ("data", "stage", "fsdp", "context", "tensor")}
    elsewhere |= {"distributed.process_id"}  # in `distributed`
    assert numbers - elsewhere == set(validation._AT_LEAST) | set(validation._BELOW_ONE)


def test_every_error_of_validate_is_provoked_above(parse, valid):
    cases = [case[0] for case in REFUSED]
    provoked = {line_of_error(lambda o=o: parse(*o.split())) for o in cases}
    for name, value in (("model.n_layers", -1), ("model.dropout", -1), ("model.d_model", math.inf)):
        broken = set_field(valid, name, value)
        provoked.add(line_of_error(lambda cfg=broken: validation.validate(cfg)))
    assert provoked == lines_that_raise()


def line_of_error(call):
    with pytest.raises(config.UserError) as error:
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
