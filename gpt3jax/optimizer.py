"""From gradients to new parameters: schedules, clipping, AdamW, loss scaling.

The semantics are Megatron-LM's (`optimizer_param_scheduler.py`, `clip_grads.py`, `grad_scaler.py`,
commit d98e8a64dd). The schedules count samples, and the learning rate of a step follows from the
samples before it: so the first step has the rate at which the warm-up starts, usually 0.
"""

import dataclasses
import types
from typing import TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from gpt3jax.config import schema
from gpt3jax.sharding import layouts

Number: TypeAlias = float | np.ndarray | jax.Array
Tree = TypeVar("Tree")  # parameters, or anything of their structure


def learning_rate(
    optimizer: schema.Optimizer, run_samples: int, samples: Number, xp: types.ModuleType = np
) -> Number:
    """Return the learning rate after `samples` samples of successful steps.

    With NumPy in float64, for the log; with `xp=jnp` in float32, inside the step. `run_samples` is
    the length of the run, over which the rate decays unless the config says otherwise.
    """
    o = optimizer
    warmup, decay_samples = o.schedule(run_samples)
    rising = o.init_lr + (o.peak_lr - o.init_lr) * (samples / max(warmup, 1))
    falling = _decayed(o, decay_samples, warmup, samples, xp)
    return xp.where((samples <= warmup) & (warmup > 0), rising, falling)


def _decayed(
    o: schema.Optimizer, decay_samples: int, warmup: float, samples: Number, xp: types.ModuleType
) -> Number:
    """Return the learning rate after the warm-up."""
    if o.decay == "constant":
        return o.peak_lr
    if o.decay == "inverse-square-root":
        root = xp.sqrt(max(warmup, 1) / xp.maximum(samples, 1))
        decayed_lr = xp.maximum(o.min_lr, o.peak_lr * root)
    else:
        start = decay_samples - o.wsd_decay_samples if o.decay == "wsd" else warmup
        shape = o.wsd_decay if o.decay == "wsd" else o.decay
        # A run may be shorter than its warm-up: it then has no decay.
        ratio = xp.clip((samples - start) / max(decay_samples - start, 1), 0, 1)
        share_left = {
            "linear": lambda: 1 - ratio,
            "cosine": lambda: 0.5 * (1 + xp.cos(np.pi * ratio)),
            "exponential": lambda: 2 * 0.5**ratio - 1,
            "minus-sqrt": lambda: 1 - xp.sqrt(ratio),
        }[shape]()
        decayed_lr = o.min_lr + (o.peak_lr - o.min_lr) * share_left
    return xp.where(samples > decay_samples, o.min_lr, decayed_lr)


def weight_decay(
    optimizer: schema.Optimizer, run_samples: int, samples: Number, xp: types.ModuleType = np
) -> Number:
    """Return the weight decay after `samples` samples; it grows over the whole run."""
    o = optimizer
    if o.weight_decay_growth == "constant":
        return o.weight_decay
    ratio = xp.clip(samples / run_samples, 0, 1)
    if o.weight_decay_growth == "cosine":
        ratio = 0.5 * (1 + xp.cos(np.pi * (1 - ratio)))
    return o.start_weight_decay + (o.weight_decay - o.start_weight_decay) * ratio


def gradient_norms(grads: object) -> tuple[jax.Array, jax.Array]:
    """Return the global L2 norm of a gradient, and the L2 norm of each of its arrays."""
    sums = [jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(grads)]
    return jnp.sqrt(sum(sums[1:], start=sums[0])), jnp.sqrt(jnp.stack(sums))


def clip_factor(norm: jax.Array, clip_norm: float) -> jax.Array | float:
    """Return the factor that limits the gradient's global L2 norm to clip_norm (0: no limit)."""
    return jnp.minimum(1.0, clip_norm / (norm + 1e-6)) if clip_norm else 1.0


def adam(optimizer: schema.Optimizer) -> optax.GradientTransformation:
    """Return bias-corrected Adam without learning rate and decay (fp32 moments)."""
    return optax.scale_by_adam(b1=optimizer.beta1, b2=optimizer.beta2, eps=optimizer.eps)


def adamw_update(
    optimizer: schema.Optimizer,
    grads: Tree,
    opt_state: optax.OptState,
    params: Tree,
    lr: Number,
    decay: Number,
) -> tuple[Tree, optax.OptState]:
    """Return the new parameters and Adam state: params - lr (adam(grads) + decay params).

    Only the parameters declared with `decays` decay (matrices and embeddings).
    """
    updates, opt_state = adam(optimizer).update(grads, opt_state, params)

    def step(
        param: nnx.Variable[jax.Array], update: nnx.Variable[jax.Array]
    ) -> nnx.Variable[jax.Array]:
        rate = decay if param.get_metadata("decays") else 0.0
        return jax.tree.map(lambda p, u: p - lr * (u + rate * p), param, update)

    return layouts.map_variables(step, params, updates), opt_state


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossScale:
    """The state of dynamic loss scaling; all scalars."""

    scale: jax.Array
    good_steps: jax.Array  # since the last overflow or doubling
    hysteresis: jax.Array  # overflows left until the scale is halved


def init_loss_scale(precision: schema.Precision) -> LossScale:
    """Return the starting scale: 1 unless the compute format is float16."""
    scale = precision.static_loss_scale or precision.initial_loss_scale
    return LossScale(
        scale=jnp.float32(scale if precision.compute_dtype == "float16" else 1.0),
        good_steps=jnp.int32(0),
        hysteresis=jnp.int32(precision.loss_scale_hysteresis),
    )


def resumed_loss_scale(
    then: schema.Precision, now: schema.Precision, saved: LossScale
) -> LossScale:
    """Return the loss scale with which a run resumes, from the one saved under another precision.

    A dynamic scale is kept, with the overflows counted so far; any other is initialised again.
    """
    if not (then.scales_dynamically and now.scales_dynamically):
        return init_loss_scale(now)
    more_overflows = now.loss_scale_hysteresis - then.loss_scale_hysteresis
    return LossScale(
        scale=jnp.maximum(saved.scale, now.min_loss_scale),
        good_steps=saved.good_steps,
        hysteresis=saved.hysteresis + more_overflows,
    )


def next_loss_scale(precision: schema.Precision, state: LossScale, finite: jax.Array) -> LossScale:
    """Return the loss scale after a step: doubled after a window of good ones, halved on overflow.

    The hysteresis is refilled only when the scale grows, so after the first overflows each
    further one halves at once (Megatron's rule).
    """
    if not precision.scales_dynamically:
        return state
    hysteresis = jnp.where(finite, state.hysteresis, state.hysteresis - 1)
    halve = ~finite & (hysteresis <= 0)
    good_steps = jnp.where(finite, state.good_steps + 1, 0)
    # A resumed run may have a window that is shorter than the good steps so far.
    double = good_steps >= precision.loss_scale_window
    halved = jnp.maximum(state.scale / 2, precision.min_loss_scale)
    return LossScale(
        scale=jnp.where(double, state.scale * 2, jnp.where(halve, halved, state.scale)),
        good_steps=jnp.where(double, 0, good_steps),
        hysteresis=jnp.where(double, precision.loss_scale_hysteresis, hysteresis),
    )
