"""Hugging Face GPT-2 weights in and out: the same network, the same bytes, or a clear refusal."""

import json
import pathlib
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from gpt3jax import checkpoint, config, setup, sharding, step, trained
from gpt3jax.convert import __main__ as convert
from gpt3jax.convert import hf_gpt2
from gpt3jax.data import indexed

import tiny

GOLDEN = pathlib.Path(__file__).parent / "golden"


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
    writer = hf_gpt2.Writer
    monkeypatch.setattr(hf_gpt2, "Writer", lambda folder: writer(folder, max_bytes))
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


def test_training_goes_on_from_a_converted_checkpoint(converted, tmp_path):
    prefix = str(tmp_path / "corpus")
    with indexed.Writer(prefix, np.uint16) as writer:
        for _ in range(50):
            writer.add_document([list(range(1, 70))])
    cfg = tiny.make_config(
        model={"n_layers": 3, "n_heads": 4, "seq_len": 64, "vocab_size": 257},
        data={"paths": (prefix,), "split": "1,0,0"}, mesh={"data": 2, "fsdp": 2, "tensor": 2},
        checkpoint={"load": str(converted)}, train={"n_steps": 2, "eval_interval": 0},
    )  # fmt: skip
    run, state, start, _ = setup.start_or_resume(cfg)
    assert start == (0, 0)
    batch = tiny.make_batch(0, cfg, run.mesh, 1)
    state, metrics = run.program.train(state, batch)
    assert np.isfinite(metrics["loss"]) and state.step == 1


def test_the_tokenizers_files_travel_along(gpt2, tmp_path):
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(GOLDEN / "gpt2" / name, gpt2 / name)
    ours, out = tmp_path / "checkpoint", tmp_path / "out"
    convert.from_hf(convert.FromHf(folder=str(gpt2), output=str(ours)))
    convert.to_hf(convert.ToHf(checkpoint=str(ours), output=str(out)))
    for name in ("vocab.json", "merges.txt"):
        assert (out / name).read_bytes() == (GOLDEN / "gpt2" / name).read_bytes()
    assert json.loads((out / "tokenizer_config.json").read_text())["model_max_length"] == 64


def test_padded_entries_that_take_part_in_the_softmax_go_out_too():
    model = tiny.make_config(model={"mask_padded_vocab": False}).model
    array = np.ones((model.padded_vocab_size, 4), np.float32)
    [(_, found)] = hf_gpt2.tensors("embedding_VD", array, model)
    assert found.shape == (512, 4)


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
