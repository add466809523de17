"""The sample mapping against Megatron's own, byte for byte, and against a slow one by its rules."""

import json
import math
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt3jax import errors
from gpt3jax.config import schema
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
    request = samples.Request(
        seq_len=case["seq_length"],
        seed=case["seed"],
        n_samples=case["num_samples"][which],
        keep_partial=split == "valid" and not case["drop_last_partial_validation_sequence"],
    )
    return samples.SampleMap(corpus, bounds, request)


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
    data = schema.Data(
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


TINY = [5, 3, 9, 1, 7, 4, 12, 2, 6, 8]
DOCUMENTS = [7, 2, 9, 1, 0, 8, 4, 5, 6, 3]
STARTS = [[0, 0], [1, 6], [2, 5], [4, 2], [5, 5], [7, 0], [8, 4], [9, 0]]


@pytest.mark.parametrize(
    ("n_samples", "shuffled"),
    [
        (None, [6, 4, 0, 5, 3, 2, 1]),
        (5, [6, 4, 0, 5, 3, 2, 1]),
        (9, [5, 1, 4, 3, 0, 2, 6, 12, 8, 7, 11, 10, 13, 9]),
        (14, [7, 10, 4, 1, 12, 8, 3, 9, 6, 13, 5, 11, 0, 2]),
    ],
)
def test_indices_are_those_verified_by_hand(tmp_path, n_samples, shuffled):
    ours = samples.SampleMap(
        write(tmp_path / "c", TINY),
        (0, 10),
        samples.Request(seq_len=8, seed=1234, n_samples=n_samples),
    )
    assert ours.shuffle_index.tolist() == shuffled
    if len(shuffled) == 7:
        assert ours.document_index.tolist() == DOCUMENTS
        assert ours.sample_index.tolist() == STARTS


def write(prefix, lengths):
    """Return a corpus of documents of these lengths; its tokens count up from 0."""
    flat = np.arange(sum(lengths), dtype=np.int32)
    with indexed.Writer(str(prefix), np.int32) as writer:
        for document in np.split(flat, np.cumsum(lengths)[:-1]):
            writer.add_document([document])
    return indexed.IndexedCorpus(str(prefix))


def slow_map(lengths, seq_len, n_samples, seed):
    """Return the samples in order, of tokens that count up, from the prose alone."""
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
    at_once=st.sampled_from([(1, 1), (3, 50), (1000, 1000)]),
)
def test_random_corpora_give_the_samples_that_the_rules_say(
    tmp_path_factory, lengths, seq_len, n_samples, seed, at_once
):
    corpus = write(tmp_path_factory.mktemp("corpus") / "c", lengths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "INDEX_AT_ONCE", at_once[0])
        patch.setattr(samples, "READ_AT_ONCE", at_once[1])
        ours = samples.SampleMap(
            corpus,
            (0, len(lengths)),
            samples.Request(seq_len=seq_len, seed=seed, n_samples=n_samples),
        )
        expected = slow_map(lengths, seq_len, n_samples, seed)
        assert len(ours) == len(expected) >= (n_samples or 0)
        tokens, n_real = ours.tokens(np.arange(len(ours)))
    assert tokens.tolist() == expected
    assert (n_real == seq_len + 1).all()


def test_samples_are_read_in_any_order_and_number(tmp_path):
    ours = samples.SampleMap(
        write(tmp_path / "c", [0, 30, 0, 0, 1, 25, 0]),
        (0, 7),
        samples.Request(seq_len=5, seed=1, n_samples=40),
    )
    whole, _ = ours.tokens(np.arange(len(ours)))
    for numbers in ([], [3], [7, 7, 0], list(range(len(ours)))[::-1]):
        tokens, n_real = ours.tokens(np.array(numbers, np.int64))
        np.testing.assert_array_equal(tokens, whole[numbers])
        assert n_real.tolist() == [6] * len(numbers)


def test_a_partial_sample_is_padded_among_whole_ones(tmp_path):
    corpus = write(tmp_path / "c", [9, 8, 6])  # 23 tokens: 2 samples of 8, and 7 tokens
    ours = samples.SampleMap(corpus, (0, 3), samples.Request(seq_len=8, seed=1, keep_partial=True))
    assert len(ours) == 3
    tokens, n_real = ours.tokens(np.arange(3))
    last = ours.shuffle_index.tolist().index(2)
    assert n_real.tolist() == [7 if k == last else 9 for k in range(3)]
    assert (tokens[last, 7:] == 0).all()
    batch = samples.read(ours, schema.Data(), np.arange(3))
    assert batch["loss_mask"].sum(axis=1).tolist() == [6 if k == last else 8 for k in range(3)]
    flat = [t for k in np.argsort(ours.shuffle_index) for t in tokens[k, : n_real[k] - 1]]
    assert sorted([*flat, tokens[last, 6]]) == list(range(23))


def seen_by_the_rules(tokens, eod):
    """Return positions, and what each token may attend to, by stepping through the tokens."""
    positions, starts, start = [], [], 0
    for i, token in enumerate(tokens):
        positions.append(i - start)
        starts.append(start)
        start = i + 1 if token == eod else start
    return positions, [
        [start <= j <= i for j in range(len(tokens))] for i, start in enumerate(starts)
    ]


@given(st.lists(st.lists(st.integers(0, 3), min_size=12, max_size=12), min_size=1, max_size=3))
def test_documents_end_as_the_rules_say(rows):
    data = schema.Data(
        eod_id=0, eod_mask_loss=True, reset_position_ids=True, reset_attention_mask=True
    )
    mask, positions, segments = samples.end_of_document_effects(np.array(rows), data)
    assert (mask.dtype, positions.dtype, segments.dtype) == (np.float32, np.int32, np.int32)
    causal = np.tri(12, dtype=bool)
    for i, row in enumerate(rows):
        expected_positions, seen = seen_by_the_rules(row, 0)
        assert positions[i].tolist() == expected_positions
        assert (causal & (segments[i][:, None] == segments[i])).tolist() == seen
        assert mask[i].tolist() == [float(token != 0) for token in row]


def test_switches_that_are_off_change_nothing():
    tokens = np.array([[0, 1, 0, 2]])
    mask, positions, segments = samples.end_of_document_effects(tokens, schema.Data(eod_id=0))
    assert mask.tolist() == [[1, 1, 1, 1]]
    assert positions.tolist() == [[0, 1, 2, 3]]
    assert segments is None
    mask, positions, segments = samples.end_of_document_effects(
        tokens, schema.Data(eod_id=0, reset_attention_mask=True)
    )
    assert mask.tolist() == [[1, 1, 1, 1]]
    assert positions.tolist() == [[0, 1, 2, 3]]
    assert segments is not None


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
    assert samples.split_bounds("8 .5 1.5", 100) == [(0, 80), (80, 85), (85, 100)]
    for bad in ("", "0,0,0", "a,b", "1,2,3,4", "1.2.3", ".", "90,-5,5", "1e3,2", "nan"):
        with pytest.raises(errors.UserError, match=r"data.split=.*three weights"):
            samples.split_bounds(bad, 100)


def test_epochs_of_terabytes_are_counted_without_a_loop():
    epochs = samples.Epochs.needed(n_tokens=3_000_000_007, seq_len=2048, n_samples=146_484_375)
    assert epochs.n == math.ceil((146_484_375 * 2048 + 1) / 3_000_000_007)
    assert epochs.n_samples_before_last == (99 * 3_000_000_007 - 1) // 2048


def test_a_split_that_gets_no_document_is_refused_by_name(tmp_path):
    corpus = write(tmp_path / "c", [9] * 10)
    for n in (None, 3):
        with pytest.raises(
            errors.UserError, match=r"data.split='949,50,1' gives the test split none of the 10 .*c"
        ):
            samples.build(
                corpus, "949,50,1", "test", samples.Request(seq_len=4, seed=1, n_samples=n)
            )
    assert (
        samples.build(corpus, "949,50,1", "test", samples.Request(seq_len=4, seed=1, n_samples=0))
        is None
    )
    assert (
        samples.build(corpus, "949,50,0", "test", samples.Request(seq_len=4, seed=1, n_samples=3))
        is None
    )
    assert (
        len(
            samples.build(
                corpus, "949,50,1", "validation", samples.Request(seq_len=4, seed=1, n_samples=3)
            )
        )
        >= 3
    )


@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_a_corpus_without_tokens_is_refused(tmp_path, lengths):
    with indexed.Writer(str(tmp_path / "c"), np.uint16) as writer:
        for _ in lengths:
            writer.add_document([[]])
    corpus = indexed.IndexedCorpus(str(tmp_path / "c"))
    with pytest.raises(errors.UserError, match=r"c: there is no token in documents 0 to"):
        samples.SampleMap(
            corpus, (0, len(lengths)), samples.Request(seq_len=4, seed=1, n_samples=1)
        )


def test_a_corpus_of_one_token_is_repeated_as_often_as_needed(tmp_path):
    ours = samples.SampleMap(
        write(tmp_path / "c", [1]), (0, 1), samples.Request(seq_len=4, seed=1, n_samples=7)
    )
    assert len(ours) == 7
    assert ours.epochs.n == 29  # 7 x 4 + 1 tokens
    assert (ours.tokens(np.arange(7))[0] == 0).all()
