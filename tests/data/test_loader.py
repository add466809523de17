"""Batches: which samples, on which rows, from any position, cut any way."""

import itertools

import numpy as np
import pytest

from gpt3jax import errors
from gpt3jax.config import batch_schedule
from gpt3jax.data import indexed, loader, samples, splits

import tiny


@pytest.fixture
def corpus(tmp_path):
    return tiny.write_corpus(tmp_path / "corpus", 3, 400)


def make_config(corpus, **data):
    return tiny.make_config(data={"paths": (corpus,), "split": "90,5,5", **data})


def numbers(cfg, schedule, mesh, start, end=96):
    parts = splits.open_splits(cfg, 6, end)
    batches = loader.train_batches(parts, cfg, schedule, mesh, start, end)
    return [(np.asarray(b["samples"]).ravel().tolist(), size) for b, size, _ in batches]


def test_samples_come_in_order_from_any_position(corpus):
    cfg, mesh = make_config(corpus), tiny.make_mesh()
    schedule = batch_schedule.BatchSchedule(((0, 8), (40, 16)))
    whole = numbers(cfg, schedule, mesh, 0)
    flat = list(itertools.chain.from_iterable(n for n, _ in whole))
    assert flat == list(range(104))  # the last batch starts before 96
    assert [size for _, size in whole] == [8] * 5 + [16] * 4
    for k in (1, 4, 5, 6):
        consumed = sum(size for _, size in whole[:k])
        assert numbers(cfg, schedule, mesh, consumed) == whole[k:]


@pytest.mark.parametrize("axes", [{}, {"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
@pytest.mark.parametrize("prefetch", [0, 4])
def test_batches_hold_the_maps_samples_on_every_mesh(corpus, axes, prefetch):
    cfg, mesh = make_config(corpus, prefetch=prefetch), tiny.make_mesh(**axes)
    schedule = batch_schedule.BatchSchedule(((0, 16),))
    parts = splits.open_splits(cfg, 6, 96)
    for batch, _, _ in loader.train_batches(parts, cfg, schedule, mesh, 32, 96):
        n = np.asarray(batch["samples"])
        tokens, _ = parts.train.tokens(n.ravel())
        np.testing.assert_array_equal(batch["tokens"], tokens[:, :-1].reshape(*n.shape, 32))
        np.testing.assert_array_equal(batch["targets"], tokens[:, 1:].reshape(*n.shape, 32))
        assert (np.asarray(batch["loss_mask"]) == 1).all()


def test_each_process_reads_only_its_rows(corpus):
    """Four processes of 2 rows each read, together, what one process with 8 rows reads."""
    cfg = make_config(corpus)
    source = splits.open_splits(cfg, 6, 96).train
    stretches = (batch_schedule.Stretch(0, 0, 16, 3),)
    whole = loader.Batches(source, cfg, stretches, 8, np.arange(8))[2]["tokens"]
    for process in range(4):
        rows = np.arange(2) + 2 * process
        own = loader.Batches(source, cfg, stretches, 8, rows)[2]["tokens"]
        np.testing.assert_array_equal(own, whole[:, rows])
        assert own.shape == (2, 2, 32)


def test_each_evaluation_goes_on_to_new_samples(corpus):
    cfg = make_config(corpus)
    parts = splits.open_splits(cfg, 2000, 96)
    mesh, seen = tiny.make_mesh(), []
    for n_before in range(2):
        for batch in loader.eval_batches(parts, cfg, mesh, "validation", n_before):
            seen += np.asarray(batch["samples"]).ravel().tolist()
    assert seen == list(range(2 * 10 * 16))


def test_end_of_document_switches_reach_the_batch(corpus):
    cfg = make_config(
        corpus, eod_mask_loss=True, reset_position_ids=True, reset_attention_mask=True
    )
    parts = splits.open_splits(cfg, 6, 96)
    schedule = batch_schedule.BatchSchedule(((0, 16),))
    batch, _, _ = next(loader.train_batches(parts, cfg, schedule, tiny.make_mesh(), 0, 96))
    tokens = np.asarray(batch["tokens"])
    assert (tokens == 0).any()
    np.testing.assert_array_equal(np.asarray(batch["loss_mask"]) == 0, tokens == 0)
    starts = np.pad(tokens[..., :-1] == 0, ((0, 0), (0, 0), (1, 0)))
    assert (np.asarray(batch["positions"])[starts] == 0).all()
    np.testing.assert_array_equal(batch["segments"], np.cumsum(starts, -1))


def test_a_token_beyond_the_vocabulary_names_the_file(corpus, monkeypatch):
    """At the start, from a sample of the corpus; and in a batch, which the sample may miss."""
    with indexed.Writer(corpus, np.uint16) as writer:
        for _ in range(400):
            writer.add_document([[1, 2, tiny.VOCAB, 4, 0]])
    cfg = make_config(corpus)
    with pytest.raises(errors.UserError, match=r"corpus.bin has token 500 at place 2, outside"):
        splits.open_splits(cfg, 2, 32)
    monkeypatch.setattr(indexed, "check_tokens", lambda *_: None)
    parts = splits.open_splits(cfg, 2, 32)
    schedule = batch_schedule.BatchSchedule(((0, 16),))
    with pytest.raises(errors.UserError, match=r"corpus.bin has token 500 .*vocab_size=500"):
        next(loader.train_batches(parts, cfg, schedule, tiny.make_mesh(), 0, 96))


def test_tokens_whose_type_cannot_hold_the_vocabulary_are_refused(corpus):
    cfg = tiny.make_config(data={"paths": (corpus,)}, model={"vocab_size": 70_000})
    with pytest.raises(errors.UserError, match=r"uint16 tokens, up to 65535.*another vocabulary"):
        splits.open_splits(cfg, 2, 32)


@pytest.mark.parametrize("cuts", [(96,), (32, 64, 96), (16, 48, 96)])
def test_hosts_and_batch_sizes_may_change_on_the_way(corpus, cuts):
    """4 hosts, then 2, then 8 with another batch: each sample once, in the order of one host."""
    cfg = make_config(corpus)
    source = splits.open_splits(cfg, 6, 96).train
    seen, start = [], 0
    for end, n_hosts, size in zip(cuts, (4, 2, 8), (16, 16, 8), strict=False):
        stretches = batch_schedule.BatchSchedule(((0, size),)).runs(start, end)
        rows = np.arange(8).reshape(n_hosts, -1)
        hosts = [loader.Batches(source, cfg, stretches, 8, own) for own in rows]
        for k in range(len(hosts[0])):
            parts = [host[k] for host in hosts]
            batch = {n: np.concatenate([p[n] for p in parts], axis=1) for n in parts[0]}
            tokens, _ = source.tokens(batch["samples"].ravel())
            np.testing.assert_array_equal(batch["tokens"].reshape(-1, 32), tokens[:, :-1])
            seen += batch["samples"].ravel().tolist()
        start = end
    assert seen == list(range(96))


def test_a_split_without_documents_is_refused_by_name(tmp_path):
    prefix = str(tmp_path / "small")
    with indexed.Writer(prefix, np.uint16) as writer:
        for _ in range(10):
            writer.add_document([np.arange(1, 40)])
    cfg = tiny.make_config(data={"paths": (prefix,)})
    with pytest.raises(errors.UserError, match=r"949,50,1.*test split none of the 10 documents"):
        splits.open_splits(cfg, 2, 32)


def test_order_tells_epochs_apart_but_not_the_length_of_the_run(corpus):
    cfg = make_config(corpus)
    n = len(
        samples.SampleMap(
            indexed.IndexedCorpus(corpus), (0, 360), samples.Request(seq_len=32, seed=1)
        )
    )
    short, longer, twice = (splits.open_splits(cfg, 2, m).order for m in (16, n, 2 * n))
    assert short == longer != twice


def test_a_blend_takes_its_shares_and_an_unweighted_one_ends(corpus, tmp_path):
    """Weights 3 to 1, by tokens: the second corpus's are all above 250."""
    other = str(tmp_path / "other")
    with indexed.Writer(other, np.uint16) as writer:
        for length in np.random.default_rng(4).integers(1, 60, 400):
            writer.add_document([np.random.default_rng(length).integers(250, 500, length + 1)])
    with indexed.Writer(corpus, np.uint16) as writer:
        for length in np.random.default_rng(5).integers(1, 60, 400):
            writer.add_document([np.random.default_rng(length).integers(0, 250, length + 1)])
    data = {"paths": ("3", corpus, "1", other), "split": "90,5,5"}
    cfg = tiny.make_config(data=data)
    parts = splits.open_splits(cfg, 6, 96)
    schedule = batch_schedule.BatchSchedule(((0, 16),))
    batches = loader.train_batches(parts, cfg, schedule, tiny.make_mesh(), 0, 96)
    from_other = [(np.asarray(b["tokens"])[..., 0] >= 250).sum() for b, _, _ in batches]
    assert from_other == [4] * 6
    with pytest.raises(errors.UserError, match="give each prefix a weight"):
        unweighted = tiny.make_config(data={**data, "paths": (corpus, other)})
        splits.open_splits(unweighted, 600, 9600)
