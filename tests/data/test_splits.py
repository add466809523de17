"""The splits of a run: mock data, corpora of their own, and how many samples each needs."""

import numpy as np
import pytest

from gpt3jax import errors
from gpt3jax.config import validation
from gpt3jax.data import mock, samples, splits

import corpus
import tiny


def write(prefix, seed):
    return tiny.write_corpus(prefix, seed, 200, corpus.VOCAB)


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
