"""`python -m gpt3jax.checkpoint` says what is there, and changes nothing."""

import json
import os
import re
import shutil
import sys

import jax
import numpy as np
import pytest

from gpt3jax import errors, step
from gpt3jax.checkpoint import __main__ as cli
from gpt3jax.checkpoint import choosing, listing, metadata, parameters, storage
from gpt3jax.config import schema
from gpt3jax.sharding import meshes

import tiny


def small_config():
    return tiny.make_config(model={"n_layers": 2, "d_model": 16, "n_heads": 2, "seq_len": 8})


CHANGED = {"step": 4, "samples": 64, "changes": {"train.n_steps": {"then": 20, "now": 40}}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with whole checkpoints of steps 10 and 20 with random arrays."""
    folder, cfg = tmp_path_factory.mktemp("run") / "checkpoints", small_config()
    store = storage.Checkpoints(str(folder))
    abstract = step.build(cfg, meshes.make_mesh(schema.Mesh()), 320).abstract_state
    rng = np.random.default_rng()

    def fill(leaf):
        values = rng.integers(1, 1000, leaf.shape).astype(leaf.dtype)
        return jax.device_put(values, leaf.sharding)

    for number in (10, 20):
        meta = metadata.Meta(
            step=number, consumed_samples=16 * number, data_order={"seed": 1},
            config=schema.flatten(cfg), history=(CHANGED,),
        )  # fmt: skip
        assert store.save(jax.tree.map(fill, abstract), meta) > 0
        assert store.wait() == ""
    store.close()
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def call(monkeypatch, capsys, *args):
    """Return (status, stdout, stderr) of the command."""
    monkeypatch.setattr(sys, "argv", ["checkpoint", *map(str, args)])
    status = cli.main()
    output = capsys.readouterr()
    return status, output.out, output.err


def spoil(path, how):
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
        return
    content[len(content) // 2] ^= 0x10
    path.write_bytes({"flip": content, "cut": content[: len(content) // 2], "empty": b""}[how])


def spoil_arrays(path):
    """Flip a bit in each file of array data: some have parts that nothing refers to."""
    for file in (path / "state").rglob("d/*"):
        spoil(file, "flip")


def test_list_shows_whole_damaged_and_unfinished_checkpoints(monkeypatch, capsys, copy):
    shutil.copytree(copy / "10", copy / "damaged-10")
    (copy / "30.orbax-checkpoint-tmp").mkdir()
    (copy / "20" / "meta" / "metadata").write_text("{")
    status, out, _ = call(monkeypatch, capsys, "list", copy, "--json")
    entries = {e["name"]: (e["step"], e["state"], e["samples"]) for e in json.loads(out)}
    assert status == 0 and entries == {
        "10": (10, "whole", 160),
        "damaged-10": (10, "damaged", 160),
        "20": (20, "damaged", None),
        "30.orbax-checkpoint-tmp": (30, "unfinished", None),
    }
    status, out, _ = call(monkeypatch, capsys, "list", copy)
    assert status == 0 and "unfinished" in out and "damaged (damaged-10)" in out


def test_show_has_every_array_and_the_config(monkeypatch, capsys, folder):
    status, out, _ = call(monkeypatch, capsys, "show", folder, "--step=10", "--json")
    shown = json.loads(out)
    assert status == 0 and (shown["step"], shown["samples"]) == (10, 160)
    assert shown["meta"]["config"]["model.d_model"] == 16
    assert shown["meta"]["history"] == [CHANGED]
    arrays = {array["name"]: array for array in shown["arrays"]}
    assert arrays["params/embedding_VD/value"] == {
        "name": "params/embedding_VD/value", "shape": [512, 16], "dtype": "float32",
        "bytes": 4 * 512 * 16,
    }  # fmt: skip
    assert arrays["step"]["shape"] == [] and arrays["step"]["dtype"] == "int32"
    status, out, _ = call(monkeypatch, capsys, "show", folder)
    assert status == 0 and "step 20" in out and "512 x 16" in out
    assert re.search(r"after step 4: train\.n_steps +20 -> 40", out)
    assert re.search(r"order of samples\s+train\.seed +1\s", out), "in words, not by its key"


def test_verify_names_what_is_damaged_and_changes_nothing(monkeypatch, capsys, copy):
    spoil_arrays(copy / "10")
    before = {p: p.stat().st_mtime_ns for p in copy.rglob("*")}
    assert call(monkeypatch, capsys, "verify", copy)[0] == 0
    status, out, _ = call(monkeypatch, capsys, "verify", copy, "--all")
    assert status == cli.DAMAGED and "step 20 is whole" in out and f"{copy}/10" in out
    assert call(monkeypatch, capsys, "verify", copy, "--step=10")[0] == cli.DAMAGED
    assert {p: p.stat().st_mtime_ns for p in copy.rglob("*")} == before


def test_verify_names_the_array_whose_value_was_changed(monkeypatch, copy):
    """Zarr's own checks do not notice it: a whole array is written anew with one value changed."""
    import tensorstore

    kvstore = {
        "driver": "ocdbt",
        "base": f"file://{copy}/20/state/",
        "path": "params.norm.bias_D.value/",
    }
    array = tensorstore.open({"driver": "zarr", "kvstore": kvstore}).result()
    values = array.read().result()
    values[3] += 1
    array.write(values).result()
    entry = listing.entries(str(copy))[-1]
    with pytest.raises(metadata.DamagedError, match=r": params/norm/bias_D/value do not match"):
        cli.verify_entry(str(copy), entry, quiet=True)


def test_a_missing_checkpoint_is_reported_in_one_line(monkeypatch, capsys, folder, tmp_path):
    for args, words in (
        (("list", tmp_path / "none"), "cannot be read (No such file"),
        (("show", tmp_path), "has no checkpoint: it has none"),
        (("verify", folder, "--step=7"), "has no checkpoint of step 7: it has those of 20, 10"),
        (("verify", folder, "--step=10", "--all"), "give one"),
    ):
        status, out, err = call(monkeypatch, capsys, *args)
        assert (status, out) == (2, "") and words in err and err.count("\n") == 1


def test_one_checkpoint_is_no_folder_of_them(monkeypatch, capsys, folder):
    """Nothing starts from random weights inside of one; the folder that it is in is named."""
    before, words = sorted(folder.rglob("*")), f"20 is itself a checkpoint, .* {folder}, whose"
    for opened in (
        lambda path: storage.Checkpoints(path),
        lambda path: choosing.choose_source(None, path),
        parameters.find,
        parameters.new_store,
    ):
        with pytest.raises(errors.UserError, match=words):
            opened(str(folder / "20"))
    for name in ("list", "show", "verify"):
        status, _, err = call(monkeypatch, capsys, name, folder / "20")
        assert status == 2 and f"{folder / '20'} is itself a checkpoint" in err
    assert sorted(folder.rglob("*")) == before


@pytest.mark.slower
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("how", ["cut", "flip", "missing", "empty"])
def test_each_file_damaged_is_noticed_or_does_not_matter(folder, tmp_path, how):
    """Every file that a checkpoint has; verify says what a restore would."""
    names = sorted(p.relative_to(folder / "20") for p in (folder / "20").rglob("*") if p.is_file())
    assert len(names) > 20
    cfg = small_config()
    abstract = step.build(cfg, meshes.make_mesh(schema.Mesh()), 320).abstract_state
    expected = {
        n: tiny.leaves(storage.Checkpoints(str(folder), read_only=True).restore(n, abstract))
        for n in (10, 20)
    }
    for i, name in enumerate(names):
        copy = shutil.copytree(folder, tmp_path / str(i))
        if not os.path.getsize(copy / "20" / name):
            continue  # an empty mark
        spoil(copy / "20" / name, how)
        entry = listing.entries(str(copy))[-1]
        try:
            verified = bool(cli.verify_entry(str(copy), entry, quiet=True))
        except metadata.DamagedError:
            verified = False
        store = storage.Checkpoints(str(copy))
        try:
            number, state = 20, store.restore(20, abstract)
        except metadata.DamagedError:
            store.set_aside([20])
            number, state = 10, store.restore(10, abstract)
        assert (number == 20) == verified, name
        for array, values in tiny.leaves(state).items():
            np.testing.assert_array_equal(values, expected[number][array], err_msg=str(name))
        assert verified or (copy / "damaged-20").is_dir()
        store.close()
