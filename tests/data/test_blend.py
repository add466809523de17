"""Blends against Megatron's own, byte for byte, and against a slow one by its rules."""

import json
import math
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt3jax import errors
from gpt3jax.config import schema
from gpt3jax.data import blend, blend_order, indexed, samples

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "megatron_data"
CASES = json.loads((GOLDEN / "cases.json").read_text())["cases"]
SPLITS = ("train", "valid", "test")
INDICES = ("document_index", "sample_index", "shuffle_index")


def golden_build(case, which):
    """Return our samples of a split of a case, of one corpus or of a blend."""
    own = case.get("blend_per_split")
    chosen = own[which] if own else case["blend"]
    if chosen is None:
        return None
    corpora = [indexed.IndexedCorpus(str(GOLDEN / "corpora" / prefix)) for prefix in chosen[0]]
    source = blend.Source(corpora, chosen[1], None if own else case["split"])
    request = samples.Request(
        seq_len=case["seq_length"],
        seed=case["seed"],
        n_samples=case["num_samples"][which],
        keep_partial=which == 1 and not case["drop_last_partial_validation_sequence"],
    )
    return blend.build(source, samples.SPLITS[which], request)


def check_same(ours, golden, names):
    for name, key in names:
        array = getattr(ours, name)
        assert array.dtype == golden[key].dtype, key
        np.testing.assert_array_equal(array, golden[key], err_msg=key)


def check_blend(ours, expect, golden, split):
    assert ours.weights.tolist() == expect["weights"]
    check_same(
        ours, golden, [(n, f"{split}.{n}") for n in ("dataset_index", "dataset_sample_index")]
    )
    assert len(ours.maps) == len(expect["datasets"])
    for i, (ours_part, part) in enumerate(zip(ours.maps, expect["datasets"], strict=True)):
        assert len(ours_part) == part["len"]
        check_same(ours_part, golden, [(name, f"{split}.{i}.{name}") for name in INDICES])


@pytest.mark.parametrize("which", range(3), ids=SPLITS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_indices_and_samples_are_megatrons(case, which):
    split = SPLITS[which]
    expect, ours = case["expect"][split], golden_build(case, which)
    if expect is None:
        assert ours is None
        return
    golden = np.load(GOLDEN / f"{case['name']}.npz")
    assert len(ours) == expect["len"]
    assert isinstance(ours, blend.Blend) == (expect["class"] == "BlendedDataset")
    if isinstance(ours, blend.Blend):
        check_blend(ours, expect, golden, split)
    else:
        check_same(ours, golden, [(name, f"{split}.{name}") for name in INDICES])
    numbers = golden[f"{split}.sample_ids"]
    if not len(numbers):
        return
    switches = ("eod_mask_loss", "reset_position_ids", "reset_attention_mask")
    data = schema.Data(eod_id=case["eod"], **{name: case[name] for name in switches})
    batch = samples.read(ours, data, numbers)
    for name, theirs in (
        ("tokens", "tokens"), ("targets", "labels"), ("positions", "position_ids"),
        ("loss_mask", "loss_mask"),
    ):  # fmt: skip
        np.testing.assert_array_equal(batch[name], golden[f"{split}.{theirs}"], err_msg=name)
    if case["reset_attention_mask"]:
        hidden = golden[f"{split}.attention_mask"]
        segments = batch["segments"][: len(hidden)]
        seen = np.tri(case["seq_length"], dtype=bool) & (segments[:, :, None] == segments[:, None])
        np.testing.assert_array_equal(seen, ~hidden)


def slow_order(weights, size, limits=None):
    """Choose the map that is furthest behind its share, step by step, in Python's own floats."""
    counts, order, before = [0] * len(weights), [], []
    for k in range(size):
        lags = {
            i: weight * float(max(k, 1)) - counts[i]
            for i, weight in enumerate(weights)
            if limits is None or counts[i] < limits[i]
        }
        chosen = max(lags, key=lambda i: (lags[i], -i))
        order.append(chosen)
        before.append(counts[chosen])
        counts[chosen] += 1
    return order, before


def check_order(weights, size, limits=None):
    order = blend_order.choose_maps(np.array(weights, np.float64), size, limits)
    before, totals = blend_order.count_before(order, len(weights))
    expected, expected_before = slow_order(weights, size, limits)
    assert order.tolist() == expected
    assert before.tolist() == expected_before
    assert totals == [expected.count(i) for i in range(len(weights))]


def test_the_order_is_the_one_verified_by_hand():
    order = blend_order.choose_maps(np.array([0.5, 0.3, 0.2]), 12)
    assert order.tolist() == [0, 1, 2, 0, 1, 0, 2, 0, 1, 0, 0, 1]
    assert blend_order.count_before(order, 3)[0].tolist() == [0, 0, 0, 1, 1, 2, 1, 3, 2, 4, 5, 3]


# Irrational shares, and small fractions whose ties must go to the first.
SHARES = st.one_of(
    st.lists(st.floats(1e-4, 1), min_size=1, max_size=12),
    st.lists(st.integers(1, 6), min_size=1, max_size=6),
)


@settings(max_examples=100, deadline=None)
@given(
    raw=SHARES,
    size=st.integers(0, 700),
    segment=st.integers(1, 40),
    lead_in=st.integers(0, 40),
    is_good=st.booleans(),
)
def test_segments_join_to_the_one_order_whatever_their_guesses(
    raw, size, segment, lead_in, is_good
):
    weights = blend_order.normalise(raw).tolist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blend_order, "MIN_SEGMENT", segment)
        patch.setattr(blend_order, "LEAD_IN", lead_in)
        if not is_good:
            patch.setattr(blend_order, "guess_counts", lambda w, k: np.zeros((len(w), len(k))))
        check_order(weights, size)


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.integers(1, 80), min_size=1, max_size=8), segment=st.integers(1, 40))
def test_all_samples_of_all_maps_come_once(sizes, segment):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blend_order, "MIN_SEGMENT", segment)
        check_order([n / sum(sizes) for n in sizes], sum(sizes), np.array(sizes))


def test_a_map_without_samples_left_is_not_chosen_again():
    """Shares that are not the sizes: only the limit keeps the first map from coming more often."""
    check_order([0.9, 0.1], 30, np.array([3, 27]))


def test_long_orders_are_exact():
    weights = blend_order.normalise([18.1, 16, 14.4, 12.1, 0.3, 0.01]).tolist()
    check_order(weights, 40_000)
    check_order([0.5, 0.5], 5_000)


def test_a_good_guess_leaves_little_to_repair(monkeypatch):
    """Else a blend of 100M samples would take an hour."""
    n_steps = []
    run = blend_order.run_steps

    def counted(weights, starts, counts, n, limits):
        n_steps.append(len(starts) * n)
        return run(weights, starts, counts, n, limits)

    monkeypatch.setattr(blend_order, "run_steps", counted)
    for shares in (range(1, 23), [0.5, 0.3, 0.2], [1] + [1e-4] * 30):
        blend_order.choose_maps(blend_order.normalise(shares), 200_000)
        assert sum(n_steps) < 2 * 200_000, shares
        n_steps.clear()


def write(prefix, lengths, first=0):
    """Write documents of these lengths whose tokens count up from `first`."""
    with indexed.Writer(str(prefix), np.int32) as writer:
        for length in lengths:
            writer.add_document([np.arange(first, first + length, dtype=np.int32)])
            first += length
    return indexed.IndexedCorpus(str(prefix))


def build(corpora, weights, split, name, seq_len, n_samples):
    request = samples.Request(seq_len=seq_len, seed=1, n_samples=n_samples)
    return blend.build(blend.Source(corpora, weights, split), name, request)


@pytest.fixture
def corpora(tmp_path):
    return [write(tmp_path / f"c{i}", [20] * 10, first=1000 * i) for i in range(3)]


def test_a_sample_comes_from_its_map(corpora):
    ours = build(corpora, [5.0, 3.0, 2.0], "1", "train", 8, 100)
    tokens, n_real = ours.tokens(np.arange(len(ours)))
    np.testing.assert_array_equal(tokens // 1000, np.repeat(ours.dataset_index[:, None], 9, 1))
    for k in (0, 7, len(ours) - 1):
        row = ours.maps[ours.dataset_index[k]].tokens(ours.dataset_sample_index[k : k + 1])[0]
        np.testing.assert_array_equal(tokens[k : k + 1], row)
    assert (n_real == 9).all()


def test_each_corpus_prepares_its_share_and_half_a_percent(corpora):
    ours = build(corpora, [5.0, 3.0, 2.0], "1", "train", 8, 1000)
    assert len(ours) == 1000
    for part, n in zip(ours.maps, (500, 300, 200), strict=True):
        wanted = math.ceil(n * 1.005)
        assert part.epochs == samples.Epochs.needed(200, 8, wanted)


def test_without_weights_each_counts_by_its_samples_up_to_all(corpora, tmp_path):
    corpora = [*corpora[:2], write(tmp_path / "big", [20] * 30)]
    sized = build(corpora, None, "1", "train", 8, 20)
    assert len(sized) == 20
    assert [len(m) for m in sized.maps] == [24, 24, 74]
    assert np.bincount(sized.dataset_index).tolist() == [4, 4, 12]
    assert len(build(corpora, None, "1", "train", 8, 10**6)) == 122
    assert len(build(corpora, None, "1", "train", 8, None)) == 122


def test_one_corpus_is_a_blend_only_with_a_weight_and_shared_splits(corpora):
    def kind(weights, split):
        return type(build(corpora[:1], weights, split, "train", 8, 10))

    assert kind(None, "1") is samples.SampleMap
    assert kind([1.0], "1") is blend.Blend
    assert kind([1.0], None) is samples.SampleMap


def test_a_split_without_weight_or_samples_is_none(corpora):
    for weights in (None, [1.0, 1.0, 1.0]):
        assert build(corpora, weights, "9,1,0", "test", 8, 5) is None
        assert build(corpora, weights, "8,1,1", "test", 8, 0) is None


@pytest.mark.parametrize("weight", [0.0, -1.0, math.inf, math.nan])
def test_a_weight_that_is_not_above_zero_is_refused(corpora, weight):
    with pytest.raises(errors.UserError, match=r"the weight of .*c1 is .* must be above 0"):
        build(corpora, [1.0, weight, 1.0], "1", "train", 8, 10)


def test_a_corpus_without_documents_or_samples_is_named(corpora, tmp_path):
    few = write(tmp_path / "few", [3])
    with pytest.raises(errors.UserError, match=r"test split none of the 1 documents of .*few"):
        build([*corpora, few], [1.0] * 4, "8,1,1", "test", 8, 10)
    with pytest.raises(errors.UserError, match=r"few: .* fewer than the 8 \+ 1 tokens of one"):
        build([*corpora, few], None, "1", "train", 8, None)
    assert len(build([*corpora, few], [1.0] * 4, "1", "train", 8, 10)) == 12


def test_a_blend_that_takes_more_than_was_prepared_says_so(tmp_path):
    """Many light corpora of at least one sample each: the heavy one is asked for too many."""
    heavy = write(tmp_path / "heavy", [81])
    light = write(tmp_path / "light", [50])
    with pytest.raises(errors.UserError, match=r"takes 1\d samples of .*heavy, which prepared 10"):
        build([heavy] + [light] * 10, [90.0] + [1.0] * 10, "1", "train", 8, 10)


def test_paths_are_parsed_as_megatron_does():
    assert blend.parse(["a"]) == (["a"], None)
    assert blend.parse(["a", "b"]) == (["a", "b"], None)
    assert blend.parse(["a", "b", "c"]) == (["a", "b", "c"], None)
    assert blend.parse(["0.3", "a ", "7", "b"]) == (["a", "b"], [0.3, 7.0])
    assert blend.parse([" 1e-3 ", "2"]) == (["2"], [1e-3])
    assert blend.parse(["1", "2", "3"]) == (["1", "2", "3"], None)
    with pytest.raises(errors.UserError, match=r"data.paths=.*'b' stands where a weight"):
        blend.parse(["1", "a", "b", "c"])


def test_commands_need_no_jax():
    """The commands `inspect`, `merge` and `prepare` start at once."""
    code = (
        "import sys; from gpt3jax.data import inspect, merge, prepare, text_corpus; "
        "sys.exit(bool({'jax', 'grain'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
