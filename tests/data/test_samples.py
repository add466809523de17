"""The sample mapping against Megatron's own, byte for byte, and against a slow one by its rules."""

import json
import math
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt3jax import config
from gpt3jax.data import indexed, samples

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "megatron_data"
CASES = [
    case
    for case in json.loads((GOLDEN / "cases.json").read_text())["cases"]
    if case.get("blend") and len(case["blend"][0]) == 1 and not case["blend"][1]
]


def golden_split(case, split):
    """Return our map of a split of a case, or None."""
    corpus = indexed.IndexedCorpus(str(GOLDEN / "corpora" / case["blend"][0][0]))
    which = ["train", "valid", "test"].index(split)
    bounds = samples.split_bounds(case["split"], len(corpus))[which]
    if bounds is None:
        return None
    return samples.SampleMap(
        corpus,
        bounds,
        case["seq_length"],
        case["num_samples"][which],
        case["seed"],
        keep_partial=split == "valid" and not case["drop_last_partial_validation_sequence"],
    )


@pytest.mark.parametrize("split", ["train", "valid", "test"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_indices_and_samples_are_megatrons(case, split):
    expect = case["expect"][split]
    ours = golden_split(case, split)
    if expect is None:
        assert ours is None
        return
    golden = np.load(GOLDEN / f"{case['name']}.npz")
    assert len(ours) == expect["len"]
    for name in ("document_index", "sample_index", "shuffle_index"):
        theirs = golden[f"{split}.{name}"]
        assert getattr(ours, name).dtype == theirs.dtype, name
        np.testing.assert_array_equal(getattr(ours, name), theirs, err_msg=name)
    numbers = golden[f"{split}.sample_ids"]
    if not len(numbers):
        return
    data = config.Data(
        eod_id=case["eod"],
        eod_mask_loss=case["eod_mask_loss"],
        reset_position_ids=case["reset_position_ids"],
        reset_attention_mask=case["reset_attention_mask"],
    )
    batch = samples.read(ours, data, numbers)
    for ours_name, name in (
        ("tokens", "tokens"), ("targets", "labels"), ("positions", "position_ids"),
        ("loss_mask", "loss_mask"),
    ):  # fmt: skip
        np.testing.assert_array_equal(batch[ours_name], golden[f"{split}.{name}"], err_msg=name)
    if case["reset_attention_mask"]:
        theirs = golden[f"{split}.attention_mask"]  # True = hidden
        segments = batch["segments"][: len(theirs)]
        causal = np.tri(case["seq_length"], dtype=bool)
        seen = causal & (segments[:, :, None] == segments[:, None, :])
        np.testing.assert_array_equal(seen, ~theirs)


def slow_map(lengths, seq_len, n_samples, seed):
    """Return (starting tokens of samples in order) from the prose alone, with flat token ids."""
    total, epochs = sum(lengths), 1
    while n_samples is not None and epochs * total < n_samples * seq_len + 1:
        epochs += 1
    separate = False
    before_last = ((epochs - 1) * total - 1) // seq_len
    if epochs > 1:
        last = n_samples - before_last
        separate = last < int(0.8 * ((total - 1) // seq_len))
    random = np.random.RandomState(seed)
    documents = list(range(len(lengths)))
    order = documents * (epochs - 1 if separate else epochs)
    random.shuffle(order := np.array(order, np.int32))
    if separate:
        random.shuffle(tail := np.array(documents, np.int32))
        order = np.concatenate([order, tail])
    starts = np.cumsum([0, *lengths])
    flat = [starts[d] + i for d in order for i in range(lengths[d])]
    n = (epochs * total - 1) // seq_len
    shuffled = np.arange(before_last if separate else n)
    random.shuffle(shuffled)
    if separate and before_last != n:
        random.shuffle(rest := np.arange(before_last, n))
        shuffled = np.concatenate([shuffled, rest])
    return [flat[k * seq_len : k * seq_len + seq_len + 1] for k in shuffled]


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=40).filter(lambda x: sum(x) > 1),
    seq_len=st.integers(1, 20),
    n_samples=st.one_of(st.none(), st.integers(1, 200)),
    seed=st.integers(0, 2**32 - 1),
)
def test_random_corpora_give_the_samples_that_the_rules_say(
    tmp_path_factory, lengths, seq_len, n_samples, seed
):
    prefix = str(tmp_path_factory.mktemp("corpus") / "c")
    flat = np.arange(sum(lengths), dtype=np.int32)
    with indexed.Writer(prefix, np.int32) as writer:
        for document in np.split(flat, np.cumsum(lengths)[:-1]):
            writer.add_document([document])
    ours = samples.SampleMap(
        indexed.IndexedCorpus(prefix), (0, len(lengths)), seq_len, n_samples, seed
    )
    expected = slow_map(lengths, seq_len, n_samples, seed)
    assert len(ours) == len(expected)
    if expected:
        tokens, n_real = ours.tokens(np.arange(len(ours)))
        np.testing.assert_array_equal(tokens, expected)
        assert (n_real == seq_len + 1).all()


@pytest.mark.parametrize(
    ("n", "bounds"),
    [
        (10, [(0, 9), (9, 10), (10, 10)]),
        (1000, [(0, 949), (949, 999), (999, 1000)]),
        (12_000_000, [(0, 11_388_000), (11_388_000, 11_988_000), (11_988_000, 12_000_000)]),
    ],
)
def test_split_bounds_are_megatrons(n, bounds):
    assert samples.split_bounds("949,50,1", n) == bounds
    assert samples.split_bounds("949, 50 ,1", n) == bounds


def test_a_split_without_weight_has_no_samples():
    assert samples.split_bounds("98,2,0", 100)[2] is None
    assert samples.split_bounds("1", 100) == [(0, 100), None, None]
    for bad in ("", "0,0,0", "a,b", "1,2,3,4"):
        with pytest.raises(config.UserError, match=r"data.split=.*three weights"):
            samples.split_bounds(bad, 100)


def test_epochs_of_terabytes_are_counted_without_a_loop():
    epochs = samples.Epochs.needed(n_tokens=3_000_000_007, seq_len=2048, n_samples=146_484_375)
    assert epochs.n == math.ceil((146_484_375 * 2048 + 1) / 3_000_000_007)
    assert epochs.n_samples_before_last == (99 * 3_000_000_007 - 1) // 2048
