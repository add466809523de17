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

from gpt3jax import (
    attention,
    config,
    dropout,
    loss,
    microbatches,
    model,
    optimizer,
    pipeline,
    sharding,
    validation,
    xla_flags,
)

Batch = dict[str, jax.Array]

_NOISE = 0x64726F70  # sets dropout's keys apart from those of the initial weights


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes, and all that a checkpoint's arrays hold."""

    step: Any  # steps taken, skipped ones included
    schedule_samples: Any  # samples of successful steps: what the learning rate follows
    params: model.GPT
    opt_state: Any
    loss_scale: optimizer.LossScale


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """The compiled functions of a run on a mesh, and the layout of its state."""

    mesh: jax.sharding.Mesh
    compute: model.Compute
    abstract_state: TrainState
    init: Any  # () -> state
    adopt: Any  # (params) -> state before the first step, with these parameters
    train: Any  # (state, batch[, loss limit]) -> (state, metrics)
    eval: Any  # (params, batch) -> (loss sum, token count)


def build(cfg: config.Config, mesh: jax.sharding.Mesh, run_samples: int) -> Program:
    """Return the program of a config on a mesh; nothing is compiled or allocated yet.

    Raises:
        UserError: the model does not fit the mesh.
    """
    if run_samples >= 2**31:
        raise config.UserError(
            f"the run has {run_samples} samples, and their numbers must stay below 2^31: shorten "
            "train.n_steps, train.n_samples or train.n_tokens"
        )
    validation.check_pipeline(cfg.model, mesh.shape["stage"], cfg.mesh.virtual_stages)
    validation.check_sequence(cfg.model, cfg.mesh, mesh.shape["context"], mesh.shape["tensor"])
    compute = choose_compute(cfg, mesh)
    init = functools.partial(init_state, cfg)
    abstract = jax.eval_shape(init)
    shardings = sharding.state_shardings(abstract, mesh, cfg.mesh.shard_optimizer)
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


def choose_compute(cfg: config.Config, mesh: jax.sharding.Mesh) -> model.Compute:
    """Return how the network runs on this mesh's kind of device."""
    platform = mesh.devices.flat[0].platform
    platform = "gpu" if platform in ("gpu", "cuda") else platform
    return model.Compute(
        dtype=cfg.precision.compute_dtype,
        attention=attention.choose(cfg.model, cfg.precision.compute_dtype, platform),
        sequence_parallel=cfg.mesh.sequence_parallel and mesh.shape["tensor"] > 1,
    )


def init_state(cfg: config.Config) -> TrainState:
    """Return the state before the first step; a function of the seed, whatever the mesh."""
    key = jax.random.key(cfg.train.seed)
    return first_state(cfg, model.GPT(cfg.model, key, cfg.mesh.virtual_stages))


def first_state(cfg: config.Config, params: model.GPT) -> TrainState:
    """Return the state before the first step, with these parameters."""
    return TrainState(
        step=jnp.int32(0),
        schedule_samples=jnp.int32(0),
        params=params,
        opt_state=optimizer.adam(cfg.optimizer).init(params),
        loss_scale=optimizer.init_loss_scale(cfg.precision),
    )


def train_step(
    cfg: config.Config,
    compute: model.Compute,
    run_samples: int,
    state: TrainState,
    batch: Batch,
    loss_limit: Any = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Take one optimizer step; leave parameters as they are where the gradient is not finite.

    Also where the loss is above the limit, if there is one.
    """
    n_samples = batch["samples"].size
    loss_value, grads = mean_loss_and_grads(cfg, compute, state, batch)
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


def mean_loss_and_grads(
    cfg: config.Config, compute: model.Compute, state: TrainState, batch: Batch
) -> tuple[jax.Array, Any]:
    """Return the batch's mean token loss and the fp32 gradient, unscaled.

    Each replica of the `data` axis sums the gradients of its microbatches alone; they are added
    up over the replicas once, at the end, and not in every layer of every microbatch.
    """
    scale = state.loss_scale.scale
    weights_MBT = scale * loss.token_weights(
        batch["loss_mask"], cfg.train.loss_mean, cfg.batch.microbatch_size
    )
    noise_key = jax.random.fold_in(jax.random.key(cfg.train.seed), _NOISE)

    def one(params: model.GPT, microbatch: Batch) -> tuple[jax.Array, jax.Array]:
        noise = dropout.Noise(noise_key, microbatch["samples"])
        return microbatch_loss(params, microbatch, noise, compute)

    def pipelined_sums(params: model.GPT, batch: Batch) -> Any:
        def weighted(params: model.GPT, sums: Any) -> tuple[jax.Array, jax.Array]:
            rounds = cfg.mesh.virtual_stages
            return pipeline.batch_loss(params, batch, noise_key, compute, rounds, sums)

        grad = jax.value_and_grad(weighted, argnums=(0, 1), has_aux=True)
        zeros = sharding.constrain_like_params(_zeros_like(params.blocks))
        (_, loss_sum), (grads, of_blocks) = grad(params, zeros)
        grads.blocks = of_blocks
        return loss_sum, sharding.constrain_like_params(grads)

    def local_sums(params: model.GPT, batch: Batch) -> Any:
        grad = jax.value_and_grad(one, has_aux=True)

        def add(sums: Any, microbatch: Batch) -> Any:
            (_, loss_sum), grads = grad(params, microbatch)
            grads = jax.tree.map(jnp.add, sums[1], grads)
            return sums[0] + loss_sum, sharding.constrain_like_params(grads)

        start = (jnp.float32(0), sharding.constrain_like_params(_zeros_like(params)))
        return microbatches.fold(add, start, batch)

    parts = sharding.shard_sequence({**batch, "weights": weights_MBT})
    sums = pipelined_sums if _is_pipelined() else local_sums
    loss_sum, grads = sharding.sum_over_replicas(
        sums, params_to_use(cfg, state.params), parts, True, cfg.mesh.shard_optimizer
    )
    n_tokens = jnp.maximum(batch["loss_mask"].sum(dtype=jnp.float32), 1)
    return loss_sum / n_tokens, jax.tree.map(lambda g: g / scale, grads)


def params_to_use(cfg: config.Config, params: model.GPT) -> model.GPT:
    """Return parameters as the network takes them, made once a step where that saves work.

    Where they are sharded over `data` (ZeRO-1) each replica gets them whole. The matrices of layers
    are cast first, there and for pipeline stages, which use them at every tick: the model takes
    them in the compute format alone, so this changes no number.
    """
    if not (cfg.mesh.shard_optimizer or _is_pipelined()):
        return params

    def one(variable: Any) -> Any:
        of_layers = "layers" in sharding.variable_axes(variable)
        cast = of_layers and variable.get_metadata("decays")
        dtype = cfg.precision.compute_dtype if cast else jnp.float32
        return jax.tree.map(lambda x: x.astype(dtype), variable)

    # Without the barrier XLA may gather first, twice the bytes, and cast then.
    cast = jax.lax.optimization_barrier(jax.tree.map(one, params, is_leaf=sharding.is_variable))
    return sharding.constrain_like_params(cast)


def microbatch_loss(
    params: model.GPT, microbatch: Batch, noise: dropout.Noise | None, compute: model.Compute
) -> tuple[jax.Array, jax.Array]:
    """Return the weighted loss of `[B, T]` tokens, to differentiate, and their summed loss."""
    cfg = params.model
    x_BTD = params(
        microbatch["tokens"], microbatch["positions"], microbatch.get("segments"), noise, compute
    )
    weighted, token_losses_BT = loss.cross_entropy(
        x_BTD,
        params.head_VD(compute),
        microbatch["targets"],
        microbatch["weights"],
        cfg.softmax_size,
        cfg.n_loss_chunks,
    )
    return weighted, (token_losses_BT * microbatch["loss_mask"]).sum()


def eval_step(
    cfg: config.Config, compute: model.Compute, params: model.GPT, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """Return the summed loss and the number of tokens of a batch, without dropout."""

    def local_sum(params: model.GPT, batch: Batch) -> jax.Array:
        if _is_pipelined():
            return pipeline.batch_loss(params, batch, None, compute, cfg.mesh.virtual_stages)[1]

        def add(total: jax.Array, microbatch: Batch) -> jax.Array:
            return total + microbatch_loss(params, microbatch, None, compute)[1]

        return microbatches.fold(add, jnp.float32(0), batch)

    weights_MBT = batch["loss_mask"].astype(jnp.float32)
    parts = sharding.shard_sequence({**batch, "weights": weights_MBT})
    loss_sum = sharding.sum_over_replicas(local_sum, params_to_use(cfg, params), parts)
    return loss_sum, batch["loss_mask"].sum(dtype=jnp.float32)


def _zeros_like(params: Any) -> Any:
    """Return fp32 zeros in the shapes of parameters: what gradients are added to."""
    return jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)


def _is_pipelined() -> bool:
    return jax.sharding.get_abstract_mesh().shape["stage"] > 1


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
