"""One training step, pure: `train_step(state, batch) -> (state, metrics)`; and one evaluation.

A batch is a dict of global arrays `[M, B, ...]` (microbatches, sequences): `tokens, targets,
loss_mask, positions` `[M, B, T]`, `samples` `[M, B]` (numbers in the run), and `segments` where
documents are hidden from each other.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from gpt3jax import errors, optimizer
from gpt3jax.config import schema, validation
from gpt3jax.data import global_batch
from gpt3jax.gradient import accumulation, batch_gradient, pipeline
from gpt3jax.hardware import xla_flags
from gpt3jax.model import attention, gpt
from gpt3jax.sharding import layouts, replicas, sequence


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes, and all that a checkpoint's arrays hold."""

    step: Any  # steps taken, skipped ones included
    schedule_samples: Any  # samples of successful steps: what the learning rate follows
    params: gpt.GPT
    opt_state: Any
    loss_scale: optimizer.LossScale


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """The compiled functions of a run on a mesh, and the layout of its state."""

    mesh: jax.sharding.Mesh
    compute: gpt.Compute
    abstract_state: TrainState
    init: Any  # () -> state
    adopt: Any  # (params) -> state before the first step, with these parameters
    train: Any  # (state, batch[, loss limit]) -> (state, metrics)
    eval: Any  # (params, batch) -> (loss sum, token count)


def build(cfg: schema.Config, mesh: jax.sharding.Mesh, run_samples: int) -> Program:
    """Return the program of a config on a mesh; nothing is compiled or allocated yet.

    Raises:
        UserError: the model does not fit the mesh.
    """
    if run_samples >= 2**31:
        raise errors.UserError(
            f"the run has {run_samples} samples, and their numbers must stay below 2^31: shorten "
            "train.n_steps, train.n_samples or train.n_tokens"
        )
    validation.check_pipeline(cfg.model, mesh.shape["stage"], cfg.mesh.virtual_stages)
    validation.check_sequence(cfg.model, cfg.mesh, mesh.shape["context"], mesh.shape["tensor"])
    compute = choose_compute(cfg, mesh)
    init = functools.partial(init_state, cfg)
    abstract = jax.eval_shape(init)
    shardings = layouts.state_shardings(abstract, mesh, cfg.mesh.shard_optimizer)
    replicated = NamedSharding(mesh, PartitionSpec())
    adopt = functools.partial(first_state, cfg)
    train = functools.partial(train_step, cfg, compute, run_samples)
    evaluate = functools.partial(eval_step, cfg, compute)
    exact = xla_flags.for_equal_weights(mesh.devices.flat[0].platform)
    return Program(
        mesh=mesh,
        compute=compute,
        abstract_state=jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings
        ),
        init=_under(mesh, jax.jit(init, out_shardings=shardings, compiler_options=exact)),
        adopt=_under(mesh, jax.jit(adopt, out_shardings=shardings, donate_argnums=0)),
        train=_under(mesh, jax.jit(train, out_shardings=(shardings, replicated), donate_argnums=0)),
        eval=_under(mesh, jax.jit(evaluate, out_shardings=replicated)),
    )


def choose_compute(cfg: schema.Config, mesh: jax.sharding.Mesh) -> gpt.Compute:
    """Return how the network runs on this mesh's kind of device."""
    platform = mesh.devices.flat[0].platform
    platform = "gpu" if platform in ("gpu", "cuda") else platform
    return gpt.Compute(
        dtype=cfg.precision.compute_dtype,
        attention=attention.choose(cfg.model, cfg.precision.compute_dtype, platform),
        sequence_parallel=cfg.mesh.sequence_parallel and mesh.shape["tensor"] > 1,
    )


def init_state(cfg: schema.Config) -> TrainState:
    """Return the state before the first step; a function of the seed, whatever the mesh."""
    key = jax.random.key(cfg.train.seed)
    return first_state(cfg, gpt.GPT(cfg.model, key, cfg.mesh.virtual_stages))


def first_state(cfg: schema.Config, params: gpt.GPT) -> TrainState:
    """Return the state before the first step, with these parameters."""
    return TrainState(
        step=jnp.int32(0),
        schedule_samples=jnp.int32(0),
        params=params,
        opt_state=optimizer.adam(cfg.optimizer).init(params),
        loss_scale=optimizer.init_loss_scale(cfg.precision),
    )


def train_step(
    cfg: schema.Config,
    compute: gpt.Compute,
    run_samples: int,
    state: TrainState,
    batch: global_batch.Batch,
    loss_limit: Any = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Take one optimizer step; leave parameters as they are where the gradient is not finite.

    Also where the loss is above the limit, if there is one.
    """
    n_samples = batch["samples"].size
    loss_value, grads = batch_gradient.mean_loss_and_grads(
        cfg, compute, state.params, state.loss_scale.scale, batch
    )
    grad_norm, grad_norms = optimizer.gradient_norms(grads)
    finite = jnp.isfinite(grad_norm) & jnp.isfinite(loss_value)
    good = finite if loss_limit is None else finite & (loss_value <= loss_limit)
    lr = optimizer.learning_rate(cfg.optimizer, run_samples, state.schedule_samples, jnp)
    decay = optimizer.weight_decay(cfg.optimizer, run_samples, state.schedule_samples, jnp)
    clip = optimizer.clip_factor(grad_norm, cfg.optimizer.clip_norm)
    grads = jax.tree.map(lambda g: g * clip, grads)
    new = optimizer.adamw_update(cfg.optimizer, grads, state.opt_state, state.params, lr, decay)
    old = (state.params, state.opt_state)
    params, opt_state = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)
    metrics = {
        "loss": loss_value,
        "grad_norm": grad_norm,
        "grad_norms": grad_norms,  # of each array of the parameters
        "loss_scale": state.loss_scale.scale,
        "skipped": (~good).astype(jnp.int32),
        "schedule_samples": state.schedule_samples,
    }
    new_state = TrainState(
        step=state.step + 1,
        schedule_samples=state.schedule_samples + jnp.where(good, n_samples, 0),
        params=params,
        opt_state=opt_state,
        loss_scale=optimizer.next_loss_scale(cfg.precision, state.loss_scale, finite),
    )
    return new_state, metrics


def eval_step(
    cfg: schema.Config, compute: gpt.Compute, params: gpt.GPT, batch: global_batch.Batch
) -> tuple[jax.Array, jax.Array]:
    """Return the summed loss and the number of tokens of a batch, without dropout."""

    def local_sum(params: gpt.GPT, batch: global_batch.Batch) -> jax.Array:
        if batch_gradient.is_pipelined():
            return pipeline.batch_loss(params, batch, None, compute, cfg.mesh.virtual_stages)[1]

        def add(total: jax.Array, microbatch: global_batch.Batch) -> jax.Array:
            return total + batch_gradient.microbatch_loss(params, microbatch, None, compute)[1]

        return accumulation.fold(add, jnp.float32(0), batch)

    weights_MBT = batch["loss_mask"].astype(jnp.float32)
    parts = sequence.shard_sequence({**batch, "weights": weights_MBT})
    loss_sum = replicas.sum_over_replicas(
        local_sum, batch_gradient.params_to_use(cfg, params), parts
    )
    return loss_sum, batch["loss_mask"].sum(dtype=jnp.float32)


def _under(mesh: jax.sharding.Mesh, jitted: Any) -> Any:
    """Give a jitted function the mesh that its sharding constraints refer to."""

    @functools.wraps(jitted)
    def call(*args: Any) -> Any:
        with jax.set_mesh(mesh):
            return jitted(*args)

    def compile_only(*args: Any) -> None:
        with jax.set_mesh(mesh):
            jitted.lower(*args).compile()  # JAX keeps it for the call

    call.jitted, call.compile = jitted, compile_only  # type: ignore[attr-defined]
    return call


def abstract_args(program: Program, cfg: schema.Config, batch_size: int) -> tuple[Any, ...]:
    """Return the arguments of the training step for batches of this size, as shapes."""
    batch = global_batch.abstract_batch(cfg, program.mesh, batch_size)
    limit = (jax.ShapeDtypeStruct((), jnp.float32),) if cfg.faults.limits_loss else ()
    return program.abstract_state, batch, *limit
