"""Where every array of a state lies, and what does not fit a mesh."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt3jax import errors, step
from gpt3jax.config import layout, recipe, schema
from gpt3jax.data import global_batch
from gpt3jax.hardware import flops
from gpt3jax.sharding import meshes, rules, sequence

import tiny


def test_no_large_array_of_the_state_is_whole_on_a_device():
    """Parameters and moments of fsdp 2 x tensor 4: each matrix is cut 8 ways, or 4 if by one."""
    program = step.build(tiny.make_config(), tiny.make_mesh(data=1, fsdp=2, tensor=4), 320)
    state = program.init()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        shard = leaf.addressable_shards[0].data
        if "positions" in name:
            assert shard.size * 2 == leaf.size, name
        elif re.search("/w_|embedding", name):
            assert shard.size * 8 == leaf.size, name
    for part in ("params", "opt_state"):
        matrices = [n for n in tiny.leaves(getattr(state, part)) if re.search("/w_|embedding", n)]
        assert len(matrices) == {"params": 5, "opt_state": 10}[part]


@pytest.mark.slow
def test_gradients_and_new_state_keep_the_layout():
    cfg, mesh = tiny.make_config(), tiny.make_mesh(data=2, fsdp=2, tensor=2)
    program = step.build(cfg, mesh, 320)
    state, _ = program.train(program.init(), tiny.make_batch(0, cfg, mesh, 2))
    for old, new in zip(
        jax.tree.leaves(program.abstract_state), jax.tree.leaves(state), strict=True
    ):
        assert new.sharding.is_equivalent_to(old.sharding, new.ndim)


@pytest.mark.parametrize(
    ("axes", "told"),
    [
        ({"data": 3}, "does not fit 8 cpu"),
        ({"data": -1, "tensor": 3}, "does not fit 8 cpu"),
        ({"data": 16}, "does not fit 8 cpu"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(axes, told):
    with pytest.raises(errors.UserError, match=told):
        meshes.make_mesh(schema.Mesh(**axes))


def test_a_dimension_that_does_not_divide_names_tensor_and_numbers():
    cfg = tiny.make_config(model={"d_model": 36, "n_heads": 4})
    with pytest.raises(errors.UserError, match=r"mesh.fsdp=8 does not divide embed=36 of params/"):
        step.build(cfg, tiny.make_mesh(data=1, fsdp=8), 320)


def test_the_rest_of_the_devices_goes_where_minus_one_is():
    assert meshes.make_mesh(schema.Mesh(tensor=2)).shape["data"] == 4
    assert meshes.make_mesh(schema.Mesh(data=2, fsdp=-1)).shape["fsdp"] == 4


def test_rows_of_processes_cover_a_batch_in_order():
    mesh = tiny.make_mesh(data=2, fsdp=2, tensor=2)
    np.testing.assert_array_equal(global_batch.local_rows(mesh, 12), np.arange(12))
    rows = np.random.default_rng(0).integers(0, 9, (3, 12, 5))
    array = global_batch.device_put_rows({"tokens": rows}, mesh, 12)["tokens"]
    np.testing.assert_array_equal(array, rows)
    assert {s.data.shape for s in array.addressable_shards} == {(3, 3, 5)}


COLLECTIVE = re.compile(r"= \(?(\w+\[[\d,]*\])[^=]*? (all-gather|all-to-all)(?:-start)?\(")


def test_logits_are_never_gathered():
    """On tensor 8 no collective moves an array with the vocabulary dimension."""
    cfg = tiny.make_config(model={"vocab_size": 1000, "dropout": 0.0, "attention_dropout": 0.0})
    mesh = tiny.make_mesh(data=1, tensor=8)
    text = compiled_step(cfg, mesh).as_text()
    moved = [m[1] for m in COLLECTIVE.finditer(text)]
    assert moved, "the pattern finds no collective at all"
    for shape in moved:
        assert "1024" not in shape, shape


def compiled_step(cfg, mesh):
    program = step.build(cfg, mesh, 320)
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        tiny.make_batch(0, cfg, mesh, 2),
    )
    with jax.set_mesh(mesh):
        return program.train.jitted.lower(program.abstract_state, batch).compile()


@pytest.mark.parametrize("pattern", ["dense", "alternating"])
@pytest.mark.parametrize("second", ["fsdp", "stage", "context"])
def test_no_gather_or_scatter_is_left_to_the_partitioner(second, pattern):
    """What it makes of one changes between versions, up to aborting the process."""
    axes = {"data": 2, second: 2, "tensor": 2}
    attention = schema.Attention(pattern=pattern, band=5)
    cfg = tiny.make_config(model={"attention": attention}, mesh=axes)
    mesh = tiny.make_mesh(**axes)
    program = step.build(cfg, mesh, 320)
    batch = tiny.add_documents(tiny.make_batch(0, cfg, mesh, 2))
    with jax.set_mesh(mesh):
        traced = program.train.jitted.trace(program.abstract_state, batch)
        traced_eval = program.eval.jitted.trace(program.abstract_state.params, batch)
    left, inside = [], []
    for jaxpr in (traced.jaxpr.jaxpr, traced_eval.jaxpr.jaxpr):
        for primitive, manual in primitives(jaxpr):
            if re.match("gather|scatter", primitive):
                (inside if manual == set(mesh.axis_names) else left).append(primitive)
    assert not left, left
    assert "gather" in inside, "the lookup is not seen"
    assert "scatter-add" not in inside, "it would add by atomics on a GPU"


def primitives(jaxpr, manual=frozenset()):
    """Yield the name of each primitive, and the mesh axes that are manual around it."""
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name, manual
        inside = manual
        if eqn.primitive.name == "shard_map":
            inside = manual | set(eqn.params["newly_manual_axes"])
        for part in jax.tree.leaves(tuple(eqn.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(part):
                yield from primitives(getattr(part, "jaxpr", part), inside)


def is_jaxpr(node):
    return hasattr(getattr(node, "jaxpr", node), "eqns")


def test_the_shards_order_of_a_sequence_needs_no_indexing():
    with jax.set_mesh(tiny.make_mesh(data=1, context=4, tensor=2)):
        batch = {"tokens": jnp.arange(2 * 3 * 32).reshape(2, 3, 32), "samples": jnp.zeros((2, 3))}
        cut = jax.jit(sequence.shard_sequence)(batch)
        order = np.asarray(sequence.sequence_order(32))
    np.testing.assert_array_equal(cut["tokens"], np.asarray(batch["tokens"])[..., order])
    assert order.tolist()[:8] == [0, 1, 2, 3, 28, 29, 30, 31]


def test_replicas_reduce_gradients_once_a_step_not_in_a_loop():
    cfg, mesh = tiny.make_config(), tiny.make_mesh(data=8)
    text = compiled_step(cfg, mesh).as_text()
    bodies = set(re.findall(r"body=%?([\w.\-]+)", text))
    assert bodies
    for computation in re.split(r"\n(?=%|ENTRY)", text):
        name = computation.split(" ", 1)[0].lstrip("%")
        if name in bodies:
            big = [m for m in re.findall(r"= \(?(\S+) all-reduce", computation) if "64" in m]
            assert not big, f"{name}: {big}"


def test_175b_has_its_parameters_and_its_step_lowers_without_allocating(repository):
    cfg = recipe.load(str(repository / "configs" / "175b.py"))
    assert tiny.count_params(cfg.model) == 174_604_836_864
    mesh = tiny.make_mesh(data=1, fsdp=2, tensor=4)
    small = dataclasses.replace(cfg.batch, global_batch_size=8, schedule="")
    cfg = layout.plain(dataclasses.replace(cfg, batch=small))
    program = step.build(cfg, mesh, 10_000)
    sizes = [
        math.prod(a.sharding.shard_shape(a.shape)) for a in jax.tree.leaves(program.abstract_state)
    ]
    assert sum(sizes) < 3 * tiny.count_params(cfg.model) / 7.9
    t = cfg.model.seq_len
    rows = jax.sharding.NamedSharding(mesh, rules.BATCH_SPEC)

    def abstract(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=rows)

    batch = {
        "tokens": abstract(jnp.int32, 4, 2, t), "targets": abstract(jnp.int32, 4, 2, t),
        "loss_mask": abstract(jnp.float32, 4, 2, t), "positions": abstract(jnp.int32, 4, 2, t),
        "samples": abstract(jnp.int32, 4, 2),
    }  # fmt: skip
    with jax.set_mesh(mesh):
        lowered = program.train.jitted.lower(program.abstract_state, batch)
    assert "12288" in lowered.as_text()[:2_000_000]


def test_abstract_init_agrees_with_the_closed_form():

    cfg = tiny.make_config().model
    assert tiny.count_params(cfg) == flops.n_params(cfg)
