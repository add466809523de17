"""Hugging Face GPT-2 weights in and out: the same network, the same bytes, or a clear refusal."""

import json
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tensorstore
import tokenizers

from gpt3jax import errors, step
from gpt3jax.checkpoint import metadata, parameters, storage
from gpt3jax.config import schema
from gpt3jax.convert import __main__ as convert
from gpt3jax.convert import hf_gpt2, hf_tokenizer, megatron, tensor_files
from gpt3jax.data import indexed, tokenizer_sources, tokenizer_training
from gpt3jax.run import startup
from gpt3jax.sharding import meshes
from gpt3jax.watch import phases

import tiny

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


def mesh(**axes):
    return meshes.make_mesh(schema.Mesh(**axes))


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


@pytest.mark.usefixtures("full_precision")
def test_hugging_face_weights_give_its_logits(converted):
    golden = np.load(GOLDEN / "hf_gpt2" / "golden.npz")
    params = parameters.open_newest(str(converted), mesh()).params()
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
        tiny.leaves(parameters.open_newest(str(f), mesh()).params()) for f in (converted, again)
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
    params = parameters.open_newest(out, mesh()).params()
    expected = plain["wte.weight"].astype(np.float32)
    np.testing.assert_array_equal(params.embedding_VD[:257], expected)
    assert not np.asarray(params.embedding_VD[257:]).any()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [pytest.param({}, marks=pytest.mark.slower), {"only_params": True}]
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
    started = startup.start_or_resume(cfg, phases.Phases())
    run, state = started.run, started.state
    assert started.position == (0, 0) and "starting with the parameters of" in started.lines[-1]
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(state.opt_state))
    batch = tiny.make_batch(0, cfg, run.mesh, 1)
    state, metrics = run.program.train(state, batch)
    assert np.isfinite(metrics["loss"]) and state.step == 1


def test_the_commands_convert_both_ways(gpt2, tmp_path, monkeypatch, capsys):
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(GOLDEN / "gpt2" / name, gpt2 / name)
    ours, out = str(tmp_path / "checkpoint"), tmp_path / "out"
    for words in (["from-hf", str(gpt2)], ["to-hf", "--checkpoint", ours]):
        output = ours if words[0] == "from-hf" else str(out)
        monkeypatch.setattr(sys, "argv", ["convert", *words, "--output", output])
        assert convert.main() == 0
        assert capsys.readouterr().out.startswith(output)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    """Return a folder with all of a tokenizer's files: 257 tokens, and 3 that are added."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer_training.train(
        ["no merges"], 257, str(folder / "vocab.json"), str(folder / "merges.txt")
    )
    rust = tokenizer_sources.from_pretrained(str(folder)).backend
    rust.add_special_tokens(["<s>", "<pad>"])
    rust.add_tokens(["<extra>"])
    rust.enable_truncation(4)
    rust.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "pad_token": {"content": "<pad>"}, "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named | {"model_max_length": 7}))
    (folder / "special_tokens_map.json").write_text(json.dumps(named))
    (folder / "added_tokens.json").write_text('{"<extra>": 259, "<s>": 257, "<pad>": 258}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def with_260_tokens(gpt2, tokenizer_folder, names):
    """Give a GPT-2 of 257 tokens 3 more, and files of their tokenizer."""
    spoil_config(gpt2, vocab_size=260, eos_token_id=0)
    embedding = "transformer.wte.weight"
    spoil_tensors(gpt2, lambda t: t.update({embedding: np.pad(t[embedding], ((0, 3), (0, 0)))}))
    for name in names:
        shutil.copy(tokenizer_folder / name, gpt2 / name)


@pytest.mark.parametrize("alone", [True, False], ids=["tokenizer.json alone", "all files"])
def test_the_tokenizers_files_travel_along(gpt2, tokenizer_folder, tmp_path, alone):
    """As they are, and the same text has the same ids at both ends, although the folder moves."""
    names = [p.name for p in tokenizer_folder.iterdir()]
    names = ["tokenizer.json", "tokenizer_config.json"] if alone else names
    with_260_tokens(gpt2, tokenizer_folder, names)
    ours, out = tmp_path / "checkpoint", tmp_path / "out"
    convert.from_hf(convert.FromHf(folder=str(gpt2), output=str(tmp_path / "made")))
    (tmp_path / "made").rename(ours)
    told = convert.to_hf(convert.ToHf(checkpoint=str(ours), output=str(out)))
    assert told.endswith("with its tokenizer")
    for name in names:
        assert (out / name).read_bytes() == (tokenizer_folder / name).read_bytes(), name
    assert {p.name for p in out.iterdir()} == {*names, "config.json", "model.safetensors"}
    theirs = json.loads((out / "config.json").read_text())
    ids = {name: theirs[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    assert ids == {"bos_token_id": 257, "eos_token_id": 0, "pad_token_id": 258}
    cfg = parameters.find(str(ours))[2]
    found = parameters.open_tokenizer(str(ours), cfg, tokenizer_sources.Source())
    assert (found.vocab_size, found.eod_id) == (260, 0)
    text = "no<extra> merges here<s>"
    expected = tokenizers.Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    expected.no_truncation()
    assert found.encode(text) == expected.encode(text).ids and 259 in found.encode(text)
    assert found.decode([259, 257]) == "<extra><s>"
    other = parameters.open_tokenizer(str(ours), cfg, tokenizer_sources.Source(eod_token="<s>"))
    assert other.eod_id == 257


def test_gpt2s_two_files_travel_along(gpt2, converted, tokenizer_folder, tmp_path):
    pair = {"vocab_file": "vocab.json", "merge_file": "merges.txt"}
    files = {field: str(tokenizer_folder / name) for field, name in pair.items()}
    for name in pair.values():
        shutil.copy(tokenizer_folder / name, gpt2 / name)
    ours, out, asked = tmp_path / "checkpoint", tmp_path / "out", tmp_path / "asked"
    convert.from_hf(convert.FromHf(folder=str(gpt2), output=str(ours)))
    convert.to_hf(convert.ToHf(checkpoint=str(ours), output=str(out)))
    convert.to_hf(convert.ToHf(checkpoint=str(converted), output=str(asked), **files))
    for name in pair.values():
        for folder in (out, asked):
            assert (folder / name).read_bytes() == (tokenizer_folder / name).read_bytes()
    assert json.loads((out / "tokenizer_config.json").read_text())["model_max_length"] == 64
    assert sorted(p.name for p in asked.iterdir()) == sorted(p.name for p in out.iterdir())


def test_a_tokenizer_is_written_under_the_names_that_are_looked_for(tokenizer_folder, tmp_path):
    (tmp_path / "mine.json").write_bytes((tokenizer_folder / "tokenizer.json").read_bytes())
    (tmp_path / "out").mkdir()
    data = schema.Data(tokenizer=str(tmp_path / "mine.json"), eod_id=257)
    files = hf_tokenizer.of_checkpoint(data, tmp_path)
    vocab = hf_tokenizer.write(files, tmp_path / "out", 64, 257)
    assert vocab["<extra>"] == 259
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64, "eos_token": "<s>"
    }  # fmt: skip
    assert hf_tokenizer.of_options(str(tokenizer_folder), "", "") == {
        "tokenizer": str(tokenizer_folder / "tokenizer.json")
    }
    for wrong in (("", "v", ""), (str(tokenizer_folder), "v", "m")):
        with pytest.raises(errors.UserError, match="--vocab-file and --merge-file together, or"):
            hf_tokenizer.of_options(*wrong)
    with pytest.raises(errors.UserError, match="mine: no such file"):
        hf_tokenizer.of_options("", "mine", "m")
    with pytest.raises(errors.UserError, match=r"has no tokenizer\.json, nor vocab\.json and"):
        hf_tokenizer.of_options(str(tmp_path), "", "")


def test_a_tokenizer_whose_files_disagree_is_refused(gpt2, tokenizer_folder, tmp_path):
    with_260_tokens(gpt2, tokenizer_folder, ["tokenizer.json", "vocab.json"])
    (gpt2 / "added_tokens.json").write_text('{"<other>": 259}')
    with pytest.raises(errors.UserError, match=r"added_tokens\.json adds the token '<other>'"):
        convert.from_hf(convert.FromHf(folder=str(gpt2), output=str(tmp_path / "out")))


@pytest.mark.parametrize(
    ("eos", "own", "expected"),
    [
        (5, None, 5),
        (5, 7, 5),
        (None, 7, 7),
        (None, None, 257),
        (50_256, 7, 7),
        (50_256, None, 257),
        ([5], None, 5),
        ([5, 7], 7, 7),
        ([5, 7], None, "is several tokens, of which the tokenizer names none as its eos_token"),
        ("x", None, "eos_token_id='x' is not supported: it must be an id"),
        (True, None, "eos_token_id=True is not supported"),
        (-1, None, "eos_token_id=-1 is not supported"),
    ],
)
def test_the_end_of_a_document_is_a_token_that_is_one_or_none(gpt2, eos, own, expected):
    """257, the size of the vocabulary, is none; own is that of the tokenizer."""
    spoil_config(gpt2, eos_token_id=eos)
    if isinstance(expected, int):
        model, eod_id = hf_gpt2.read_config(gpt2, own)
        assert eod_id == expected
        hf_gpt2.write_config(gpt2, model, eod_id, {})
        written = json.loads((gpt2 / "config.json").read_text())
        assert written["eos_token_id"] == (None if expected == 257 else expected)
    else:
        with pytest.raises(errors.UserError, match=re.escape(expected)):
            hf_gpt2.read_config(gpt2, own)


def test_weights_that_are_not_finite_do_not_go_out(tmp_path):
    def rows(name, shape, first, stop):
        out = np.ones((stop - first, *shape[1:]), np.float32)
        if name == "blocks/mlp/b_in_F" and first <= 1 < stop:
            out[1 - first, 3:5] = np.nan, np.inf
        return out

    cfg = tiny.make_config()
    parameters.write(parameters.new_store(str(tmp_path / "ours")), cfg, rows)
    options = {"checkpoint": str(tmp_path / "ours"), "output": str(tmp_path / "out")}
    message = r"ours: transformer\.h\.1\.mlp\.c_fc\.bias has 2 of 256 values that are NaN or inf"
    with pytest.raises(errors.UserError, match=message):
        convert.to_hf(convert.ToHf(**options))
    assert not (tmp_path / "out" / "config.json").exists()
    message = r"ours: decoder\.layers\.1\.mlp\.linear_fc1\.bias has 2 of"
    options |= {"output": str(tmp_path / "megatron"), "format": "safetensors"}
    with pytest.raises(errors.UserError, match=message):
        megatron.to_megatron(megatron.ToMegatron(**options))


def test_padded_entries_that_take_part_in_the_softmax_go_out_too(tmp_path):
    cfg = tiny.make_config(model={"mask_padded_vocab": False})
    parameters.write(
        parameters.new_store(str(tmp_path / "ours")),
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
    with pytest.raises(metadata.DamagedError, match=message):
        parameters.open_newest(str(copy), mesh()).params()
    with pytest.raises(metadata.DamagedError, match=message):
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


@pytest.mark.slower
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
        for ours, (theirs, _) in hf_gpt2.TENSORS.items():
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
    "transformer.h.1.ln_1.bias has 1 of 64 values that are NaN or infinite": lambda f: (
        spoil_tensors(f, lambda t: t["transformer.h.1.ln_1.bias"].put(5, -np.inf))
    ),
    "transformer.wpe.weight has 1 of 4096 values that are NaN": lambda f: spoil_tensors(
        f, lambda t: t["transformer.wpe.weight"].put(0, np.nan)
    ),
    "transformer.ln_f.bias is float64, which fp32 cannot represent": lambda f: spoil_tensors(
        f, lambda t: t.update({"transformer.ln_f.bias": np.zeros(64, np.float64)})
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


@pytest.mark.slower
def test_banded_attention_is_refused_with_the_reason(tmp_path):
    cfg = tiny.make_config(model={"attention": schema.Attention(pattern="alternating")})
    program = step.build(cfg, mesh(), 1)
    store = storage.Checkpoints(str(tmp_path / "ours"))
    meta = metadata.Meta(step=3, consumed_samples=48, data_order={}, config=schema.flatten(cfg))
    store.save(program.init(), meta)
    assert store.poll(wait=True) == ""
    options = convert.ToHf(checkpoint=str(tmp_path / "ours"), output=str(tmp_path / "out"))
    with pytest.raises(errors.UserError, match="GPT-2's config has no banded attention"):
        convert.to_hf(options)
    assert not (tmp_path / "out").exists()


def test_outputs_are_never_written_over(converted, tmp_path):
    with pytest.raises(errors.UserError, match="has checkpoints: give a new folder"):
        convert.from_hf(convert.FromHf(folder=str(GOLDEN / "hf_gpt2"), output=str(converted)))
    (tmp_path / "file").touch()
    with pytest.raises(errors.UserError, match="is not empty: give a new folder"):
        convert.to_hf(convert.ToHf(checkpoint=str(converted), output=str(tmp_path)))
    with pytest.raises(errors.UserError, match="has no checkpoint"):
        parameters.find(str(tmp_path / "nothing"))


def test_a_config_comes_back_from_its_flat_form():
    cfg = tiny.make_config(model={"attention": schema.Attention(band=7)}, batch={"ramp": (1, 2, 3)})
    flat = json.loads(json.dumps(schema.flatten(cfg)))
    assert schema.unflatten(schema.Config, flat) == cfg
    del flat["model.attention.band"], flat["checkpoint.only_params"]
    assert schema.unflatten(schema.Config, flat).model.attention == schema.Attention()


def test_parameters_are_named_after_the_models():
    abstract = jax.eval_shape(lambda: step.init_state(tiny.make_config())).params
    assert {n.removesuffix("/value") for n in map(name_of, leaves_of(abstract))} == set(
        hf_gpt2.TENSORS
    )


def leaves_of(tree):
    return [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def name_of(path):
    return jax.tree_util.keystr(path, simple=True, separator="/")
