"""Paths as users write them: put in full everywhere, or refused before anything is made."""

import dataclasses
import errno
import os
import pathlib
import sys
import tempfile
import typing

import pytest

from gpt3jax import errors
from gpt3jax.checkpoint import __main__ as checkpoint_command
from gpt3jax.config import schema, user_paths
from gpt3jax.convert import __main__ as convert
from gpt3jax.convert import megatron
from gpt3jax.data import inspect, merge, prepare
from gpt3jax.evaluate import __main__ as evaluate
from gpt3jax.evaluate import options as evaluate_options
from gpt3jax.plan import __main__ as plan
from gpt3jax.plan import options as plan_options
from gpt3jax.preflight import options as preflight_options
from gpt3jax.sample import __main__ as sample
from gpt3jax.sample import options as sample_options

import tiny

ALL_OPTIONS = [
    schema.Config, sample_options.Options, evaluate_options.Options, plan_options.Options,
    preflight_options.Options, inspect.Options, merge.Options, prepare.Options, convert.FromHf,
    convert.ToHf,
    megatron.FromMegatron, megatron.ToMegatron, checkpoint_command.List, checkpoint_command.Show,
    checkpoint_command.Verify,
]  # fmt: skip
# Options of text that are no paths.
OTHERS = {
    "schedule", "split", "skip_samples", "coordinator_address", "prompt", "host", "tasks", "gpu",
    "samples", "json_key", "eod_token", "wandb_project",
}  # fmt: skip


def text_fields(kind):
    """Return the fields of text of options, those of their groups included: name, hint."""
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        plain = typing.get_type_hints(kind)[name]
        if dataclasses.is_dataclass(plain):
            yield from text_fields(plain)
        elif plain in (str, tuple[str, ...]):
            yield kind, name, hint


@pytest.mark.parametrize("kind", ALL_OPTIONS, ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
def test_every_path_that_can_be_given_is_known_as_one(kind):
    found = list(text_fields(kind))
    assert found
    for group, name, hint in found:
        assert user_paths.is_path(hint) == (name not in OTHERS), f"{group.__name__}.{name}"


@pytest.mark.parametrize(
    ("group", "field"),
    [
        (group, name)
        for group in ("data", "checkpoint", "log")
        for _, name, hint in text_fields(type(getattr(tiny.make_config(), group)))
        if user_paths.is_path(hint)
    ],
)
def test_a_path_of_a_config_is_put_in_full_and_a_store_refused(group, field, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    several = isinstance(getattr(getattr(tiny.make_config(), group), field), tuple)

    def given(path):
        value = ("0.5", path) if several else path
        cfg = user_paths.expanded(tiny.make_config(**{group: {field: value}}))
        found = getattr(getattr(cfg, group), field)
        return found[1] if several else found

    assert given("~/x") == "/home/ada/x" and given("~") == "/home/ada"
    for plain in ("a~b/~", "./~", "/x", "x:/y", "a//b", ""):
        assert given(plain) == plain
    for store in ("gs://b/x", "s3://b", "hdfs://n:1/x", "file:///x"):
        with pytest.raises(errors.UserError, match=rf"{group}\.{field}={store} .*mount the store"):
            given(store)
    with pytest.raises(errors.UserError, match=r"=~nobody-here/x names no user .*\./~nobody-here"):
        given("~nobody-here/x")


COMMANDS = [
    (sample, "--checkpoint={}"),
    (evaluate, "--checkpoint={} --text=x"),
    (evaluate, "--checkpoint=x --text=x --json={}"),
    (plan, "--config=x --gpus=8 --json={}"),
    (inspect, "{}"),
    (merge, "--input a b --output-prefix={}"),
    (prepare, "--input={} --output-prefix=x --vocab-file=v --merge-file=m"),
    (prepare, "--input=x --output-prefix=x --vocab-file={} --merge-file=m"),
    (convert, "from-hf {} --output=x"),
    (convert, "to-hf --checkpoint=x --output={}"),
    (convert, "from-megatron x --output={}"),
    (convert, "to-megatron --checkpoint={} --output=x"),
    (checkpoint_command, "list {}"),
    (checkpoint_command, "verify {}"),
]


@pytest.mark.parametrize(("module", "options"), COMMANDS)
def test_a_command_refuses_a_store_and_makes_nothing(
    module, options, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["command", *options.format("s3://bucket/x").split()])
    assert module.main() == 2
    told = capsys.readouterr().err
    assert "=s3://bucket/x is the address of a store" in told and told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_tried_and_left_as_it_was(tmp_path):
    user_paths.try_writing("log.dir", tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (errno.EACCES, errors.UserError, "Permission denied.* its permissions or its mount"),
        (errno.EROFS, errors.UserError, "Read-only file system.* its permissions or its mount"),
        (errno.ENOSPC, errors.TransientError, "No space left.* make room"),
        (errno.EDQUOT, errors.TransientError, "quota.* make room"),
        (errno.ESTALE, errors.TransientError, "Stale.* its mount"),
    ],
)
def test_a_folder_that_cannot_be_written_is_told_with_what_is_true(
    tmp_path, monkeypatch, number, kind, words
):
    """By a write that fails, since no permission stops root."""

    def fails(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", fails)
    with pytest.raises(errors.UserError, match=f"log.dir={tmp_path} cannot be.*{words}") as error:
        user_paths.try_writing("log.dir", tmp_path)
    assert type(error.value) is kind


@pytest.mark.parametrize("file", ["meta/metadata", "state/_METADATA"])
def test_a_checkpoint_is_no_folder_of_checkpoints(tmp_path, file):
    user_paths.check_not_a_step(tmp_path)
    (tmp_path / "40" / file).parent.mkdir(parents=True)
    (tmp_path / "40" / file).touch()
    user_paths.check_not_a_step(tmp_path)
    with pytest.raises(errors.UserError, match=f"the folder that it is in, {tmp_path}, whose"):
        user_paths.check_not_a_step(tmp_path / "40")
    with pytest.MonkeyPatch.context() as patched, pytest.raises(errors.UserError) as error:
        patched.chdir(tmp_path)
        user_paths.check_not_a_step(pathlib.Path("40"))
    assert f"{tmp_path}, whose" in str(error.value)
