"""`gpt3jax.evaluate`: it prints the loss that training would report, or one clear line."""

import json
import math
import pathlib
import sys

import numpy as np
import pytest

from gpt3jax import errors, step
from gpt3jax.checkpoint import metadata, parameters, storage
from gpt3jax.config import layout, schema
from gpt3jax.convert import __main__ as convert
from gpt3jax.data import indexed, loader, splits, tokenizer_sources, tokenizer_training
from gpt3jax.evaluate import __main__ as evaluate
from gpt3jax.evaluate import evaluation, options, token_losses, token_stream
from gpt3jax.sharding import meshes

import corpus
import tiny

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "hf_gpt2"
TEXT = "Friends, Romans, na\u00efve countrymen, lend me your ears;\n" * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a checkpoint of the golden GPT-2, a byte-level tokenizer, and a text."""
    folder = tmp_path_factory.mktemp("evaluate")
    convert.from_hf(convert.FromHf(folder=str(GOLDEN), output=str(folder / "checkpoint")))
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    tokenizer_training.train(["no merges"], 257, *files)
    (folder / "text.txt").write_bytes(TEXT.encode())
    (folder / "empty.txt").write_bytes(b"")
    (folder / "latin.txt").write_bytes(b"na\xefve")
    return folder


@pytest.fixture(scope="module")
def bpe(folder):
    return tokenizer_sources.from_files(str(folder / "vocab.json"), str(folder / "merges.txt"))


def run(monkeypatch, capsys, folder, *args, tokens=True):
    """Return the exit status, what was printed, the error lines, and the JSON file's content."""
    monkeypatch.chdir(folder)
    files = ["--vocab-file", "vocab.json", "--merge-file", "merges.txt"] if tokens else []
    monkeypatch.setattr(sys, "argv", ["evaluate", "--checkpoint", "checkpoint", *files, *args])
    status = evaluate.main()
    printed = capsys.readouterr()
    file = folder / "results.json"
    results = json.loads(file.read_text()) if file.exists() else None
    return status, printed.out, printed.err, results


def test_a_text_is_measured(folder, bpe, monkeypatch, capsys):
    """The mesh is folded, and a stride is half of the context where none is given."""
    mesh = ["--mesh.data", "2", "--mesh.stage", "2", "--mesh.tensor", "2"]
    args = ["--text", "text.txt", "--json", "results.json"]
    status, out, err, results = run(monkeypatch, capsys, folder, *args, *mesh)
    assert status == 0 and " tokens/s" in out and " tokens" in err
    ids = np.asarray(bpe.encode(TEXT))
    source = parameters.open_newest(str(folder / "checkpoint"), tiny.one_device_mesh())
    scorer = token_losses.Scorer(source.params(), source.program, source.cfg.data, 1)
    total = 0.0
    for first, counted, stop in [
        (0, 0, 64),
        (32, 64, 96),
        (64, 96, 128),
        (96, 128, 160),
        (101, 160, 165),
    ]:
        row = np.asarray([bpe.eod_id, *ids])[first : stop + 1]
        total += scorer.score([row])[0][0][counted - stop :].sum()
    assert len(ids) == 165 == len(TEXT.encode()) == results["tokens"] == results["bytes"]
    assert results["seq_len"] == 64 and results["stride"] == 32
    np.testing.assert_allclose(results["loss"], total / 165, rtol=1e-5)
    assert math.isclose(results["perplexity"], math.exp(results["loss"]))
    assert math.isclose(results["bits_per_byte"], results["loss"] / math.log(2))
    assert f"loss           {results['loss']:.6f} nats per token" in out
    assert f"bits per byte  {results['bits_per_byte']:.6f}" in out


def test_a_corpus_is_one_stream_whose_bytes_are_those_of_its_documents(
    folder, bpe, monkeypatch, capsys
):
    documents = ["na\u00efve", "", "countrymen, lend me your ears" * 3]
    with indexed.Writer(str(folder / "corpus"), np.uint16) as writer:
        for text in documents:
            writer.add_document([[*bpe.encode(text), bpe.eod_id]])
    (folder / "joined.txt").write_text("<|endoftext|>".join([*documents, ""]), encoding="utf-8")
    args = ["--json", "results.json", "--stride", "20"]
    *_, of_corpus = run(monkeypatch, capsys, folder, *args, "--data", "corpus")
    *_, of_text = run(monkeypatch, capsys, folder, *args, "--text", "joined.txt")
    n_bytes = len("".join(documents).encode())
    assert of_corpus["tokens"] == n_bytes + 3 == of_text["tokens"]
    np.testing.assert_allclose(of_corpus["loss"], of_text["loss"], rtol=1e-6)
    assert of_corpus["bytes"] == n_bytes
    expected = of_corpus["loss"] * (n_bytes + 3) / math.log(2) / n_bytes
    assert math.isclose(of_corpus["bits_per_byte"], expected)
    *_, cut = run(monkeypatch, capsys, folder, *args, "--data", "corpus", "--max-tokens", "17")
    assert cut["tokens"] == 17 and cut["bytes"] == 15
    *_, cut = run(monkeypatch, capsys, folder, *args, "--text", "text.txt", "--max-tokens", "9")
    assert cut["tokens"] == 9 == cut["bytes"]
    _, out, _, results = run(monkeypatch, capsys, folder, *args, "--data", "corpus", tokens=False)
    assert results["bytes"] is None and results["bits_per_byte"] is None
    assert "bits per byte  not known" in out and "names no tokenizer" in out


def test_a_text_is_read_as_it_is_but_for_the_mark_of_utf8(bpe, tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes("\ufeffa\r\nb\u2028\ufeff".encode())
    read = token_stream.read_file(str(file), bpe, 0)
    assert bpe.decode(read.tokens.tolist()) == "a\r\nb\u2028\ufeff" and read.n_bytes == 10


@pytest.mark.slow
def test_without_overlap_it_is_the_loss_that_training_reports(tmp_path, monkeypatch):
    """The same tokens: what stands before the first one here is a token of the corpus there."""
    folder = corpus.write_run(tmp_path)
    tokens = np.random.default_rng(1).integers(1, corpus.VOCAB, 256)
    for name, document in (("whole", [0, *tokens]), ("rest", tokens)):
        with indexed.Writer(str(folder / name), np.uint16) as writer:
            writer.add_document([document])
    monkeypatch.chdir(folder)
    paths = ["--data.paths", "--data.train-paths", "corpus", "--data.test-paths", "whole"]
    cfg = layout.plain(
        corpus.config_of(folder, *paths, "--train.eval-interval=1", "--train.eval-batches=2")
    )
    mesh = meshes.make_mesh(cfg.mesh)
    program = step.build(cfg, mesh, 1)
    state = program.adopt(tiny.random_params(cfg.model))
    parts = splits.open_splits(cfg, 40, 320)
    sums = [program.eval(state.params, b) for b in loader.eval_batches(parts, cfg, mesh, "test", 0)]
    loss_sum, n_tokens = (sum(map(float, column)) for column in zip(*sums, strict=True))
    store = storage.Checkpoints("checkpoints")
    meta = metadata.Meta(step=0, consumed_samples=0, data_order={}, config=schema.flatten(cfg))
    store.save(state, meta)
    assert store.poll(wait=True) == "" and n_tokens == 256
    given = options.Options(checkpoint="checkpoints", data="rest", stride=16, json="results.json")
    assert "not known without a tokenizer" in evaluation.evaluate(given)
    results = json.loads((folder / "results.json").read_text())
    np.testing.assert_allclose(results["loss"], loss_sum / n_tokens, rtol=1e-6)
    assert results["tokens"] == 256


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "nothing given to measure: give one of --text, --data and --tasks"),
        (["--text", "text.txt", "--data", "x"], "--text and --data given to measure"),
        (["--text", "text.txt", "--checkpoint", "none"], "--checkpoint=none has no checkpoint"),
        (["--text", "missing.txt"], "--text=missing.txt cannot be read"),
        (["--text", "latin.txt"], "--text=latin.txt cannot be read: 'utf-8' codec"),
        (["--text", "empty.txt"], "--text=empty.txt is empty"),
        (["--data", "text.txt"], "text.txt.idx: no such file"),
        (
            ["--text", "text.txt", "--stride", "65"],
            "--stride=65 must be from 1 to model.seq_len=64",
        ),
        (["--text", "text.txt", "--stride", "-1"], "--stride=-1 must be at least 0"),
        (["--text", "text.txt", "--batch-size", "0"], "--batch-size=0 must be at least 1"),
        (["--text", "text.txt", "--max-tokens", "-1"], "--max-tokens=-1 must be at least 0"),
        (["--text", "text.txt", "--limit", "3"], "--limit has no effect with --text"),
        (["--tasks", "x", "--max-tokens", "3"], "--max-tokens has no effect with --tasks"),
        (["--text", "text.txt", "--mesh.tensor", "3"], "mesh: "),
        (["--text", "text.txt", "--json", "text.txt/results.json"], "cannot be written"),
    ],
)
def test_what_cannot_be_done_is_one_line(folder, monkeypatch, capsys, args, message):
    status, out, err, _ = run(monkeypatch, capsys, folder, *args)
    assert status == 2 and message in err and len(err.splitlines()) == 1 and not out


def test_tasks_without_the_extra_say_what_to_install(folder, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, _, err, _ = run(monkeypatch, capsys, folder, "--tasks", "hellaswag")
    assert status == 2 and "pip install 'gpt3jax[lm-eval]'" in err


@pytest.mark.parametrize("tokens", [True, False])
def test_a_corpus_of_another_model_is_refused(folder, tokens, monkeypatch, capsys):
    with indexed.Writer(str(folder / "other"), np.uint16) as writer:
        writer.add_document([[1, 2, 257]])
    with indexed.Writer(str(folder / "nothing"), np.uint16) as writer:
        writer.add_document([])
    status, _, err, _ = run(monkeypatch, capsys, folder, "--data", "other", tokens=tokens)
    assert status == 2 and "token 257 at place 2, outside of model.vocab_size=257" in err
    status, _, err, _ = run(monkeypatch, capsys, folder, "--data", "nothing", tokens=tokens)
    assert status == 2 and "--data=nothing has no token" in err


def test_an_end_of_document_that_the_model_does_not_know_is_refused(tmp_path):
    prefix = tiny.write_corpus(tmp_path / "corpus", seed=0, n=3)
    cfg = tiny.make_config(data={"eod_id": tiny.VOCAB})
    with pytest.raises(errors.UserError, match=r"data\.eod_id=500 is not below"):
        token_stream.read_corpus(prefix, None, cfg, 0)
