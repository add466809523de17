"""Megatron's weights in and out: the same network, the same bytes, or a clear refusal."""

import argparse
import dataclasses
import enum
import io
import json
import os
import pathlib
import re
import shutil
import sys
import types
import zipfile

import jax
import numpy as np
import pytest
import safetensors.numpy

from gpt3jax import step
from gpt3jax.checkpoint import array_names, parameters
from gpt3jax.config import schema
from gpt3jax.convert import __main__ as convert
from gpt3jax.convert import megatron, megatron_core, torch_files
from gpt3jax.sharding import meshes

import numpy_gpt
import tiny

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
WEIGHTS = GOLDEN / "megatron_gpt" / "weights.safetensors"
SHARDS = GOLDEN / "megatron_run" / "tp2_pp2"
VARIANTS = {
    "tanh": {},
    "erf": {"bias_gelu_fusion": False},
    "reset": {},
    "window": {"window_size": [8, 0], "window_attn_skip_freq": 2},
}
ARGS = {
    "num_layers": 3, "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 32,
    "padded_vocab_size": 256, "vocab_size": 251, "make_vocab_size_divisible_by": 128,
}  # fmt: skip
MODEL = dataclasses.replace(tiny.make_config().model, gelu="erf", mask_padded_vocab=False)
FUSED = {  # Transformer Engine's names of the norms, from Megatron's layer specs
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "input_layernorm.bias": "self_attention.linear_qkv.layer_norm_bias",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    "pre_mlp_layernorm.bias": "mlp.linear_fc1.layer_norm_bias",
}


def fused(name):
    layer = name.split(".", 3)
    return ".".join([*layer[:3], FUSED.get(layer[-1], layer[-1])]) if layer[3:] else name


def write(folder, tensors, args):
    """Write safetensors of Megatron's names and their arguments; return the file."""
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    (folder / "args.json").write_text(json.dumps(args))
    return folder


def from_megatron(folder, output, **options):
    megatron.from_megatron(megatron.FromMegatron(folder=str(folder), output=str(output), **options))
    return parameters.open_newest(str(output), meshes.make_mesh(schema.Mesh()))


def to_megatron(source, output, **options):
    megatron.to_megatron(megatron.ToMegatron(checkpoint=str(source), output=str(output), **options))
    return output


def assert_same_bytes(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name


@pytest.fixture
def ours(tmp_path):
    """Return the folder of a checkpoint of random weights, biases included, and the weights."""
    weights, rng = {}, np.random.default_rng()

    def rows(name, shape, first, stop):
        if name not in weights:
            weights[name] = rng.standard_normal(shape, np.float32)
        return weights[name][first:stop]

    store = parameters.new_store(str(tmp_path / "ours"))
    parameters.write(store, parameters.untrained(MODEL, schema.Data(eod_id=0)), rows)
    return tmp_path / "ours", weights


@pytest.mark.parametrize(
    "variant",
    [pytest.param(v, marks=() if v in ("erf", "window") else pytest.mark.slower) for v in VARIANTS],
)
def test_megatrons_weights_give_its_logits_loss_and_gradients(tmp_path, variant):
    tensors = safetensors.numpy.load_file(WEIGHTS)
    if variant == "erf":  # under either kind of names
        tensors = {fused(name): tensor for name, tensor in tensors.items()}
    source = from_megatron(
        write(tmp_path / "in", tensors, ARGS | VARIANTS[variant]), tmp_path / "c"
    )
    _, inputs, expected = numpy_gpt.load_megatron(variant)
    logits, loss, grads = tiny.network(source.params(), inputs)
    np.testing.assert_allclose(loss, expected["loss"], rtol=1e-6)
    numpy_gpt.assert_close({"logits": logits}, {"logits": expected["logits_BTV"]})
    numpy_gpt.assert_close(tiny.to_numpy_names(grads), expected["grads"])


@pytest.mark.parametrize("implementation", ["local", "transformer_engine"])
def test_what_comes_in_goes_out_byte_for_byte(tmp_path, implementation):
    tensors = safetensors.numpy.load_file(WEIGHTS)
    if implementation == "transformer_engine":
        tensors = {fused(name): tensor for name, tensor in tensors.items()}
        assert (
            len(set(tensors) & {fused(tensor.name) for tensor in megatron_core.TENSORS.values()})
            == 4
        )
    file = write(tmp_path / "in", tensors, {}) / "model.safetensors"
    (tmp_path / "in" / "args.json").unlink()
    from_megatron(file, tmp_path / "c", n_heads=4, vocab_size=251)
    out = to_megatron(
        tmp_path / "c", tmp_path / "out", format="safetensors", transformer_impl=implementation
    )
    assert_same_bytes(safetensors.numpy.load_file(out / "model.safetensors"), tensors)
    again = from_megatron(out, tmp_path / "again")
    assert again.cfg.model.vocab_size == 251 and again.cfg.model.padded_vocab_size == 256


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (4, 1), (1, 4), (2, 2)])
def test_a_checkpoint_of_ours_survives_any_cut(ours, tmp_path, tensor, pipeline):
    pytest.importorskip("torch")
    folder, expected = ours
    out = to_megatron(folder, tmp_path / "out", tensor=tensor, pipeline=pipeline)
    assert len(list(out.glob("release/*/model_optim_rng.pt"))) == tensor * pipeline
    source = from_megatron(out, tmp_path / "back")
    found = tiny.leaves(source.params())
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    written = schema.unflatten(schema.Config, source.store.read_meta(0).config).model
    assert written == MODEL


def shard(folder, stage=0):
    [file] = folder.glob(f"*/mp_rank_00_{stage:03d}/*.pt")
    return file


def test_megatrons_own_shards_come_back_byte_for_byte(tmp_path):
    """Cut by its own program on 2 tensor x 2 pipeline ranks; also what a strict reader wants."""
    pytest.importorskip("torch")
    from_megatron(SHARDS, tmp_path / "c")
    out = to_megatron(tmp_path / "c", tmp_path / "out", tensor=2, pipeline=2)
    for theirs in SHARDS.glob("*/*/*.pt"):
        mine = torch_files.load(out / "release" / theirs.parent.name / theirs.name)
        loaded = torch_files.load(theirs)
        arrays = [
            {k: None if v is None else v.numpy() for k, v in content["model"].items()}
            for content in (mine, loaded)
        ]
        for found in arrays:
            assert {k for k, v in found.items() if v is None} == {
                k for k in found if k.endswith("_extra_state")
            }
        assert_same_bytes(*({k: v for k, v in a.items() if v is not None} for a in arrays))
        assert arrays[0].keys() == arrays[1].keys()
        known, args = vars(loaded["args"]), vars(mine["args"])
        differ = {name for name, value in args.items() if known.get(name, value) != value}
        assert differ == {"consumed_train_samples", "null_tokenizer_eod_id"}


def edit(folder, change):
    """Change the contents of each file of a torch checkpoint that we wrote."""
    import torch

    for file in sorted(folder.rglob("*.pt")):
        content = dict(torch_files.load(file))
        change(content)
        torch.save(content, file.with_suffix(".new"))  # the tensors are still in the file
        file.with_suffix(".new").replace(file)


def in_virtual_stages(content):
    """Give each pipeline stage of two layers two models of one, in bfloat16."""
    import torch

    model = {k: v.to(torch.bfloat16) for k, v in content.pop("model").items() if v is not None}
    for i in range(2):
        names = [n for n in model if f"layers.{i}." in n]
        names += [n for n in model if "layers." not in n and i == (not n.startswith("embed"))]
        content[f"model{i}"] = {n.replace(f"layers.{i}.", "layers.0."): model[n] for n in names}


def with_other_state(content):
    """Add fp8 state as Transformer Engine keeps it, and what a run saves besides weights."""
    content["model1"]["decoder.layers.0.mlp.linear_fc1._extra_state"] = io.BytesIO(b"fp8")
    content["rng_state"] = [{"np_rng_state": np.random.RandomState(3).get_state()}]
    content["opt_param_scheduler"] = {"max_lr": 0.1}


def test_what_real_files_hold_besides_is_read_over(ours, tmp_path):
    """Weights in 16 bits, fp8 state, random states; the layers of a stage in two models."""
    pytest.importorskip("torch")
    folder, expected = ours
    out = to_megatron(folder, tmp_path / "out", pipeline=2)
    edit(out, in_virtual_stages)
    edit(out, with_other_state)
    found = tiny.leaves(from_megatron(out, tmp_path / "back").params())
    order = [0, 2, 1, 3]  # stage 0 has the file's layers 0 and 1: the network's 0 and 2
    for name, array in expected.items():
        array = array[order] if name.startswith("blocks/") else array
        rounded = array.astype(jax.numpy.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(found[name], rounded, err_msg=name)


def named_as(name):
    """Return a class that a pickle takes for one of another module, as an enum of Megatron's."""
    module, _, attribute = name.rpartition(".")
    return enum.Enum(attribute, ["a"], module=module)


def test_types_that_arguments_may_have_are_read(ours, tmp_path, monkeypatch):
    """Paths, scalars of NumPy, namespaces, dtypes, and Megatron's enums, whatever their names."""
    torch = pytest.importorskip("torch")
    folder, expected = ours
    kinds = named_as("megatron.core.enums.Unheard")
    for name in ("megatron", "megatron.core", "megatron.core.enums"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["megatron.core.enums"].Unheard = kinds
    given = {
        "save": tmp_path, "data_path": [pathlib.PurePosixPath("a"), pathlib.PureWindowsPath("b")],
        "kind": kinds.a, "other": types.SimpleNamespace(lr=np.float64(0.1), flag=np.bool_(True)),
        "params_dtype": torch.bfloat16, "size": torch.Size([2]), "device": torch.device("cpu"),
        "num_layers": np.int64(MODEL.n_layers), "layernorm_epsilon": np.float64(MODEL.norm_eps),
        "nested": argparse.Namespace(hidden=np.float32(2)), "half": np.float16(0.5),
    }  # fmt: skip
    out = to_megatron(folder, tmp_path / "out")
    edit(out, lambda content: vars(content["args"]).update(given))
    for name in ("megatron.core.enums", "megatron.core", "megatron"):
        monkeypatch.delitem(sys.modules, name)
    source = from_megatron(out, tmp_path / "back")
    found = tiny.leaves(source.params())
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    assert source.cfg.model.norm_eps == MODEL.norm_eps
    assert "megatron" not in sys.modules
    _, args, _ = torch_files.read(out)
    assert type(args["num_layers"]) is int and args["save"] == pathlib.PurePosixPath(tmp_path)

    def in_a_simple_namespace(content):
        content["args"] = types.SimpleNamespace(**vars(content["args"]), extra=1)
        del content["args"].kind

    edit(out, in_a_simple_namespace)
    assert torch_files.read(out)[1]["extra"] == 1


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
@pytest.mark.parametrize("kind", ["PosixPath", "WindowsPath"])
def test_a_path_of_another_system_is_a_name_alone(tmp_path, module, kind):
    """Python 3.13 calls the module by another name; a path that is read can open nothing."""
    torch = pytest.importorskip("torch")
    content = {"args": argparse.Namespace(save=pathlib.PurePosixPath("runs", "a"))}
    torch.save(content, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as old,
        zipfile.ZipFile(tmp_path / "other.pt", "w") as new,
    ):
        for entry in old.infolist():
            data = old.read(entry)
            if entry.filename.endswith("data.pkl"):
                data = re.sub(
                    rb"cpathlib(\._local)?\nPurePosixPath\n", f"c{module}\n{kind}\n".encode(), data
                )
            new.writestr(entry, data)
    saved = torch_files.load(tmp_path / "other.pt")["args"].save
    assert saved.parts == ("runs", "a") and isinstance(saved, pathlib.PurePath)
    assert not isinstance(saved, pathlib.Path)


def test_an_end_of_document_that_is_not_known_is_no_token():
    padded = ARGS | {"vocab_size": None}
    for args, expected in (
        (ARGS, 251),
        (ARGS | {"tokenizer_type": "HuggingFaceTokenizer"}, 251),
        (ARGS | {"tokenizer_type": "GPT2BPETokenizer"}, 250),
        (ARGS | {"tokenizer_type": "HuggingFaceTokenizer", "null_tokenizer_eod_id": 7}, 7),
        (padded, 256),
    ):
        model, eod_id = megatron_core.model_of("", args, 0)
        assert eod_id == expected, args
        written = megatron_core.args_of(model, eod_id, 1, 1, "local")
        assert megatron_core.model_of("", written, 0)[1] == expected


def refused(monkeypatch, capsys, tmp_path, *args):
    """Run the command; return its one line of complaint."""
    argv = ["convert", *map(str, args), "--output", str(tmp_path / "refused")]
    monkeypatch.setattr(sys, "argv", argv)
    assert convert.main() == 2
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1, told
    assert not list((tmp_path / "refused").glob("*"))
    return told


FOREIGN = {
    "position_embedding_type='rope' is not supported: ours has learned positions only": {
        "position_embedding_type": "rope"
    },
    "normalization='RMSNorm' is not supported: ours has LayerNorm only": {
        "normalization": "RMSNorm"
    },
    "swiglu=True is not supported: ours has GELU only": {"swiglu": True},
    "num_query_groups=2 is not supported: in ours it is num_attention_heads, 4": {
        "group_query_attention": True, "num_query_groups": 2
    },
    "untie_embeddings_and_output_weights=True is not supported: our output layer is the emb": {
        "untie_embeddings_and_output_weights": True
    },
    "num_experts=8 is not supported: ours has no mixture of experts": {"num_experts": 8},
    "add_bias_linear=False is not supported: ours has biases": {"add_bias_linear": False},
    "apply_layernorm_1p=True is not supported": {"apply_layernorm_1p": True},
    "ffn_hidden_size=100 is not supported: in ours it is 4 x hidden_size, 256": {
        "ffn_hidden_size": 100
    },
    "window_attn_skip_freq=None is not supported": {"window_size": [8, 0]},
    "num_layers is missing": {"num_layers": None},
    "does not fit padded_vocab_size=256": {"vocab_size": 300},
    "has an unknown tensor decoder.layers.2.": {"num_layers": 2},
    "has no tensor decoder.layers.3.": {"num_layers": 4},
    "has the shape [64], and its arguments say [128]": {"hidden_size": 128},
}  # fmt: skip


@pytest.mark.parametrize("message", FOREIGN)
def test_a_gpt_that_ours_cannot_be_is_refused_by_name(monkeypatch, capsys, tmp_path, message):
    args = {k: v for k, v in (ARGS | FOREIGN[message]).items() if k != "num_layers" or v}
    folder = write(tmp_path / "in", safetensors.numpy.load_file(WEIGHTS), args)
    assert message in refused(monkeypatch, capsys, tmp_path, "from-megatron", folder)


def without(name):
    return lambda tensors: tensors.pop(name)


TENSORS = {
    "has no tensor embedding.position_embeddings.weight": without(
        "embedding.position_embeddings.weight"
    ),
    "has no tensor decoder.layers.0.mlp.linear_fc1.bias": without(
        "decoder.layers.0.mlp.linear_fc1.bias"
    ),
    "has an unknown tensor decoder.layers.0.self_attention.q_layernorm.weight": lambda t: t.update(
        {"decoder.layers.0.self_attention.q_layernorm.weight": np.ones(16, np.float32)}
    ),
    "decoder.layers.1.mlp.linear_fc2.weight has 2 of 16384 values that are NaN or inf": lambda t: t[
        "decoder.layers.1.mlp.linear_fc2.weight"
    ].put([3, 700], [np.nan, -np.inf]),
    "embedding.word_embeddings.weight has 1 of 16384 values that are NaN or infinite": lambda t: (
        t["embedding.word_embeddings.weight"].put(9, np.nan),
        t.update({"output_layer.weight": t["embedding.word_embeddings.weight"]}),
    ),
    "decoder.final_layernorm.bias is float64, which fp32 cannot represent": lambda t: t.update(
        {"decoder.final_layernorm.bias": np.zeros(64, np.float64)}
    ),
    "output_layer.weight is not embedding.word_embeddings.weight: this GPT has": lambda t: t.update(
        {"output_layer.weight": t["embedding.word_embeddings.weight"] + 1}
    ),
}


@pytest.mark.parametrize("message", TENSORS)
def test_missing_and_foreign_tensors_are_named(monkeypatch, capsys, tmp_path, message):
    tensors = safetensors.numpy.load_file(WEIGHTS)
    TENSORS[message](tensors)
    folder = write(tmp_path / "in", tensors, ARGS)
    assert message in refused(monkeypatch, capsys, tmp_path, "from-megatron", folder)


def test_shapes_alone_do_not_tell_the_heads(monkeypatch, capsys, tmp_path):
    assert "give --n-heads N" in refused(monkeypatch, capsys, tmp_path, "from-megatron", WEIGHTS)


class Malicious:
    """What a plain unpickler would run as a command."""

    def __init__(self, folder):
        self.command = f"touch {folder}/harmed"

    def __reduce__(self):
        return os.system, (self.command,)


def damage(folder):
    file = shard(folder, 1)
    file.write_bytes(file.read_bytes()[:-3000])


def harm(folder):
    import torch

    content = torch_files.load(shard(folder)) | {"args": Malicious(folder)}
    torch.save({"args": content["args"], "model": {}}, shard(folder))


def mix(folder):
    """Put the file of the other pipeline stage in place of one tensor rank's."""
    ranks = folder / "iter_0000001"
    shutil.copytree(ranks / "mp_rank_01_001", ranks / "mp_rank_01_000", dirs_exist_ok=True)


def distribute(folder):
    (folder / "iter_0000001" / "metadata.json").write_text("{}")


def distribute_itself(folder):
    """Make the folder that is named an iteration in torch_dist."""
    shutil.rmtree(folder / "iter_0000001")
    (folder / ".metadata").touch()


SPOILED = {
    "system, which could run code": harm,
    "mp_rank_00_001/model_optim_rng.pt cannot be read": damage,
    "files of 3 ranks for tensor_model_parallel_size=2": lambda f: shutil.rmtree(
        f / "iter_0000001" / "mp_rank_01_001"
    ),
    "do not hold the same tensors": mix,
    "is not in the torch format: write it once more from Megatron": distribute,
    "in is not in the torch format: write it once more from Megatron": distribute_itself,
    "has neither latest_checkpointed_iteration.txt nor mp_rank_*": lambda f: (
        f / "latest_checkpointed_iteration.txt"
    ).unlink(),
    "has no mp_rank_00": lambda f: (f / "latest_checkpointed_iteration.txt").write_text("7"),
}  # fmt: skip


@pytest.mark.parametrize("message", SPOILED)
def test_files_that_cannot_be_trusted_are_one_clear_line(monkeypatch, capsys, tmp_path, message):
    pytest.importorskip("torch")
    folder = pathlib.Path(shutil.copytree(SHARDS, tmp_path / "in"))
    SPOILED[message](folder)
    told = refused(monkeypatch, capsys, tmp_path, "from-megatron", folder)
    assert message in told
    assert not (folder / "harmed").exists()


def test_without_torch_its_extra_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    told = refused(monkeypatch, capsys, tmp_path, "from-megatron", SHARDS)
    assert "pip install 'gpt3jax[megatron]'" in told


def test_what_cannot_be_cut_is_refused_before_anything_is_written(ours, monkeypatch, capsys):
    folder, _ = ours
    for options, message in {
        "--tensor=3": "--tensor=3 does not divide model.n_heads=8",
        "--pipeline=3": "--pipeline=3 does not divide model.n_layers=4",
        "--format=safetensors --tensor=2": "have no effect with --format=safetensors",
    }.items():
        args = ("to-megatron", "--checkpoint", folder, *options.split())
        assert message in refused(monkeypatch, capsys, folder, *args)


def test_every_parameter_has_a_megatron_name():
    abstract = jax.eval_shape(lambda: step.init_state(tiny.make_config())).params
    leaves = jax.tree_util.tree_leaves_with_path(abstract)
    names = {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves}
    assert {array_names.in_model(name) for name in names} == megatron_core.TENSORS.keys()
