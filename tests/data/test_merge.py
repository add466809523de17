"""Merging corpora: `gpt3jax.data.merge`."""

import sys

import numpy as np

from gpt3jax.data import indexed, merge

import corpus
import tiny


def write(prefix, seed, n=200, dtype=np.uint16):
    return tiny.write_corpus(prefix, seed, n, corpus.VOCAB, dtype)


def test_merged_corpora_follow_each_other(tmp_path, monkeypatch, capsys):
    prefixes = [write(tmp_path / name, seed, n) for name, seed, n in (("a", 1, 9), ("b", 2, 5))]
    with indexed.Writer(str(tmp_path / "c"), np.uint16) as writer:
        writer.add_document([[1, 2], [3]])
        writer.add_document([])
    prefixes.append(str(tmp_path / "c"))
    monkeypatch.setattr(indexed, "COPY_AT_ONCE", 7)
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
