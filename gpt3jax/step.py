"""One training step, pure: `train_step(state, batch) -> (state, metrics)`.

`build` jits it for a mesh, together with the evaluation of a batch and the making of a state.
`data.global_batch` describes the batch.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from gpt3jax import errors, optimizer
from gpt3jax.config import layout, schema, validation
from gpt3jax.data import global_batch
from gpt3jax.gradient import batch_gradient
from gpt3jax.hardware import devices, flops, gpus, xla_flags
from gpt3jax.model import attention, gpt
from gpt3jax.sharding import layouts

Result = TypeVar("Result")
Metrics: TypeAlias = dict[str, Any]  # arrays, and the gradient norms as a tree of them


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes, and all that the arrays of a checkpoint hold."""

    step: jax.Array  # steps taken, skipped ones included
    schedule_samples: jax.Array  # samples of successful steps, which the learning rate follows
    params: gpt.GPT
    opt_state: Any  # Optax's, with moments like `params`
    loss_scale: optimizer.LossScale


@dataclasses.dataclass(frozen=True)
class OnMesh(Generic[Result]):
    """A jitted function that runs under a mesh, to which its sharding constraints refer."""

    mesh: jax.sharding.Mesh
    jitted: Any  # what `jax.jit` returned
    options: xla_flags.Options
    """XLA's options, with which the function is compiled."""

    def __call__(self, *args: Any) -> Result:
        """Run the function on arrays."""
        with jax.set_mesh(self.mesh):
            return self.jitted(*args)

    def compile(self, *args: Any) -> int:
        """Compile the function for arguments like these; JAX keeps it for the call.

        Return the bytes of a device that it needs at its peak, its arguments included.
        """
        with jax.set_mesh(self.mesh):
            memory = self.jitted.lower(*args).compile().memory_analysis()
        peak: int = memory.peak_memory_in_bytes
        return peak


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """The jitted functions of a run on a mesh, and the layout of its state."""

    mesh: jax.sharding.Mesh
    compute: gpt.Compute
    abstract_state: TrainState
    init: OnMesh[TrainState]
    """() -> state before the first step."""
    adopt: OnMesh[TrainState]
    """(params) -> state before the first step, with these parameters."""
    train: OnMesh[tuple[TrainState, Metrics]]
    """(state, batch[, loss limit]) -> (state, metrics); the state is donated."""
    eval: OnMesh[tuple[jax.Array, jax.Array]]
    """(params, batch) -> (loss sum, number of tokens)."""


def build(cfg: schema.Config, mesh: jax.sharding.Mesh, run_samples: int) -> Program:
    """Return the program of a config on a mesh; nothing is compiled or allocated yet.

    The sizes of the config's own mesh are not used; all other fields of the layout have values.

    Raises:
        UserError: the model does not fit the mesh.
    """
    if run_samples >= 2**31:
        raise errors.UserError(
            f"the run has {run_samples} samples, and their numbers must stay below 2^31: shorten "
            "train.n_steps, train.n_samples or train.n_tokens",
            page="reference/options.md#train",
        )
    assert not layout.automatic(cfg), "a layout is chosen before its step is built"
    validation.check_pipeline(cfg.model, mesh.shape["stage"], cfg.mesh.virtual_stages)
    validation.check_end_layers(cfg.precision, mesh.shape["stage"])
    validation.check_sequence(cfg.model, cfg.mesh, mesh.shape["context"], mesh.shape["tensor"])
    compute = choose_compute(cfg, mesh)
    init = functools.partial(init_state, cfg)
    abstract = jax.eval_shape(init)
    shardings = layouts.state_shardings(abstract, mesh, over_data=cfg.mesh.shard_optimizer)
    replicated = NamedSharding(mesh, PartitionSpec())
    device = mesh.devices.flat[0]
    for_init = xla_flags.for_equal_weights(device.platform)
    capability = devices.compute_capability(device)
    flops.check_product_dtype(cfg.precision, device.device_kind, capability)
    abstract = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings
    )
    gpu = gpus.like(device.device_kind, capability)
    state_share = layouts.bytes_per_device(abstract) / gpu.memory_bytes
    for_step = xla_flags.compiler_options(
        capability, mesh.shape["stage"], os.environ, state_share,
        deterministic=is_deterministic(cfg.precision, mesh.shape),
    )  # fmt: skip
    adopt = functools.partial(first_state, cfg)
    train = functools.partial(train_step, cfg, compute, run_samples)
    evaluate = functools.partial(batch_gradient.loss_sum_and_tokens, cfg, compute)

    def jit(
        function: Callable[..., Result], out: Any, options: xla_flags.Options, **rest: Any
    ) -> OnMesh[Result]:
        jitted = jax.jit(function, out_shardings=out, compiler_options=options, **rest)
        return OnMesh(mesh, jitted, options)

    return Program(
        mesh=mesh,
        compute=compute,
        abstract_state=abstract,
        init=jit(init, shardings, for_init),
        adopt=jit(adopt, shardings, {}, donate_argnums=0),
        train=jit(train, (shardings, replicated), for_step, donate_argnums=0),
        eval=jit(evaluate, replicated, for_step),
    )


def abstract_args(program: Program, cfg: schema.Config, batch_size: int) -> tuple[Any, ...]:
    """Return the arguments of the training step for batches of this size, as shapes."""
    batch = global_batch.abstract(cfg, program.mesh, batch_size)
    limit = (jax.ShapeDtypeStruct((), jnp.float32),) if cfg.faults.limits_loss else ()
    return program.abstract_state, batch, *limit


def is_deterministic(precision: schema.Precision, sizes: Mapping[str, int]) -> bool:
    """Return whether a step on a mesh of these sizes must give the same bits each time.

    Copies compute the same and are never compared: their weights would drift apart.
    """
    return precision.deterministic or sizes["copies"] > 1


def choose_compute(cfg: schema.Config, mesh: jax.sharding.Mesh) -> gpt.Compute:
    """Return how the network runs on this mesh's kind of device."""
    dtype = cfg.precision.compute_dtype
    return gpt.Compute(
        dtype=dtype,
        attention=attention.choose(cfg.model, dtype, platform(mesh), mesh.shape["context"]),
        sequence_parallel=cfg.mesh.sequence_parallel and mesh.shape["tensor"] > 1,
        prefetch=mesh.shape["fsdp"] > 1 and mesh.shape["stage"] == 1,
        float8=cfg.precision.matmul_dtype == "float8",
        end_layers=cfg.precision.end_layers,
    )


def platform(mesh: jax.sharding.Mesh) -> str:
    """Return the kind of a mesh's devices: gpu, cpu or another of JAX's platforms."""
    name = mesh.devices.flat[0].platform
    return "gpu" if name == "cuda" else name  # a GPU that is not there has the latter


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
    loss_limit: jax.Array | None = None,
) -> tuple[TrainState, Metrics]:
    """Take one optimizer step.

    Parameters stay as they are where the gradient is not finite, or where the loss is above a
    limit.
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
