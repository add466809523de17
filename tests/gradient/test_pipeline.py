"""Pipeline stages: the schedule, one loss with and without them, checkpoints across them."""

import dataclasses
import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt3jax import errors, step
from gpt3jax.checkpoint import metadata, storage
from gpt3jax.config import schema, validation
from gpt3jax.gradient import batch_gradient, pipeline

import one_device
import tiny

SCHEDULES = [
    (1, 1, 3),
    (2, 1, 2),
    (2, 3, 4),
    (3, 1, 6),
    (3, 2, 3),
    (4, 2, 8),
    (5, 4, 10),
    (8, 1, 8),
    # Microbatches that do not fill a group.
    (4, 1, 1),
    (4, 3, 1),
    (8, 1, 2),
    (4, 2, 3),
    (4, 1, 6),
    (3, 3, 8),
]


def schedule_of(n_stages, virtual_stages, n_microbatches):
    return pipeline.Schedule(
        n_stages=n_stages, virtual_stages=virtual_stages, n_microbatches=n_microbatches
    )


@pytest.mark.parametrize("numbers", SCHEDULES)
def test_each_microbatch_goes_through_each_part_once_and_without_a_wait(numbers):
    n_stages, virtual_stages, n_microbatches = numbers
    schedule = schedule_of(*numbers)
    done = {}
    for tick, stage in itertools.product(range(schedule.n_ticks), range(n_stages)):
        group, within = divmod(tick - stage, n_stages * virtual_stages)
        # A stage is idle before its first unit, after its last, and in an empty place.
        if group >= 0 and group * n_stages + within % n_stages < n_microbatches:
            microbatch, virtual_stage = (int(x) for x in schedule.unit(tick, stage))
            unit = microbatch, virtual_stage * n_stages + stage
            assert unit not in done
            done[unit] = tick
    parts = range(n_stages * virtual_stages)
    assert set(done) == set(itertools.product(range(n_microbatches), parts))
    for microbatch, part in itertools.product(range(n_microbatches), parts[1:]):
        assert done[microbatch, part] == done[microbatch, part - 1] + 1
    idle = 1 - len(done) / (n_stages * schedule.n_ticks)
    np.testing.assert_allclose(schedule.bubble, idle, atol=1e-12)
    last = done[n_microbatches - 1, parts[-1]]
    assert schedule.n_ticks == last + 1, "it ends with its last unit"


@pytest.mark.parametrize("numbers", SCHEDULES)
def test_what_comes_back_went_through_all_layers_in_order(numbers):
    """Stages are a mapped axis here; a microbatch is a list of the layers that it went through."""
    n_stages, virtual_stages, n_microbatches = numbers
    schedule, per_part = schedule_of(*numbers), 2
    n_layers = per_part * n_stages * virtual_stages

    def stage_pass(x, sums, microbatch, virtual_stage):
        first = (virtual_stage * n_stages + jax.lax.axis_index("stage")) * per_part
        for layer in range(per_part):
            x = x.at[2 + x[1]].set(first + layer).at[1].add(1)
        return jnp.where(x[0] == microbatch, x, -1), sums

    start = np.full((n_microbatches + schedule.n_empty, 2 + n_layers), -7)
    start[:, 0], start[:, 1] = np.arange(len(start)), 0
    # Stage p gives microbatches p, P + p, ...
    given = start.reshape(-1, n_stages, start.shape[1]).swapaxes(0, 1)
    run = functools.partial(pipeline.run, schedule, stage_pass=stage_pass, grad_sums=None)
    back = jax.jit(jax.vmap(run, axis_name="stage"))(given)
    expected = start.copy()
    expected[:, 1], expected[:, 2:] = n_layers, np.arange(n_layers)
    found = back.swapaxes(0, 1).reshape(start.shape)
    np.testing.assert_array_equal(found[:n_microbatches], expected[:n_microbatches])


# mesh, layers, microbatches
CASES = {
    "data2-stage2-fsdp2-virtual2": ({"data": 2, "stage": 2, "fsdp": 2, "virtual_stages": 2}, 4, 4),
    "data2-stage4": ({"data": 2, "stage": 4}, 4, 8),
    "stage8": ({"data": 1, "stage": 8}, 8, 8),
    "data2-stage4-virtual2": ({"data": 2, "stage": 4, "virtual_stages": 2}, 8, 4),
    "data2-stage2-tensor2": ({"data": 2, "stage": 2, "tensor": 2}, 4, 4),
    "stage2-fsdp2-tensor2": ({"data": 1, "stage": 2, "fsdp": 2, "tensor": 2}, 4, 2),
    # Fewer microbatches than stages, and a last group that is not full.
    "one-microbatch-on-stage8": ({"data": 1, "stage": 8}, 8, 1),
    "data2-stage4-virtual2-of-6": ({"data": 2, "stage": 4, "virtual_stages": 2}, 8, 6),
}
SLOW = ("data2-stage2-fsdp2-virtual2", "data2-stage4-virtual2-of-6")
N_STEPS = 3


def config_of(mesh, n_layers=4, **groups):
    rates = {"dropout": 0.1, "attention_dropout": 0.1}
    groups["model"] = {"n_layers": n_layers} | rates | groups.get("model", {})
    return tiny.make_config(mesh=mesh, **groups)


def mesh_of(cfg):
    """Return the 8 devices as the config says, or one device."""
    return (
        tiny.make_mesh(**dataclasses.asdict(cfg.mesh)) if cfg.mesh.stage > 1 else tiny.make_mesh()
    )


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.slow if case in SLOW else pytest.mark.slower)
        for case in CASES
    ],
)
@pytest.mark.usefixtures("no_rematerialization")
def test_losses_and_gradients_do_not_depend_on_stages(case):
    axes, n_layers, n_microbatches = CASES[case]
    cfg = config_of(axes, n_layers, batch={"global_batch_size": math.lcm(16, n_microbatches)})
    one_device.check(cfg, n_microbatches, one_device.Steps(N_STEPS, evaluate=True))


@pytest.mark.parametrize("virtual_stages", [1, 2])
def test_gradients_of_16_bit_weights_are_summed_in_fp32(virtual_stages):
    mesh = {"data": 2, "stage": 2, "tensor": 2, "virtual_stages": virtual_stages}
    cfg = config_of(mesh, precision={"compute_dtype": "bfloat16"})
    program = step.build(cfg, mesh_of(cfg), 320)
    batch = tiny.make_batch(0, cfg, program.mesh, 2)
    with jax.set_mesh(program.mesh):
        used = jax.eval_shape(
            functools.partial(batch_gradient.params_to_use, cfg), program.abstract_state.params
        )
        gradients = functools.partial(batch_gradient.mean_loss_and_grads, cfg, program.compute)
        traced = jax.jit(gradients).trace(
            program.abstract_state.params, program.abstract_state.loss_scale.scale, batch
        )
    assert used.blocks.mlp.w_in_DF.get_value().dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(traced.out_info)} == {np.dtype("float32")}
    # What the loops over ticks and layers hand on: the sums, and not in another format.
    shape = used.blocks.mlp.w_in_DF.get_value().shape
    shape = (*shape[:-3], shape[-3] // 2, *shape[-2:])  # a stage's own
    held = [f"{kind}[{','.join(map(str, shape))}]" for kind in ("f32", "bf16")]
    text = str(traced.jaxpr)
    assert f"{held[0]} = dynamic_update_slice" in text
    assert f"{held[1]} = dynamic_update_slice" not in text
    assert f"{held[1]} = add_any" not in text


def with_documents(batch):
    """Return a batch whose sequences are cut into documents at every token below 30."""
    return batch | {"segments": (batch["tokens"] < 30).astype(jnp.int32).cumsum(-1)}


@pytest.mark.slower
def test_masks_documents_banded_layers_and_evaluation_are_the_same_too():
    pattern = schema.Attention(pattern="alternating", band=5)
    found = []
    for mesh, n in (({}, 1), ({"data": 2, "stage": 2, "tensor": 2, "virtual_stages": 2}, 4)):
        cfg = config_of(mesh, 8, model={"attention": pattern})
        program = step.build(cfg, mesh_of(cfg), 320)
        batch = with_documents(tiny.make_batch(0, cfg, program.mesh, n, masked=True))
        state = program.init()
        evaluated = program.eval(state.params, batch)
        state, metrics = program.train(state, batch)
        after = program.eval(state.params, batch)
        found.append(
            [float(x) for x in (*evaluated, *after, metrics["loss"], metrics["grad_norm"])]
        )
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)


@pytest.mark.slower
@pytest.mark.parametrize(
    ("remat", "virtual_stages"),
    [
        ("none", 1),
        ("dots", 1),
        ("residual", 1),
        ("mlp", 1),
        ("none", 2),
        ("dots", 2),
        ("mlp", 2),
        ("residual", 2),
    ],
)
def test_what_is_saved_for_the_backward_pass_changes_no_loss(remat, virtual_stages):
    mesh = {"data": 4, "stage": 2, "virtual_stages": virtual_stages}
    cfg = config_of(mesh, model={"remat": remat})
    whole = one_device.alone(config_of({}), one_device.Steps(2))
    run = one_device.train(cfg, mesh_of(cfg), 4, one_device.Steps(2))
    for name in one_device.NORMS:
        np.testing.assert_allclose(run.metrics[name], whole.metrics[name], rtol=1e-5, err_msg=name)


@pytest.mark.slower
def test_an_overflow_skips_the_step_on_all_stages_and_float16_goes_on():
    found = []
    for mesh, n in (({}, 2), ({"data": 4, "stage": 2}, 2)):
        cfg = config_of(mesh, precision={"compute_dtype": "float16", "loss_scale_hysteresis": 1})
        program = step.build(cfg, mesh_of(cfg), 320)
        batch = tiny.make_batch(0, cfg, program.mesh, n)
        initial = program.init()
        before = tiny.leaves(initial.params)
        state, metrics = program.train(initial, batch)  # at a scale of 2^32
        assert metrics["skipped"] == 1 and state.loss_scale.scale == 2.0**31
        for name, array in tiny.leaves(state.params).items():
            np.testing.assert_array_equal(array, before[name], err_msg=name)
        fine = jax.device_put(np.float32(2**12), state.loss_scale.scale.sharding)
        scale = dataclasses.replace(state.loss_scale, scale=fine)
        state, metrics = program.train(dataclasses.replace(state, loss_scale=scale), batch)
        assert metrics["skipped"] == 0
        found.append([float(metrics[name]) for name in ("loss", "grad_norm")])
    np.testing.assert_allclose(found[1], found[0], rtol=2e-3)


@pytest.mark.slower
def test_gradients_are_summed_over_replicas_once_a_step():
    cfg = config_of({"data": 2, "stage": 4})
    program = step.build(cfg, mesh_of(cfg), 320)
    batch = tiny.make_batch(0, cfg, program.mesh, 4)
    with jax.set_mesh(program.mesh):
        text = program.train.jitted.lower(program.abstract_state, batch).compile().as_text()
    bodies = set(re.findall(r"body=%?([\w.\-]+)", text))
    assert len(bodies) > 4 and " all-reduce" in text and "collective-permute" in text
    for computation in re.split(r"\n(?=%|ENTRY)", text):
        if computation.split(" ", 1)[0].lstrip("%") in bodies:
            assert not re.search(r" all-(reduce|gather|to-all)(-start)?\(", computation)


@functools.cache
def program_of(stage, virtual_stages):
    mesh = {"data": -1, "stage": stage, "fsdp": 2, "virtual_stages": virtual_stages}
    cfg = config_of(mesh if stage > 1 else {}, 8)
    return cfg, step.build(cfg, mesh_of(cfg), 320)


@pytest.mark.parametrize(
    ("here", "there"),
    [
        pytest.param((1, 1), (2, 2), marks=pytest.mark.slower),
        pytest.param((2, 1), (1, 1), marks=pytest.mark.slower),
        pytest.param((2, 2), (1, 1), marks=pytest.mark.slower),
        pytest.param((2, 4), (4, 2), marks=pytest.mark.slow),
        pytest.param((4, 2), (2, 1), marks=pytest.mark.slower),
    ],
)
def test_a_checkpoint_comes_back_on_other_stages(tmp_path, here, there):
    cfg, program = program_of(*here)
    state = program.init()
    moments = state.opt_state._replace(
        mu=jax.tree.map(lambda p: 3 * p, state.params),
        nu=jax.tree.map(lambda p: p * p, state.params),
    )
    state = dataclasses.replace(state, opt_state=moments)
    meta = metadata.Meta(step=1, consumed_samples=16, data_order={}, config=schema.flatten(cfg))
    store = storage.Checkpoints(str(tmp_path))
    store.save(state, meta)
    assert store.poll(wait=True) == ""
    cfg, program = program_of(*there)
    abstract = program.abstract_state
    restored = store.restore(1, abstract)
    for leaf, want in zip(jax.tree.leaves(restored), jax.tree.leaves(abstract), strict=True):
        assert leaf.shape == want.shape and leaf.sharding == want.sharding
    expected = tiny.leaves(state)
    for name, array in tiny.leaves(restored).items():
        array = array.reshape(expected[name].shape)
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


@pytest.mark.parametrize(
    ("mesh", "told"),
    [
        ({"stage": 3}, "mesh.stage=3 x mesh.virtual_stages=1 does not divide model.n_layers=4"),
        ({"stage": 4, "virtual_stages": 2}, "mesh.virtual_stages=2 does not divide"),
        ({"virtual_stages": 2}, "mesh.virtual_stages=2 has no effect with mesh.stage=1"),
        ({"stage": 2, "virtual_stages": 2}, "n_layers=4 in pairs (model.attention.pattern"),
    ],
)
def test_layers_that_do_not_divide_are_refused_with_the_numbers(mesh, told):
    attention = schema.Attention(pattern="alternating")
    cfg = config_of(mesh, model={"attention": attention})
    with pytest.raises(errors.UserError, match=re.escape(told)):
        validation.validate(cfg)
    if mesh.get("stage", 2) != 3:
        devices = tiny.make_mesh(data=-1, stage=mesh.get("stage", 1))
        with pytest.raises(errors.UserError, match=re.escape(told)):
            step.build(cfg, devices, 320)


def test_the_log_tells_the_bubble():
    cfg = config_of({"data": 2, "stage": 4, "virtual_stages": 2}, 8)
    assert pipeline.describe(cfg, mesh_of(cfg)) == [
        "pipeline of 4 stages x 2 virtual stages, 8 microbatches: idle (bubble) 15.8% of the time"
    ]
    assert pipeline.describe(config_of({}), tiny.make_mesh()) == []
