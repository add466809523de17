"""A run told in a few lines: its loss and simple guesses', a text, and commands that work."""

import dataclasses
import json
import re
import shlex
import subprocess
import sys

import jax
import numpy as np
import pytest

from gpt3jax import errors, main
from gpt3jax.checkpoint import metadata, parameters
from gpt3jax.config import recipe, schema
from gpt3jax.convert import __main__ as convert
from gpt3jax.evaluate import token_losses
from gpt3jax.summary import __main__ as summary
from gpt3jax.summary import continuation, learned, next_commands, recorded_run
from gpt3jax.summary import options as summary_options

import corpus
import tiny

RECIPE = """
from gpt3jax import config


def get_config():
    return config.Config(
        model=config.Model(n_layers=1, d_model=32, n_heads=2, seq_len=32, vocab_size=400),
        optimizer=config.Optimizer(peak_lr=1e-2),
        precision=config.Precision(compute_dtype="float32"),
        batch=config.Batch(global_batch_size=8),
        data=config.Data(
            from_text="texts", paths=("data/corpus",), split="80,20,0", eod_id=0,
            vocab_file="data/vocab.json", merge_file="data/merges.txt",
        ),
        mesh=config.Mesh(data=4, tensor=2),
        train=config.Train(n_steps=12, eval_interval=5, eval_batches=2),
        checkpoint=config.Checkpoint(dir="run/checkpoints", save_interval=10),
        log=config.Log(dir="run/logs", interval=3),
    )
"""
TEXT = "def close(self):\n    return self.file.close()\n\n\nclass File{n}:\n    size = {n}\n"


def call(monkeypatch, module, *args):
    """Return the exit status of a command in this process."""
    monkeypatch.setattr(sys, "argv", ["command", *args])
    return module.main()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """Return the folder from which a tiny run was trained to its end."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "texts").mkdir()
    for n in range(40):
        (folder / "texts" / f"{n}.py").write_text(TEXT.replace("{n}", str(n)) * 6)
    (folder / "recipe.py").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call(patch, main, "--config=recipe.py") == errors.DONE
    return folder


@pytest.mark.slow
def test_a_summary_has_its_three_parts_and_commands_that_work(run_folder, monkeypatch, capsys):
    monkeypatch.chdir(run_folder)
    monkeypatch.setenv("COLUMNS", "60")
    assert call(monkeypatch, summary, "run") == errors.DONE
    lines = capsys.readouterr().out.splitlines()
    text = " ".join(" ".join(lines).split())
    entry = recorded_run.last_value(recorded_run.read("run"), "validation_loss")
    assert text.startswith(f"Learned: {entry['validation_loss']:.2f} nats a token on held-out text")
    assert "after 12 steps" in text and "Written after a held-out line (>), at " in text
    commands = [shlex.split(line) for line in lines if line.startswith("    ") and "-" in line]
    assert [c[2] for c in commands] == [
        "gpt3jax.main", "gpt3jax.report", "gpt3jax.convert", commands[3][2],
    ]  # fmt: skip
    prose = [line for line in lines if not line.startswith(("    ", "  >", "  |"))]
    assert max(map(len, prose)) <= 60

    assert call(monkeypatch, main, *commands[0][3:]) == errors.DONE
    told = capsys.readouterr().out
    assert "mesh fsdp 4 x tensor 2" in told and "the run is complete: step 15" in told
    assert call(monkeypatch, convert, *commands[2][3:]) == errors.DONE
    assert (run_folder / "run" / "hf" / "model.safetensors").is_file()
    assert next_commands.all_of(recorded_run.read("run"), "x")[2].commands[0].endswith("run/hf-2")


class Letters:
    """A tokenizer with a token for each character."""

    def encode(self, text):
        """Return the characters' codes."""
        return list(map(ord, text))

    def decode(self, tokens):
        """Return the characters of codes."""
        return "".join(map(chr, tokens))


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("cut line\nname = code\nfor all who read\nif all who run:\nand more", "for all who read"),
        ("cut line\nname = code\n\nx = 1\nand more", "name = code"),
        ("cut line\nx = 1\n\ny\nand more", "cut line\nx = 1\n\n"),  # no line has two words
    ],
)
def test_the_prompt_is_the_short_line_with_the_most_words(text, prompt):
    bpe = Letters()
    assert bpe.decode(continuation.choose_prompt(np.array([bpe.encode(text)]), bpe)) == prompt


@pytest.mark.slow
def test_the_exported_model_opens_in_transformers_as_printed(run_folder, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.chdir(run_folder)
    run = recorded_run.read("run")
    run = dataclasses.replace(run, folder=tmp_path)
    export, use = next_commands.all_of(run, "class File1:")[2].commands
    assert call(monkeypatch, convert, *shlex.split(export)[3:]) == errors.DONE
    _, option, code = shlex.split(use)
    done = subprocess.run([sys.executable, option, code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("class"), done.stderr


@pytest.mark.slow
def test_guesses_are_measured_on_the_tokens_of_the_runs_own_loss(run_folder, monkeypatch):
    """The newest parameters have the logged loss there."""
    monkeypatch.chdir(run_folder)
    run = recorded_run.read("run")
    measured = learned.compare(run).measured
    assert measured.is_held_out and measured.step == run.newest.step
    rows, _ = measured.source.tokens(measured.numbers)
    source = parameters.open_newest(run.cfg.checkpoint.dir, tiny.one_device_mesh())
    scorer = token_losses.Scorer(source.params(), source.program, source.cfg.data, len(rows))
    losses = np.concatenate([row.losses for row in scorer.score(list(rows))])
    assert losses.mean() == pytest.approx(measured.loss, abs=1e-5)


@pytest.mark.slow
def test_probabilities_are_those_of_the_models_logits(run_folder, monkeypatch):
    monkeypatch.chdir(run_folder)
    run, options = recorded_run.read("run"), summary_options.Options(run="run")
    measured = learned.compare(run).measured
    rows, _ = measured.source.tokens(measured.numbers)
    written = continuation.write(run, options, rows)
    source = parameters.open_newest(run.cfg.checkpoint.dir, tiny.one_device_mesh())
    bpe = parameters.open_tokenizer(run.cfg.checkpoint.dir, source.cfg, options.source)
    assert written.prompt in bpe.decode(rows.ravel().tolist())
    prompt = bpe.encode(written.prompt)
    tokens = [*prompt, *written.tokens]
    assert len(written.tokens) == len(written.logprobs) > 1
    params, tokens_BT = source.params(), np.asarray([tokens])
    positions_BT = np.arange(len(tokens))[None]
    with jax.set_mesh(source.program.mesh):
        x_BTD = params(tokens_BT, positions_BT, None, None, source.program.compute)
    logits_TV = np.asarray(x_BTD[0] @ params.embedding_VD[...].T)[
        :, : source.cfg.model.softmax_size
    ]
    logprobs_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
    places = np.arange(len(prompt) - 1, len(tokens) - 1)
    expected = logprobs_TV[places, tokens[len(prompt) :]]
    assert written.logprobs == pytest.approx(expected, abs=1e-4)
    assert written.mean_probability == pytest.approx(np.exp(expected.mean()), rel=1e-4)


def write_run(folder, *, entries=(), n_consumed=320, mesh="data 4 x tensor 2", **groups):
    """Write what a run of `tiny.make_config` leaves behind; return its config."""
    groups = {"checkpoint": {"dir": str(folder / "checkpoints")}, **groups}
    cfg = tiny.make_config(**groups)
    (folder / "logs").mkdir(parents=True)
    (folder / "logs" / "config.json").write_text(json.dumps(schema.flatten(cfg)))
    lines = [json.dumps(entry) + "\n" for entry in entries]
    (folder / "logs" / "metrics.jsonl").write_text("".join(lines) + '{"step": 3, "cut')
    if n_consumed:
        meta = metadata.Meta(
            step=n_consumed // 16, consumed_samples=n_consumed, mesh=mesh,
            config=schema.flatten(cfg),
            data_order={"corpora": [], "weights": None, "split": "", "seq_len": 32, "seed": 1},
        )  # fmt: skip
        file = folder / "checkpoints" / str(meta.step) / "meta" / "metadata"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(metadata.with_checksum(dataclasses.asdict(meta))))
    return cfg


def test_the_last_interval_is_measured_where_nothing_is_held_out(tmp_path):
    prefix = tiny.write_corpus(tmp_path / "corpus", 3, 400)
    entries = [
        {"step": n, "consumed_samples": 16 * n, "interval_loss": 6.0 - n / 10} for n in (10, 20)
    ]
    data = {"paths": (prefix,), "split": "1,0,0"}
    write_run(tmp_path / "run", entries=entries, data=data, train={"eval_interval": 0})
    told = learned.compare(recorded_run.read(str(tmp_path / "run" / "logs")))
    assert not told.measured.is_held_out and (told.measured.loss, told.measured.step) == (4.0, 20)
    assert told.measured.numbers.tolist() == list(range(160, 320)) and told.measured.n_read == 160
    # The corpus is random but for the ends of its documents; what was seen to follow misleads.
    assert 6.0 < told.unigram_loss < np.log(tiny.VOCAB) < told.bigram_loss < 7.0


@pytest.mark.parametrize("train", [{"n_steps": 5, "eval_interval": 5}, {"eval_interval": 0}])
def test_a_run_longer_than_its_config_says_is_measured(tmp_path, train):
    """Its last start may have had a lower limit, or have measured nothing."""
    entries = [{"step": 20, "consumed_samples": 320, "interval_loss": 4.0, "validation_loss": 5.0}]
    prefix = tiny.write_corpus(tmp_path / "corpus", 3, 400)
    data = {"paths": (prefix,), "split": "80,20,0"}
    write_run(tmp_path / "run", entries=entries, data=data, train={"eval_batches": 1, **train})
    told = learned.compare(recorded_run.read(str(tmp_path / "run")))
    assert told.measured.step == 20 and told.measured.is_held_out == bool(train["eval_interval"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_consumed": 0}, r"checkpoint\.dir=.*/run/checkpoints is not there: start this command"),
        ({"checkpoint": {"dir": ""}}, r"saved no checkpoint \(checkpoint\.dir is empty\): train"),
        ({}, r"names no tokenizer \(data\.vocab_file, data\.tokenizer\).*: give --vocab-file"),
        (
            {"data": {"paths": ("gone",), "vocab_file": "vocab.json", "merge_file": "merges.txt"}},
            r"gone\.idx: no such file",
        ),
    ],
    ids=["no folder", "none saved", "no tokenizer", "no corpus"],
)
def test_what_is_missing_is_named(tmp_path, monkeypatch, capsys, change, message):
    write_run(tmp_path / "run", **change)
    monkeypatch.chdir(tmp_path)
    corpus.train_tokenizer(tmp_path, ["some words"], size=300)
    assert call(monkeypatch, summary, str(tmp_path / "run")) == errors.REFUSED
    told = capsys.readouterr()
    assert told.out == "" and len(told.err.splitlines()) == 1
    assert re.search(message, told.err), told.err


def test_a_folder_of_no_run_is_refused(tmp_path):
    with pytest.raises(errors.UserError, match=r"has no config\.json, nor logs/config\.json: give"):
        recorded_run.read(str(tmp_path))


def test_an_empty_folder_of_checkpoints_is_refused(tmp_path):
    write_run(tmp_path / "run", n_consumed=0)
    (tmp_path / "run" / "checkpoints").mkdir()
    with pytest.raises(errors.UserError, match="has no checkpoint yet: train until one"):
        recorded_run.read(str(tmp_path / "run"))


def test_a_run_that_logged_no_loss_is_refused(tmp_path):
    data = {"paths": (tiny.write_corpus(tmp_path / "corpus", 3, 400),), "split": "1,0,0"}
    write_run(tmp_path / "run", data=data)
    with pytest.raises(errors.UserError, match=r"metrics\.jsonl has no loss yet: train until"):
        learned.compare(recorded_run.read(str(tmp_path / "run")))


def train_on(folder, **change):
    write_run(folder, **change)
    return next_commands.train_on(recorded_run.read(str(folder)))


def options_of(item):
    (command,) = item.commands
    return shlex.split(command)[3:]


@pytest.mark.parametrize(
    ("mesh", "options"),
    [
        ("data 4 x tensor 2", ["--mesh.data", "1", "--mesh.fsdp", "4"]),
        ("data 2 x stage 2 x fsdp 2", ["--mesh.data", "1", "--mesh.fsdp", "4"]),
        ("one device", []),
        ("fsdp 8", []),
        ("data 3", []),  # does not divide d_model=64
    ],
)
def test_replicas_become_shards_where_that_fits(tmp_path, mesh, options):
    item = train_on(tmp_path / "a run", mesh=mesh)
    config = ["--config", str(tmp_path / "a run" / "logs" / "config.json")]
    assert options_of(item) == [*config, "--train.n-steps", "25", *options]
    assert ("on another mesh" in item.what) == bool(options)


def test_a_run_before_its_end_is_trained_to_it(tmp_path):
    item = train_on(tmp_path / "run", n_consumed=160)
    assert item.what.startswith("train on to its end") and "--train.n-steps" not in options_of(item)


@pytest.mark.parametrize(
    ("limit", "option", "words"),
    [
        ({"n_steps": 0, "n_tokens": 10_240}, ["--train.n-tokens", "12800"], "to 12,800 tokens"),
        ({"n_steps": 0, "n_samples": 320}, ["--train.n-samples", "400"], "to 400 samples"),
        ({"n_steps": 1}, ["--train.n-steps", "25"], "to 25 steps"),
        ({"n_steps": 19}, ["--train.n-steps", "25"], "to 25 steps"),
    ],
)
def test_the_limit_that_the_run_has_is_raised_beyond_what_is_done(tmp_path, limit, option, words):
    item = train_on(tmp_path / "run", train=limit)
    assert options_of(item)[2:4] == option and words in item.what


def test_names_of_folders_are_quoted(tmp_path):
    folder = tmp_path / "it's a run"
    write_run(folder)
    _, report, export = next_commands.all_of(recorded_run.read(str(folder)), "x = 1")
    assert options_of(report) == [str(folder), "--html", str(folder / "report.html")]
    code = shlex.split(export.commands[1])[2]
    compile(code, "code", "exec")
    assert f'("text-generation", "{folder / "hf"}")("x", max_new_tokens=16)' in code


def test_a_banded_model_is_not_exported(tmp_path):
    attention = schema.Attention(pattern="alternating")
    write_run(tmp_path / "run", model={"attention": attention})
    run = recorded_run.read(str(tmp_path / "run"))
    item = next_commands.all_of(run, "def close(self):")[2]
    assert "banded attention" in item.what and options_of(item)[-1] == "def close(self):"
    assert shlex.split(item.commands[0])[2] == "gpt3jax.sample"


def test_every_config_that_is_suggested_is_one_that_the_trainer_takes(tmp_path):
    cfg = recipe.parse(options_of(train_on(tmp_path / "run")))
    assert (cfg.train.n_steps, cfg.mesh.data, cfg.mesh.fsdp) == (25, 1, 4)
