"""Looking into corpora: the contract of `gpt3jax.data.inspect`, merging, mock data, the cache."""

import json
import multiprocessing
import sys

import numpy as np
import pytest

from gpt3jax import errors
from gpt3jax.config import batch_schedule, recipe, schema, validation
from gpt3jax.data import (
    indexed,
    inspect,
    loader,
    merge,
    mock,
    samples,
    splits,
    tokenizer_sources,
    tokenizer_training,
)

import corpus
import tiny


def write(prefix, seed, n=200, dtype=np.uint16):
    return tiny.write_corpus(prefix, seed, n, corpus.VOCAB, dtype)


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
    "words, told",
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
def test_what_cannot_be_shown_is_said_in_a_line(tmp_path, monkeypatch, capsys, words, told):
    monkeypatch.chdir(corpus.write_run(tmp_path))
    assert call(monkeypatch, *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("gpt3jax: error: ") and told in line


def test_a_recipe_without_a_corpus_is_refused_as_such(repository, monkeypatch, capsys):
    assert call(monkeypatch, "--config", repository / "configs" / "345m.py", "--step", "1") == 2
    assert "data.paths is empty" in capsys.readouterr().err


def test_merged_corpora_follow_each_other(tmp_path, monkeypatch, capsys):
    prefixes = [write(tmp_path / name, seed, n) for name, seed, n in (("a", 1, 9), ("b", 2, 5))]
    with indexed.Writer(str(tmp_path / "c"), np.uint16) as writer:
        writer.add_document([[1, 2], [3]])
        writer.add_document([])
    prefixes.append(str(tmp_path / "c"))
    monkeypatch.setattr(indexed, "_COPY_AT_ONCE", 7)
    new = str(tmp_path / "new")
    monkeypatch.setattr(sys, "argv", ["merge", "--input", *prefixes, "--output-prefix", new])
    assert merge.main() == 0
    assert "16 documents" in capsys.readouterr().out
    merged, parts = indexed.IndexedCorpus(new), [indexed.IndexedCorpus(p) for p in prefixes]
    np.testing.assert_array_equal(merged.tokens, np.concatenate([p.tokens for p in parts]))
    np.testing.assert_array_equal(merged.lengths, np.concatenate([p.lengths for p in parts]))
    ends = [*range(15), 16, 16]
    np.testing.assert_array_equal(merged.document_indices, ends)
    for wrong, message in (
        (["--output-prefix", prefixes[0]], "none of them"),
        ([], "int32 tokens"),
    ):
        wide = write(tmp_path / "wide", 3, dtype=np.int32)
        words = ["merge", "--input", prefixes[0], wide, "--output-prefix", new, *wrong]
        monkeypatch.setattr(sys, "argv", words)
        assert merge.main() == 2
        assert message in capsys.readouterr().err


def test_mock_data_are_megatrons():
    """Lengths: the first, the sum and the MD5 recorded from Megatron; tokens by its formula."""
    made = mock.MockCorpus(50_257, 50_256)
    assert made.lengths[:8].tolist() == [3484, 2609, 2094, 1105, 1261, 168, 309, 68]
    assert made.n_tokens == made.lengths.sum(dtype=np.int64) == 204_637_097
    pieces = np.array([[5, 0, 168], [5, 160, 8], [2, 1000, 3]])
    got = np.split(made.gather(*pieces.T), np.cumsum(pieces[:-1, 2]))
    whole = np.append((np.arange(167) + 1) % 50_257, 50_256)
    np.testing.assert_array_equal(got[0], whole)
    np.testing.assert_array_equal(got[1], whole[160:])
    np.testing.assert_array_equal(got[2], [1001, 1002, 1003])
    small = mock.MockCorpus(100, 0)
    np.testing.assert_array_equal(small.head(5000)[95:103], [96, 97, 98, 99, 0, 1, 2, 3])
    assert len(small.head(5000)) == 5000 and small.head(5000)[3483] == 0


def test_a_run_on_mock_data_needs_no_files():
    cfg = tiny.make_config(data={"paths": (), "mock": True})
    opened = splits.open_splits(cfg, 6, 96)
    assert len(opened.train) > 2_000_000 and len(opened.validation) > 2_000_000  # a third each
    batch = samples.read(opened.train, cfg.data, np.arange(4))
    assert batch["tokens"].shape == (4, 32) and batch["tokens"].max() < tiny.VOCAB
    with pytest.raises(errors.UserError, match=r"data.paths and data.mock each say"):
        validation.validate(tiny.make_config(data={"mock": True}))


def test_each_split_may_have_corpora_of_its_own(tmp_path):
    names = ["a", "b", "c"]
    a, b, c = (write(tmp_path / name, seed) for seed, name in enumerate(names))
    data = {"paths": (), "train_paths": ("2", a, "1", b), "validation_paths": (c,)}
    opened = splits.open_splits(tiny.make_config(data=data), 6, 96)
    assert [m.corpus.prefix for m in opened.train.maps] == [a, b]
    assert opened.train.maps[0].document_index.max() == 199  # all of it: no split
    assert opened.validation.corpus.prefix == c and opened.test is None
    with pytest.raises(errors.UserError, match=r"go with data.train_paths"):
        validation.validate(tiny.make_config(data={"validation_paths": ("x",)}))
    with pytest.raises(errors.UserError, match=r"data.validation_paths=1 .* stands where a weight"):
        splits.open_splits(
            tiny.make_config(data=data | {"validation_paths": ("1", c, "x", c)}), 6, 96
        )


def test_more_validation_samples_than_can_be_numbered_are_refused(tmp_path):
    data = {"paths": (write(tmp_path / "a", 1),)}
    cfg = tiny.make_config(data=data, train={"eval_batches": 10**8, "eval_interval": 1})
    with pytest.raises(errors.UserError, match=r"train.eval_batches=100000000 takes .* in 3 eval"):
        splits.open_splits(cfg, 2, 32)


def test_the_last_validation_sample_may_be_partial(tmp_path):
    prefix = write(tmp_path / "a", 1)
    data = {"paths": (prefix,), "split": "1,9,0"}
    whole, partial = (
        splits.open_splits(
            tiny.make_config(
                data={**data, "drop_last_partial_validation_sequence": drop},
                train={"eval_batches": 1, "eval_interval": 100},
            ),
            6,
            96,
        ).validation
        for drop in (True, False)
    )
    assert len(partial) == len(whole) + 1


def build_map(arguments):
    prefix, cache = arguments
    source = samples.SampleMap(
        indexed.IndexedCorpus(prefix),
        (0, 200),
        samples.Request(seq_len=16, seed=5, n_samples=900, cache=str(cache)),
    )
    return source.shuffle_index.tolist(), type(source.shuffle_index.base).__name__


def test_cached_indices_are_those_built_and_are_built_once(tmp_path, monkeypatch):
    prefix, cache = write(tmp_path / "a", 1), tmp_path / "cache"
    built, kind = build_map((prefix, ""))
    assert kind != "memmap"
    assert build_map((prefix, cache)) == (built, "memmap")
    monkeypatch.setattr(samples, "build_sample_index", None)  # no more building
    assert build_map((prefix, cache)) == (built, "memmap")
    (entry,) = [path for path in cache.iterdir() if path.is_dir()]
    assert json.loads((entry / "key.json").read_text())["seed"] == 5
    with pytest.raises(TypeError):
        samples.SampleMap(
            indexed.IndexedCorpus(prefix),
            (0, 200),
            samples.Request(seq_len=16, seed=6, n_samples=900, cache=str(cache)),
        )
    monkeypatch.undo()
    file = entry / "shuffle_index.npy"
    file.write_bytes(file.read_bytes()[:-5])  # cut: built again
    assert build_map((prefix, cache)) == (built, "memmap")
    assert len(np.load(file)) == len(built)


def test_blends_are_cached_with_their_parts(tmp_path):
    a, b = write(tmp_path / "a", 1), write(tmp_path / "b", 2)
    data = {"paths": ("3", a, "1", b), "split": "1", "index_cache": str(tmp_path / "cache")}
    plain = tiny.make_config(data={**data, "index_cache": ""})
    first, again, fresh = (
        splits.open_splits(cfg, 6, 960).train
        for cfg in (tiny.make_config(data=data), tiny.make_config(data=data), plain)
    )
    numbers = np.arange(960)
    for other in (first, again):
        np.testing.assert_array_equal(other.tokens(numbers)[0], fresh.tokens(numbers)[0])
    assert len([p for p in (tmp_path / "cache").iterdir() if p.is_dir()]) == 3


def test_processes_that_race_for_a_cache_get_the_same(tmp_path):
    prefix = write(tmp_path / "a", 1)
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        built = pool.map(build_map, [(prefix, tmp_path / "cache")] * 8, chunksize=1)
    assert built == [(build_map((prefix, ""))[0], "memmap")] * 8
    assert len([p for p in (tmp_path / "cache").iterdir() if p.is_dir()]) == 1


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.UserError, match=r"data.index_cache=.*file"):
        build_map((write(tmp_path / "a", 1), tmp_path / "file" / "cache"))
