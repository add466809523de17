"""Hugging Face GPT-2 weights in and out: the same network, the same bytes, or a clear refusal."""

import json
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tensorstore

from gpt3jax import checkpoint, config, phases, setup, sharding, step, trained
from gpt3jax.convert import __main__ as convert
from gpt3jax.convert import hf_gpt2, tensor_files
from gpt3jax.data import indexed

import tiny

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


def mesh(**axes):
    return sharding.make_mesh(config.Mesh(**axes))


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Return the folder of a checkpoint made from the golden GPT-2."""
    folder = tmp_path_factory.mktemp("hf") / "checkpoint"
    convert.from_hf(convert.FromHf(folder=str(GOLDEN / "hf_gpt2"), output=str(folder)))
    return folder


@pytest.fixture
def gpt2(tmp_path):
    """Return a copy of the golden folder, to spoil."""
    return pathlib.Path(shutil.copytree(GOLDEN / "hf_gpt2", tmp_path / "gpt2"))


def test_hugging_face_weights_give_its_logits(converted):
    golden = np.load(GOLDEN / "hf_gpt2" / "golden.npz")
    params = trained.open_newest(str(converted), mesh()).params()
    tokens = jnp.asarray(golden["input_ids"])
    x_BTD = params(tokens, jnp.broadcast_to(jnp.arange(64), tokens.shape))
    logits = x_BTD @ params.embedding_VD[...].T
    np.testing.assert_allclose(logits[..., :257], golden["logits"], atol=1e-4)


@pytest.mark.parametrize("max_bytes", [4 << 30, 100_000])
def test_what_comes_in_goes_out_byte_for_byte(converted, tmp_path, monkeypatch, max_bytes):
    """In one file, or in several with an index, which are read back as well."""
    writer = tensor_files.Writer
    monkeypatch.setattr(tensor_files, "Writer", lambda folder: writer(folder, max_bytes))
    out, again = tmp_path / "out", tmp_path / "again"
    convert.to_hf(convert.ToHf(checkpoint=str(converted), output=str(out)))
    files = sorted(p.name for p in out.glob("model*"))
    assert len(files) == 1 if max_bytes > 1e6 else "model.safetensors.index.json" in files
    found = {}
    for path in out.glob("*.safetensors"):
        found |= safetensors.numpy.load_file(path)
    expected = safetensors.numpy.load_file(GOLDEN / "hf_gpt2" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name
    convert.from_hf(convert.FromHf(folder=str(out), output=str(again)))
    ours, theirs = (
        tiny.leaves(trained.open_newest(str(f), mesh()).params()) for f in (converted, again)
    )
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)
    written = json.loads((out / "config.json").read_text())
    given = json.loads((GOLDEN / "hf_gpt2" / "config.json").read_text())
    assert {k: given.get(k, v) for k, v in written.items()} == written | {
        k: given[k] for k in ("n_ctx", "torch_dtype") if k in given
    }


def test_names_without_a_prefix_masks_and_16_bits_are_read(gpt2, tmp_path):
    """As the public repository of gpt2 has them; a head that is the embedding is one more copy."""
    file = gpt2 / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    plain = {k.removeprefix("transformer."): v.astype(jnp.bfloat16) for k, v in tensors.items()}
    plain["lm_head.weight"] = plain["wte.weight"]
    plain["h.0.attn.bias"] = np.ones((1, 1, 64, 64), np.uint8)
    safetensors.numpy.save_file(plain, file)
    out = str(tmp_path / "checkpoint")
    convert.from_hf(convert.FromHf(folder=str(gpt2), output=out))
    params = trained.open_newest(out, mesh()).params()
    expected = plain["wte.weight"].astype(np.float32)
    np.testing.assert_array_equal(params.embedding_VD[:257], expected)
    assert not np.asarray(params.embedding_VD[257:]).any()


@pytest.mark.parametrize(
    "options", [pytest.param({}, marks=pytest.mark.slow), {"only_params": True}]
)
def test_training_goes_on_from_a_converted_checkpoint(converted, tmp_path, options):
    """It has no more than parameters, so it makes no difference whether they are asked for."""
    prefix = str(tmp_path / "corpus")
    with indexed.Writer(prefix, np.uint16) as writer:
        for _ in range(50):
            writer.add_document([list(range(1, 70))])
    cfg = tiny.make_config(
        model={"n_layers": 3, "n_heads": 4, "seq_len": 64, "vocab_size": 257},
        data={"paths": (prefix,), "split": "1,0,0"}, mesh={"data": 2, "fsdp": 2, "tensor": 2},
        checkpoint={"load": str(converted), **options}, train={"n_steps": 2, "eval_interval": 0},
    )  # fmt: skip
    run, state, start, told = setup.start_or_resume(cfg, phases.Phases())
    assert start == (0, 0) and "starting with the parameters of" in told[-1]
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(state.opt_state))
    batch = tiny.make_batch(0, cfg, run.mesh, 1)
    state, metrics = run.program.train(state, batch)
    assert np.isfinite(metrics["loss"]) and state.step == 1


def test_the_commands_convert_both_ways_and_the_tokenizers_files_travel_along(
    gpt2, tmp_path, monkeypatch, capsys
):
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(GOLDEN / "gpt2" / name, gpt2 / name)
    ours, out = str(tmp_path / "checkpoint"), tmp_path / "out"
    for words in (["from-hf", str(gpt2)], ["to-hf", "--checkpoint", ours]):
        output = ours if words[0] == "from-hf" else str(out)
        monkeypatch.setattr(sys, "argv", ["convert", *words, "--output", output])
        assert convert.main() == 0
        assert capsys.readouterr().out.startswith(output)
    for name in ("vocab.json", "merges.txt"):
        assert (out / name).read_bytes() == (GOLDEN / "gpt2" / name).read_bytes()
    assert json.loads((out / "tokenizer_config.json").read_text())["model_max_length"] == 64


def test_padded_entries_that_take_part_in_the_softmax_go_out_too(tmp_path):
    cfg = tiny.make_config(model={"mask_padded_vocab": False})
    trained.write(
        trained.new_store(str(tmp_path / "ours")),
        cfg,
        lambda name, shape, first, stop: np.ones((stop - first, *shape[1:]), np.float32),
    )
    convert.to_hf(convert.ToHf(checkpoint=str(tmp_path / "ours"), output=str(tmp_path / "out")))
    found = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert found["transformer.wte.weight"].shape == (512, 64)


def test_a_changed_value_is_noticed_by_every_reader(converted, tmp_path):
    copy = pathlib.Path(shutil.copytree(converted, tmp_path / "copy"))
    kvstore = {"driver": "ocdbt", "base": f"file://{copy}/0/state/"}
    kvstore["path"] = "params.blocks.mlp.w_in_DF.value/"
    array = tensorstore.open({"driver": "zarr", "kvstore": kvstore}, write=True, read=True).result()
    array[1, 2, 3].write(7.0).result()
    message = "was changed since it was written: params/blocks/mlp/w_in_DF/value do"
    with pytest.raises(checkpoint.DamagedError, match=message):
        trained.open_newest(str(copy), mesh()).params()
    with pytest.raises(checkpoint.DamagedError, match=message):
        convert.to_hf(convert.ToHf(checkpoint=str(copy), output=str(tmp_path / "out")))
    assert not (tmp_path / "out" / "config.json").exists()


# The file under way is in memory, so files are smaller here than 1 GiB.
PEAK = """
import functools, resource
from gpt3jax.convert import __main__ as convert, tensor_files
tensor_files.Writer = functools.partial(tensor_files.Writer, max_bytes=64 << 20)
status = convert.main()
print(status, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak_mib(*args):
    """Run a conversion in a process of its own; return its peak memory (MiB)."""
    command = [sys.executable, "-c", PEAK, *map(str, args)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    status, kib = told.splitlines()[-1].split()
    assert status == "0", told
    return int(kib) / 1024


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_layers(tmp_path):
    """48 MiB of fp32 a layer: 16 more layers are 768 MiB more to read and to write."""
    peaks = {}
    for n_layers in (4, 20):
        given, ours, out = (tmp_path / f"{n_layers}-{part}" for part in ("hf", "ours", "out"))
        write_gpt2(given, n_layers, width=1024)
        peaks[n_layers] = (
            peak_mib("from-hf", given, "--output", ours),
            peak_mib("to-hf", "--checkpoint", ours, "--output", out),
        )
    growth = np.subtract(peaks[20], peaks[4])
    assert (growth < 200).all(), peaks


def write_gpt2(folder, n_layers, width):
    """Write a random GPT-2 in fp16, a file for each layer."""
    rng, names = np.random.default_rng(), {}
    cfg = {"model_type": "gpt2", "n_layer": n_layers, "n_embd": width, "n_head": 16}
    cfg |= {"vocab_size": 500, "n_positions": 128}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(cfg))
    sizes = {"embedding_VD": (500, width), "positions_TD": (128, width)}
    widths = {"c_attn": (width, 3 * width), "c_fc": (width, 4 * width)}
    widths |= {"attn.c_proj": (width, width), "mlp.c_proj": (4 * width, width)}
    for layer in range(n_layers):
        tensors = {}
        for ours, theirs in hf_gpt2.NAMES.items():
            name = theirs.format(layer)
            shape = next((s for part, s in widths.items() if part in name), (1, width))
            shape = sizes.get(ours, shape if name.endswith("weight") else shape[1:])
            shape = shape[-1:] if "ln_" in name else shape
            if name not in names:
                tensors[name] = rng.standard_normal(shape, np.float32).astype(np.float16)
                names[name] = f"{layer}.safetensors"
        safetensors.numpy.save_file(tensors, folder / f"{layer}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def spoil_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def spoil_tensors(folder, change):
    file = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    change(tensors)
    safetensors.numpy.save_file(tensors, file)


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


SPOILED = {
    "model_type='llama' is not supported: only gpt2": lambda f: spoil_config(f, model_type="llama"),
    "activation_function='relu' is not supp": lambda f: spoil_config(f, activation_function="relu"),
    "n_inner=100 is not supported": lambda f: spoil_config(f, n_inner=100),
    "tie_word_embeddings=False is not": lambda f: spoil_config(f, tie_word_embeddings=False),
    "has the shape [257, 64], and config.json says": lambda f: spoil_config(f, vocab_size=300),
    "does not divide": lambda f: spoil_config(f, n_head=5),
    "has an unknown tensor h.2.": lambda f: spoil_config(f, n_layer=2),
    "has no tensor ln_f.weight": lambda f: spoil_tensors(
        f, lambda t: t.pop("transformer.ln_f.weight")
    ),
    "has a head of its own": lambda f: spoil_tensors(
        f, lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"] + 1})
    ),
    "model.safetensors cannot be read": cut,
    "has neither model.safetensors nor": lambda f: (f / "model.safetensors").unlink(),
    "config.json cannot be read": lambda f: (f / "config.json").unlink(),
}  # fmt: skip


@pytest.mark.parametrize("message", SPOILED)
def test_what_cannot_be_read_is_one_clear_line(gpt2, tmp_path, monkeypatch, capsys, message):
    SPOILED[message](gpt2)
    argv = ["convert", "from-hf", str(gpt2), "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", argv)
    assert convert.main() == 2
    told = capsys.readouterr().err
    assert message in told and len(told.splitlines()) == 1
    assert not list((tmp_path / "out").glob("*/*"))


@pytest.mark.slow
def test_banded_attention_is_refused_with_the_reason(tmp_path):
    cfg = tiny.make_config(model={"attention": config.Attention(pattern="alternating")})
    program = step.build(cfg, mesh(), 1)
    store = checkpoint.Checkpoints(str(tmp_path / "ours"))
    meta = checkpoint.Meta(step=3, consumed_samples=48, data_order={}, config=config.flatten(cfg))
    store.save(program.init(), meta)
    assert store.poll(wait=True) == ""
    options = convert.ToHf(checkpoint=str(tmp_path / "ours"), output=str(tmp_path / "out"))
    with pytest.raises(config.UserError, match="GPT-2's config has no banded attention"):
        convert.to_hf(options)
    assert not (tmp_path / "out").exists()


def test_outputs_are_never_written_over(converted, tmp_path):
    with pytest.raises(config.UserError, match="has checkpoints: give a new folder"):
        convert.from_hf(convert.FromHf(folder=str(GOLDEN / "hf_gpt2"), output=str(converted)))
    (tmp_path / "file").touch()
    with pytest.raises(config.UserError, match="is not empty: give a new folder"):
        convert.to_hf(convert.ToHf(checkpoint=str(converted), output=str(tmp_path)))
    with pytest.raises(config.UserError, match="has no checkpoint"):
        trained.find(str(tmp_path / "nothing"))


def test_a_config_comes_back_from_its_flat_form():
    cfg = tiny.make_config(model={"attention": config.Attention(band=7)}, batch={"ramp": (1, 2, 3)})
    flat = json.loads(json.dumps(config.flatten(cfg)))
    assert config.unflatten(config.Config, flat) == cfg
    del flat["model.attention.band"], flat["checkpoint.only_params"]
    assert config.unflatten(config.Config, flat).model.attention == config.Attention()


def test_parameters_are_named_after_the_models():
    abstract = jax.eval_shape(lambda: step.init_state(tiny.make_config())).params
    assert {n.removesuffix("/value") for n in map(name_of, leaves_of(abstract))} == set(
        hf_gpt2.NAMES
    )


def leaves_of(tree):
    return [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def name_of(path):
    return jax.tree_util.keystr(path, simple=True, separator="/")
