"""What `gpt3jax.data.inspect` prints and dumps of corpora, documents and samples."""

import json
import sys

import numpy as np
import pytest

from gpt3jax.config import batch_schedule, recipe, schema
from gpt3jax.data import (
    indexed,
    inspect,
    loader,
    samples,
    splits,
    tokenizer_sources,
    tokenizer_training,
)

import corpus
import documents
import tiny


def write(prefix, seed):
    return tiny.write_corpus(prefix, seed, 200, corpus.VOCAB)


def call(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["inspect", *map(str, words)])
    return inspect.main()


def test_a_corpus_is_described(tmp_path, monkeypatch, capsys):
    prefix = write(tmp_path / "a", 1)
    read = indexed.IndexedCorpus(prefix)
    assert call(monkeypatch, prefix) == 0
    first, *bars = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{prefix}: 200 documents, 200 sequences, {read.n_tokens:,} tokens")
    counts = {int(b.split()[2].replace(",", "")): int(b.split()[4]) for b in bars}
    for top, count in counts.items():
        assert count == ((read.lengths > top // 2) & (read.lengths <= top)).sum() > 0
    assert sum(counts.values()) == 200


def test_text_of_documents_and_samples_is_shown(tmp_path, monkeypatch, capsys):
    files = [str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")]
    texts = ["the cat sat on the mat", "a dog barked at it", "é" * 9]
    tokenizer_training.train(texts, 300, *files)
    bpe = tokenizer_sources.from_files(*files)
    with indexed.Writer(str(tmp_path / "a"), np.uint16) as writer:
        for text in texts:
            writer.add_document([[*bpe.encode(text), bpe.eod_id]])
    words = [tmp_path / "a", "--vocab-file", files[0], "--merge-file", files[1]]
    assert call(monkeypatch, *words, "--document", "1") == 0
    assert "a dog barked at it<|endoftext|>" in capsys.readouterr().out
    assert call(monkeypatch, tmp_path / "a", "--document", "1") == 0  # no tokenizer: token ids
    assert " ".join(map(str, bpe.encode(texts[1]))) in capsys.readouterr().out
    rest = ["--seq-len", "6", "--split", "1", "--samples", "0:2"]
    assert call(monkeypatch, *words, *rest) == 0
    lines = capsys.readouterr().out.splitlines()
    source = samples.SampleMap(
        indexed.IndexedCorpus(str(tmp_path / "a")), (0, 3), samples.Request(seq_len=6, seed=1234)
    )
    tokens, _ = source.tokens(np.arange(2))
    assert lines[-1] == bpe.decode(tokens[1, :6].tolist())
    place, offset = source.sample_index[source.shuffle_index[1]]
    assert f"sequence(s) {source.document_index[place]}" in lines[-2]
    assert lines[-2].endswith(f"from token {offset} of the first")


def test_the_dump_of_a_corpus_has_its_indices_and_samples(tmp_path, monkeypatch):
    prefix, file = write(tmp_path / "a", 1), tmp_path / "new" / "dump.npz"
    words = [prefix, "--split", "8,2,0", "--which", "valid", "--seq-len", "16", "--seed", "5"]
    words += ["--n-samples", "90", "--eod", "0", "--eod-mask-loss", "--reset-position-ids"]
    assert call(monkeypatch, *words, "--samples", "3:7", "--dump", file) == 0
    source = samples.SampleMap(
        indexed.IndexedCorpus(prefix), (160, 200), samples.Request(seq_len=16, seed=5, n_samples=90)
    )
    with np.load(file) as dumped:
        assert set(dumped) == {
            "document_index", "sample_index", "shuffle_index",
            "tokens", "targets", "loss_mask", "positions",
        }  # fmt: skip
        for name in ("document_index", "sample_index", "shuffle_index"):
            np.testing.assert_array_equal(dumped[name], getattr(source, name))
        tokens, _ = source.tokens(np.arange(3, 7))
        np.testing.assert_array_equal(dumped["tokens"], tokens[:, :-1])
        np.testing.assert_array_equal(dumped["targets"], tokens[:, 1:])
        np.testing.assert_array_equal(dumped["loss_mask"] == 0, tokens[:, :-1] == 0)
        assert (dumped["positions"].max(1) < 15).any()


def test_the_dump_of_a_blend_has_that_of_its_parts(tmp_path, monkeypatch):
    a, b, file = write(tmp_path / "a", 1), write(tmp_path / "b", 2), tmp_path / "dump.npz"
    words = ["3", a, "1", b, "--seq-len", "16", "--dump", file]
    assert call(monkeypatch, *words) == 2  # a weighted blend has no epoch
    assert call(monkeypatch, *words, "--n-samples", "100") == 0
    with np.load(file) as dumped:
        assert np.bincount(dumped["dataset_index"]).tolist() == [75, 25]
        for i, prefix in enumerate((a, b)):
            n = int(np.ceil((75, 25)[i] * 1.005))
            bounds = samples.split_bounds("949,50,1", 200)[0]
            part = samples.SampleMap(
                indexed.IndexedCorpus(prefix),
                bounds,
                samples.Request(seq_len=16, seed=1234, n_samples=n),
            )
            np.testing.assert_array_equal(dumped[f"{i}.shuffle_index"], part.shuffle_index)


def test_the_samples_of_a_step_are_those_that_it_trains_on(tmp_path, monkeypatch, capsys):
    folder = corpus.write_run(tmp_path)
    monkeypatch.chdir(folder)
    words = ["--config", "recipe.py", "--dump", "dump.npz"]
    assert call(monkeypatch, *words, "--step", "4") == 0
    assert "sample 24: corpus, sequence(s)" in capsys.readouterr().out
    cfg = recipe.load("recipe.py")
    opened = splits.open_splits(cfg, 40, 320)
    stretches = (batch_schedule.Stretch(0, 0, 8, 40),)
    step_4 = loader.Batches(opened.train, cfg, stretches, 8, np.arange(8))[3]
    with np.load("dump.npz") as dumped:
        np.testing.assert_array_equal(dumped["tokens"], step_4["tokens"][0])


def test_the_tokenizer_of_a_config_shows_texts(tmp_path, monkeypatch, capsys):
    files = [str(tmp_path / name) for name in ("vocab.json", "merges.txt")]
    tokenizer_training.train([], 257, *files)
    bpe = tokenizer_sources.from_files(*files)
    bpe.backend.save(str(tmp_path / "tokenizer.json"))
    with indexed.Writer(str(tmp_path / "texts"), np.uint16) as writer:
        writer.add_document([bpe.encode("Friends, Romans")])
    data = {"paths": (str(tmp_path / "texts"),), "tokenizer": str(tmp_path / "tokenizer.json")}
    cfg = tiny.make_config(data={**data, "eod_id": 0})
    (tmp_path / "config.json").write_text(json.dumps(schema.flatten(cfg)))
    assert call(monkeypatch, "--config", str(tmp_path / "config.json"), "--document", "0") == 0
    assert capsys.readouterr().out.endswith("Friends, Romans\n")


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "give the prefix of a corpus"),
        (["a", "--config", "recipe.py"], "give the prefix of a corpus"),
        (["corpus", "--step", "3"], "--step needs --config"),
        (["corpus", "--samples", "4"], "must be A:B"),
        (["corpus", "--samples", "4:4"], "must be A:B"),
        (["corpus", "--seq-len", "16", "--samples", "0:9999999"], "the train split has"),
        (["corpus", "--document", "600"], "corpus has 600, from 0 on"),
        (["corpus", "--split", "1", "--which", "test", "--dump", "x"], "leaves nothing for test"),
        (["nowhere"], "nowhere.idx: no such file"),
        (["--config", "recipe.py", "--step", "0"], "--step=0 must be at least 1"),
        (["--config", "recipe.py", "--which", "valid", "--dump", "x"], "has no valid split"),
    ],
)
def test_what_cannot_be_shown_is_an_error_of_one_line(
    tmp_path, monkeypatch, capsys, words, message
):
    monkeypatch.chdir(corpus.write_run(tmp_path))
    assert call(monkeypatch, *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("gpt3jax: error: ") and message in line and documents.points_on(line)


def test_a_recipe_without_a_corpus_is_refused_as_such(repository, monkeypatch, capsys):
    assert call(monkeypatch, "--config", repository / "configs" / "345m.py", "--step", "1") == 2
    assert "data.paths is empty" in capsys.readouterr().err
