"""A tiny config, random batches and a short run, for tests that need a whole step."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from gpt3jax import step
from gpt3jax.config import batch_schedule, layout, schema
from gpt3jax.data import global_batch, indexed
from gpt3jax.gradient import accumulation
from gpt3jax.model import gpt
from gpt3jax.run import layout_choice, startup, step_log
from gpt3jax.sharding import meshes
from gpt3jax.watch import phases

VOCAB = 500


def make_config(**groups):
    """Return a tiny valid config; `groups` replace fields, as `model={"remat": "none"}`."""
    base = schema.Config(
        model=schema.Model(
            n_layers=4, d_model=64, n_heads=8, seq_len=32, vocab_size=VOCAB, remat="full"
        ),
        optimizer=schema.Optimizer(peak_lr=1e-3, warmup_samples=64),
        precision=schema.Precision(compute_dtype="float32"),
        batch=schema.Batch(global_batch_size=16, microbatch_size=1),
        data=schema.Data(paths=("corpus",), eod_id=0),
        train=schema.Train(n_steps=20),
    )
    base = layout.plain(base)
    parts = {name: dataclasses.replace(getattr(base, name), **g) for name, g in groups.items()}
    return dataclasses.replace(base, **parts)


def write_corpus(prefix, seed, n, vocab=VOCAB, dtype=np.uint16):
    """Write n random documents that end with token 0, and return their prefix as a string."""
    rng = np.random.default_rng(seed)
    with indexed.Writer(str(prefix), dtype) as writer:
        for length in rng.integers(1, 60, n):
            writer.add_document([[*rng.integers(1, vocab, length), 0]])
    return str(prefix)


def one_device_mesh():
    """Return a mesh of the first device alone: what every other mesh is compared with."""
    axis_types = (jax.sharding.AxisType.Auto,) * len(meshes.AXES)
    return jax.make_mesh(
        (1,) * len(meshes.AXES), meshes.AXES, axis_types=axis_types, devices=jax.devices()[:1]
    )


def make_mesh(**axes):
    """Return a mesh over the 8 emulated devices, or over one if no axis is named."""
    return meshes.make_mesh(schema.Mesh(**axes)) if axes else one_device_mesh()


def make_batch(index, cfg, mesh, n_microbatches, masked=False):
    """Return the random batch of a step: a function of `index` alone, however it is cut."""
    rng = np.random.default_rng(index)
    n, t = cfg.batch.global_batch_size, cfg.model.seq_len
    tokens = rng.integers(0, cfg.model.vocab_size, (n, t + 1)).astype(np.int32)
    mask = rng.random((n, t)) < 0.7 if masked else np.ones((n, t))
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_mask": mask.astype(np.float32),
        "positions": np.tile(np.arange(t, dtype=np.int32), (n, 1)),
        "samples": np.arange(n * index, n * (index + 1), dtype=np.int32),
    }
    rows = n // n_microbatches
    mine = global_batch.local_rows(mesh, rows)
    cut = {k: v.reshape(n_microbatches, rows, *v.shape[1:])[:, mine] for k, v in batch.items()}
    return global_batch.device_put_rows(cut, mesh, rows)


def add_documents(batch):
    """Make every eighth token, about, end a document: segments, new positions, no loss there."""
    ends = np.asarray(batch["tokens"]) % 8 == 0
    starts = np.roll(ends, 1, axis=-1)
    starts[..., 0] = True
    place = np.arange(ends.shape[-1])
    arrays = {
        "segments": np.cumsum(starts, axis=-1),
        "positions": place - np.maximum.accumulate(np.where(starts, place, 0), axis=-1),
        "loss_mask": ~ends,
    }
    put = functools.partial(jax.device_put, device=batch["tokens"].sharding)
    return batch | {k: put(v.astype(np.int32)) for k, v in arrays.items()}


def prepared(cfg, store=None, start=(0, 0)):
    """Return the run of a config that goes on from (step, samples), as a start prepares it."""
    begin = startup.Beginning(
        choice=layout_choice.decide(cfg, dict),
        schedule=batch_schedule.from_config(cfg.batch, cfg.model.seq_len),
        store=store,
        clock=phases.Phases(),
        say=lambda line: None,
    )
    return startup.prepare(begin, step_log.Position(*start))


def run(cfg, mesh, n_microbatches, n_steps, masked=False):
    """Train and return (program, final state, metrics of each step as numpy)."""
    program = step.build(cfg, mesh, cfg.train.n_steps * cfg.batch.global_batch_size)
    state, metrics = program.init(), []
    for i in range(n_steps):
        state, m = program.train(state, make_batch(i, cfg, mesh, n_microbatches, masked))
        metrics.append(jax.tree.map(np.asarray, m))
    stacked = {k: np.stack([m[k] for m in metrics]) for k in metrics[0]}
    return program, state, stacked


def count_params(model_config):
    """Return the number of parameters, the padded vocabulary's included, from the shapes."""
    model = dataclasses.replace(model_config, remat="none")
    abstract = jax.eval_shape(lambda: gpt.GPT(model, jax.random.key(0)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract))


def leaves(tree):
    """Return the arrays of a tree by name, as numpy."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value"): np.asarray(x)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


# The numpy GPT's name of each parameter.
NUMPY_NAMES = {
    "embedding_VD": "embedding_VD",
    "positions_TD": "positions_TD",
    "blocks/norm_1/scale_D": "blocks/norm_1_scale_LD",
    "blocks/norm_1/bias_D": "blocks/norm_1_bias_LD",
    "blocks/attention/w_qkv_D3HK": "blocks/w_qkv_LD3HK",
    "blocks/attention/b_qkv_3HK": "blocks/b_qkv_L3HK",
    "blocks/attention/w_out_HKD": "blocks/w_out_LHKD",
    "blocks/attention/b_out_D": "blocks/b_out_LD",
    "blocks/norm_2/scale_D": "blocks/norm_2_scale_LD",
    "blocks/norm_2/bias_D": "blocks/norm_2_bias_LD",
    "blocks/mlp/w_in_DF": "blocks/w_in_LDF",
    "blocks/mlp/b_in_F": "blocks/b_in_LF",
    "blocks/mlp/w_down_FD": "blocks/w_down_LFD",
    "blocks/mlp/b_down_D": "blocks/b_down_LD",
    "norm/scale_D": "norm_scale_D",
    "norm/bias_D": "norm_bias_D",
}


def params_from_numpy(weights, model_config):
    """Return a GPT that holds the numpy GPT's weights, in fp32."""
    params = jax.eval_shape(lambda: gpt.GPT(model_config, jax.random.key(0)))

    def one(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
        array = np.asarray(weights[NUMPY_NAMES[name]], np.float32)
        assert array.shape == leaf.shape, name
        return jnp.asarray(array)

    return jax.tree_util.tree_map_with_path(one, params)


def random_params(model_config):
    """Return a GPT of random weights, biases and norms of a size that makes the layers matter."""
    rng = np.random.default_rng(3)
    shapes = jax.eval_shape(lambda: gpt.GPT(model_config, jax.random.key(0)))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0.1, 0.2, x.shape), "float32"), shapes)


def to_numpy_names(tree):
    """Return the arrays of a GPT-shaped tree under the numpy GPT's names."""
    return {NUMPY_NAMES[name]: array for name, array in leaves(tree).items()}


def network(params, inputs, compute=None):
    """Return logits, loss and gradients of our network for the numpy GPT's inputs."""
    compute = compute or gpt.Compute()
    tokens, targets = (jnp.asarray(inputs[k], jnp.int32) for k in ("tokens_BT", "targets_BT"))
    mask = inputs.get("loss_mask_BT")
    mask = np.ones(tokens.shape) if mask is None else mask
    positions = inputs.get("positions_BT")
    positions = np.arange(tokens.shape[1]) + 0 * tokens if positions is None else positions
    microbatch = {
        "tokens": tokens, "targets": targets, "loss_mask": jnp.asarray(mask, jnp.float32),
        "weights": jnp.asarray(mask / mask.sum(), jnp.float32),
        "positions": jnp.asarray(positions, jnp.int32),
    }  # fmt: skip
    if inputs.get("allowed_BTS") is not None:
        microbatch["segments"] = jnp.asarray(segments_of(inputs["allowed_BTS"]), jnp.int32)

    @jax.jit
    def all_three(params):
        def loss(params):
            return accumulation.microbatch_loss(params, microbatch, None, compute)[0]

        x = params(tokens, microbatch["positions"], microbatch.get("segments"), None, compute)
        return x @ params.embedding_VD[...].T, *jax.value_and_grad(loss)(params)

    return all_three(params)


def segments_of(allowed_BTS):
    """Return segment ids: a document starts where a position cannot see the one before."""
    starts = ~np.diagonal(allowed_BTS, offset=-1, axis1=1, axis2=2)
    return np.cumsum(np.pad(starts, ((0, 0), (1, 0))), axis=1)


def with_train(program, train):
    """Return a program whose training step is a function, which still compiles like the step."""

    class Train(step.OnMesh):
        def __call__(self, *args):
            return train(*args)

    jitted, options = program.train.jitted, program.train.options
    return dataclasses.replace(program, train=Train(program.mesh, jitted, options))
