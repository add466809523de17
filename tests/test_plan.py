"""The plan: closed forms against the real state, the JSON contract, errors, and compiled steps."""

import dataclasses
import json
import re

import jax
import pytest

from gpt3jax import (
    config,
    flops,
    gpus,
    recipe,
    sharding,
    step,
    xla_flags,
)
from gpt3jax.plan import __main__ as plan
from gpt3jax.plan import compiler, hlo, memory_model, time_model

import tiny

CONTRACT = {
    "fits", "peak_bytes_per_gpu", "memory", "step_seconds", "mfu", "tokens_per_second_per_gpu",
    "exposed_communication_seconds", "collectives", "compile_seconds", "versions",
}  # fmt: skip
MESHES = [
    {"data": 8},
    {"fsdp": 4, "tensor": 2},
    {"data": 2, "stage": 2, "tensor": 2},
    {"data": 2, "fsdp": 2, "context": 2},
    {"data": 4, "tensor": 2, "shard_optimizer": True},
    {"data": 2, "stage": 2, "fsdp": 2, "virtual_stages": 2, "shard_optimizer": True},
]
compiles = pytest.mark.skipif(bool(compiler.missing_extra()), reason="needs the extra plan")


@pytest.fixture
def recipe_file(tmp_path):
    """A GPT small enough to compile in seconds, and with what cuDNN's attention needs."""
    file = tmp_path / "small.py"
    file.write_text(
        "from gpt3jax.config import *\n"
        "def get_config():\n"
        "    return Config(\n"
        "        model=Model(n_layers=2, d_model=256, n_heads=4, seq_len=512, vocab_size=1000,\n"
        "                    attention_dropout=0.0),\n"
        "        optimizer=Optimizer(peak_lr=1e-4),\n"
        "        batch=Batch(global_batch_size=16),\n"
        "        mesh=Mesh(data=-1, fsdp=2, tensor=2),\n"
        "        train=Train(n_steps=10),\n"
        "    )\n"
    )
    return str(file)


def layout_of(cfg, n_gpus=8):
    return memory_model.lay_out(cfg, n_gpus, 8)


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_parameters_of_a_gpu_are_the_states_own(axes):
    cfg = tiny.make_config(mesh={"data": 1, **axes})
    mesh = sharding.make_mesh(cfg.mesh)
    state = step.build(cfg, mesh, 320).abstract_state
    held = sum(
        int(jax.numpy.prod(jax.numpy.array(leaf.sharding.shard_shape(leaf.shape))))
        for leaf in jax.tree.leaves(state.params)
    )
    sizes = layout_of(cfg).sizes
    assert sizes == dict(mesh.shape)
    assert memory_model.parameters(cfg, sizes, cfg.mesh.shard_optimizer) == held


@pytest.mark.parametrize("name", ["345m", "gpt3/13b", "175b"])
def test_parameters_of_one_gpu_are_all(repository, name):
    cfg = recipe.load(str(repository / "configs" / f"{name}.py"))
    sizes = dict.fromkeys(memory_model.AXES, 1)
    assert memory_model.parameters(cfg, sizes, False) == flops.n_params(cfg.model)


def test_batch_is_the_loaders():
    cfg = tiny.make_config(mesh={"data": 2, "fsdp": 4})
    mesh = sharding.make_mesh(cfg.mesh)
    batch = tiny.make_batch(0, cfg, mesh, 2)
    planned = compiler.abstract_batch(cfg, mesh)
    assert planned.keys() == batch.keys()
    for name, array in batch.items():
        assert (planned[name].shape, planned[name].dtype) == (array.shape, array.dtype)
        assert planned[name].sharding.is_equivalent_to(array.sharding, array.ndim)
    held = sum(a.addressable_shards[0].data.nbytes for a in batch.values())
    assert memory_model.memory(cfg, layout_of(cfg))["batch"] == held


@pytest.mark.parametrize("name", gpus.GPUS)
def test_target_has_the_data_sheets_peak(name):
    gpu = gpus.GPUS[name]
    cfg = tiny.make_config(precision={"compute_dtype": "bfloat16"})
    peak = gpu.n_cores * 4 * gpu.matrix_ops["bf16"] * 2 * gpu.matrix_clock_ghz * 1e9
    assert peak == pytest.approx(time_model.peak_flops(cfg, gpu), rel=0.015)
    text = gpus.target_text(gpu)
    assert text.count("{") == text.count("}") and f'name: "{gpu.name}"' in text


def test_members_of_a_group_in_one_node_share_their_cards():
    network = gpus.network_of(gpus.GPUS["h100"])
    assert network.bandwidth(8, 1) == ("NVLink", 360e9)
    assert network.bandwidth(16, 8) == ("NIC", 45e9)
    assert network.bandwidth(256, 1) == ("NIC", 360e9)
    assert network.bandwidth(16, 4) == ("NIC", 90e9)


def test_flags_of_a_plan_are_those_of_a_run_and_every_one_has_a_reason():
    network = gpus.network_of(gpus.GPUS["h100"])
    run, planned = xla_flags.of_run(network), xla_flags.of_plan(network)
    assert planned[: len(run)] == run
    assert all(flag.reason for flag in planned)


@pytest.mark.parametrize(
    ("spelling", "members"),
    [
        ("replica_groups={{0,2},{1,3},{4,6},{5,7}}", [0, 2]),
        ("replica_groups=[4,2]<=[8]", [0, 1]),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", [0, 2, 4, 6]),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}", [0, 2, 4, 6]),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", [0, 4]),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", [0, 2]),
        ("source_target_pairs={{0,4},{4,0}}", [0, 4]),
        ("replica_groups={}", list(range(8))),
    ],
)
def test_replica_groups_in_every_spelling(spelling, members):
    assert hlo._first_group(spelling + ", dimensions={0}", 8).tolist() == members


def test_started_collectives_count_their_whole_buffer():
    text = """
ENTRY %main (p: bf16[4,2]) -> bf16[8,2] {
  %a = (bf16[4,2]{1,0}, bf16[8,2]{1,0}) all-gather-start(%p), replica_groups=[4,2]<=[8]
  %r = ((f32[8,2]{1,0}), f32[4,2]{1,0}) reduce-scatter-start(%p), replica_groups=[4,2]<=[8]
  %s = f32[4]{0} all-reduce(%p), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
}
"""
    found = hlo.collectives(text, {"data": 4, "tensor": 2})
    got = [(c.kind, c.axes, c.n_bytes, c.is_async, c.crossing_bytes) for c in found]
    assert got == [
        ("all-gather", ("tensor",), 32, True, 16),
        ("reduce-scatter", ("tensor",), 64, True, 32),
        ("all-reduce", ("data",), 16, False, 24),
    ]


def test_collectives_of_a_loop_count_its_trips_and_name_their_axis(no_compilation_cache):
    mesh = tiny.make_mesh(data=2, tensor=4)

    def body(x):
        def add(sums, _):
            return jax.lax.psum(sums, "tensor") * 0.1, None

        return jax.lax.psum(jax.lax.scan(add, x, None, length=7)[0], "data")

    spec = jax.sharding.PartitionSpec()
    mapped = jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    text = jax.jit(mapped).lower(jax.numpy.ones(100)).compile().as_text()
    found = hlo.collectives(text, dict(mesh.shape))
    assert {c.axes: (c.count, c.n_bytes) for c in found} == {
        ("tensor",): (7, 400),
        ("data",): (1, 400),
    }


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--gpus=12"], "not a multiple of --gpus-per-node=8"),
        (["--gpus=8", "--mesh.data=4"], "the axes' product must be 8"),
        (["--gpus=16", "--mesh.data=2"], "--mesh.data=4"),
        (["--gpus=8", "--gpu=h1000"], "use one of h100"),
        (["--gpus=64"], "global_batch_size=16 is not divisible"),
        (["--gpus=8", "--mesh.tensor=8"], "does not divide"),
        (["--gpus=8", "--nic-gbytes=0"], "must be above 0"),
        (["--gpus=8", "--json=/nowhere/plan.json"], "cannot be written"),
        (["--gpus=8", "--dump-hlo=x", "--no-compile"], "--dump-hlo needs"),
    ],
)
def test_what_a_user_can_mend_is_one_line(recipe_file, args, told, capsys):
    assert plan.main([f"--config={recipe_file}", "--no-compile", *args]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


def test_report_without_compiling_keeps_the_contract(recipe_file, tmp_path, capsys):
    file = tmp_path / "plan.json"
    args = [f"--config={recipe_file}", "--gpus=8", "--no-compile", f"--json={file}", "--price=2"]
    assert plan.main(args) == 0
    found = json.loads(file.read_text())
    assert found.keys() >= CONTRACT
    assert found["step_seconds"].keys() == {"low", "expected", "high"}
    low, expected, high = found["step_seconds"].values()
    assert 0 < low < expected < high
    assert sum(found["memory"].values()) == pytest.approx(found["peak_bytes_per_gpu"], abs=8)
    assert found["mesh"]["data"] == 2 and found["compile_seconds"] is None
    assert found["cost"] == pytest.approx(2 * found["gpu_hours"])
    assert "Times are estimates" in capsys.readouterr().out


def test_verify_fails_what_does_not_fit_or_would_be_refused(repository, capsys):
    def status(*args):
        path = repository / "configs" / "175b.py"
        return plan.main([f"--config={path}", "--no-compile", "--verify", *args])

    constant = "--batch.schedule="
    assert status("--gpus=1024", constant) == 0
    assert status("--gpus=1024") == 1  # the schedule's 16 sequences on 128 ranks
    assert "would refuse" in capsys.readouterr().out
    assert status("--gpus=16", "--mesh.fsdp=2", constant) == 1
    assert "NO" in capsys.readouterr().out


def test_mfu_is_that_of_the_log(recipe_file):
    cfg = dataclasses.replace(recipe.load(recipe_file), data=config.Data(mock=True))
    done = time_model.work(cfg, layout_of(cfg))
    tokens = cfg.batch.global_batch_size * cfg.model.seq_len
    assert done.model_flops * 8 == pytest.approx(tokens * flops.flops_per_token(cfg.model))


def test_175b_recomputes_what_the_compiler_does():
    """GEMMs of the compiled step with full remat come to 1.22 x 6ND."""
    cfg = tiny.make_config(model={"remat": "full"})
    assert 1 + time_model.recompute_share(cfg, "cudnn")[0] == pytest.approx(1.22, abs=0.005)


@compiles
def test_small_step_compiles_for_h100_with_cudnn_and_known_collectives(
    recipe_file, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    report, program = tmp_path / "plan.json", tmp_path / "step.hlo"
    args = [f"--config={recipe_file}", "--gpus=8", "--verify", f"--json={report}"]
    assert plan.main([*args, f"--dump-hlo={program}"]) == 0
    found = json.loads(report.read_text())
    assert found.keys() >= CONTRACT
    assert found["compiled"]["cudnn"] == {"forward": True, "backward": True}
    assert {c["axis"] for c in found["collectives"]} >= {"data", "fsdp", "tensor"}
    states = sum(found["memory"][name] for name in ("parameters", "optimizer", "batch"))
    assert found["compiled"]["argument_bytes"] == pytest.approx(states, rel=0.01)
    gathers = [c for c in found["collectives"] if c["kind"] == "all-gather"]
    assert {c["axis"] for c in gathers} == {"fsdp", "tensor"}
    text = program.read_text()
    assert "reduce-scatter-start" in text or "all-gather-start" in text
    assert not re.search(r"all-gather[^=]*\(.*\[\d+,512,1024\]", text)  # whole logits
    closed_form, peak = found["estimated_peak_bytes_per_gpu"], found["peak_bytes_per_gpu"]
    with capsys.disabled():
        print(f"\nclosed form {closed_form / 2**20:.1f} MiB, compiled {peak / 2**20:.1f} MiB")  # noqa: T201
    assert plan.main(args) == 0
    assert json.loads(report.read_text())["compiled"]["cached"]
