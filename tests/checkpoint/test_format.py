"""A checkpoint that gpt3jax 0.1.0 wrote restores today, and today's files are like its files."""

import json
import pathlib
import shutil

import numpy as np
import pytest
import tensorstore

from gpt3jax import errors
from gpt3jax.checkpoint import (
    array_digests,
    choosing,
    parameters,
    partial_reading,
    sample_order,
    storage,
)
from gpt3jax.config import schema
from gpt3jax.data import splits

import corpus
import tiny

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "checkpoint_0_1"
STEP, LAST = 6, 8


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return a copy of the golden folder, as the folder of this process."""
    folder = shutil.copytree(GOLDEN, tmp_path / "run")
    monkeypatch.chdir(folder)
    return folder


def prepared(folder):
    """Return config and run, as at the checkpoint's step."""
    cfg = corpus.config_of(folder)
    return cfg, tiny.prepared(cfg, start=(STEP, STEP * cfg.batch.global_batch_size))


def stored_meta(path):
    return json.loads((path / "meta" / "metadata").read_text())


def description(path):
    """Return what the files say of the arrays: names and types, and the shapes of their chunks."""
    described = json.loads((path / "state" / "_METADATA").read_text())
    for array in partial_reading.arrays(path):
        key = f"{array.name.replace('/', '.')}/"
        kvstore = {"driver": "ocdbt", "base": f"file://{path}/state/", "path": key}
        stored = tensorstore.open({"driver": "zarr", "kvstore": kvstore}, read=True).result()
        described[array.name] = stored.chunk_layout.write_chunk.shape
    return described


@pytest.mark.slow
def test_a_run_goes_on_from_a_checkpoint_of_0_1(folder, monkeypatch, capfd):
    """Its samples come in the same order; what changes is told, other masks of dropout too."""
    assert corpus.call_main(monkeypatch, folder, "--mesh.cpu-devices=8") == 0
    lines = capfd.readouterr().out.splitlines()
    [i] = [i for i, line in enumerate(lines) if line.startswith("resumed from")]
    assert lines[i].endswith(f"at step {STEP}, 48 samples")
    changed = [line.split("  ")[1] for line in lines[i + 1 :] if line.startswith("  ")]
    # Versions may be others, and the recomputation, which that version had a default for and which
    # is found now; no other field of the config and nothing of the order of samples is.
    versions = {"changed since that checkpoint", "jax", "gpt3jax"}
    assert set(changed) - versions == {"model.remat", "dropout's generator"}
    expected = json.loads((folder / "steps.json").read_text())
    records = corpus.records(folder)
    assert [r["step"] for r in records] == [r["step"] for r in expected] == [STEP + 1, LAST]
    for record, before in zip(records, expected, strict=True):
        for name, value in before.items():
            np.testing.assert_allclose(record[name], value, rtol=1e-3, err_msg=name)


def test_its_arrays_match_their_digests_and_are_written_alike(folder):
    cfg, run = prepared(folder)
    abstract = run.program.abstract_state
    source = storage.Checkpoints(str(folder / "checkpoints"), read_only=True)
    state, meta = source.restore(STEP, abstract), source.read_meta(STEP)
    choosing.check_same_model(cfg, meta)
    choosing.check_same_order(cfg, meta, run.splits.order)
    assert source.steps() == [STEP] and meta.step == STEP
    assert (float(state.loss_scale.scale), int(state.loss_scale.good_steps)) == (2.0**19, 2)
    digests = source.read_digests(STEP, meta, abstract)
    np.testing.assert_array_equal(array_digests.digests(state), [*digests.values()])

    again = storage.Checkpoints(str(folder / "again"))
    again.save(state, meta)
    assert again.wait() == ""
    old, new = folder / "checkpoints" / str(STEP), folder / "again" / str(STEP)
    assert description(new) == description(old)
    saved_digests = again.read_digests(STEP, meta, abstract)
    np.testing.assert_array_equal([*saved_digests.values()], [*digests.values()])
    assert sorted(p.name for p in new.iterdir()) == sorted(p.name for p in old.iterdir())
    before, now = stored_meta(old), stored_meta(new)
    for stored in (before, now):
        stored.pop("crc32")
    assert now.pop("data_order") == sample_order.with_keys(before.pop("data_order"))
    assert {name: now[name] for name in before} == before


def test_its_order_of_samples_reads_as_unchanged(folder):
    """It has sentences where today's has keys; each of them has its key."""
    sentences = stored_meta(GOLDEN / "checkpoints" / str(STEP))["data_order"]
    assert "epochs (from the length of the run)" in sentences
    store, cfg = storage.Checkpoints("checkpoints", read_only=True), corpus.config_of(folder)
    meta, order = store.read_meta(STEP), splits.open_splits(cfg, LAST, 64).order
    assert meta.data_order == json.loads(json.dumps(order))
    assert meta.data_order.keys() == sample_order.WORDS.keys()
    assert sample_order.in_words(meta.data_order) == sentences
    with pytest.raises(errors.UserError, match=r"\n  train\.seed: checkpoint 1234, here 5\n"):
        choosing.check_same_order(cfg, meta, order | {"seed": 5})


def test_parameters_alone_of_0_1_are_read_and_written_alike(folder):
    one = tiny.one_device_mesh()
    source = parameters.open_newest("parameters", one)
    params = tiny.leaves(source.params())
    whole = tiny.leaves(parameters.open_newest("checkpoints", one).params())
    assert params.keys() == whole.keys()
    for name, array in params.items():
        np.testing.assert_array_equal(array, whole[name], err_msg=name)

    def rows(name, shape, first, stop):
        return params[name][first:stop]

    cfg = parameters.untrained(source.cfg.model, schema.Data(eod_id=0))
    parameters.write(parameters.new_store("again"), cfg, rows)
    old, new = folder / "parameters" / "0", folder / "again" / "0"
    assert description(new) == description(old)
    kinds = {
        leaf["value_metadata"]["value_type"] for leaf in description(old)["tree_metadata"].values()
    }
    assert "gpt3jax.Blocks" in kinds
    for digests in digest_rows(old, new, source.program.abstract_state):
        np.testing.assert_array_equal(*digests)


def digest_rows(old, new, abstract_state):
    """Return, by array, the digests that two checkpoints of step 0 store."""
    stored = []
    for path in (old, new):
        store = storage.Checkpoints(str(path.parent), read_only=True)
        stored.append(store.read_digests(0, store.read_meta(0), abstract_state))
    assert stored[0].keys() == stored[1].keys() and len(stored[0]) == 16
    return [(stored[0][name], stored[1][name]) for name in stored[0]]
