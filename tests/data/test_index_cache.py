"""The index cache: the same indices, built once, by one of several processes."""

import json
import multiprocessing

import numpy as np
import pytest

from gpt3jax import errors
from gpt3jax.data import indexed, samples, splits

import corpus
import tiny


def write(prefix, seed):
    return tiny.write_corpus(prefix, seed, 200, corpus.VOCAB)


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
