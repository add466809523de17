"""What turns gradients into new parameters: schedules, clipping, AdamW, loss scaling.

Semantics are Megatron-LM's (`optimizer_param_scheduler.py`, `clip_grads.py`, `grad_scaler.py`,
commit d98e8a64dd): the schedules count samples, and a step's learning rate is that of the samples
before it, so the first step has the warm-up's start, usually 0.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from gpt3jax.config import schema
from gpt3jax.sharding import layouts


def learning_rate(optimizer: schema.Optimizer, run_samples: int, samples: Any, xp: Any = np) -> Any:
    """Return the learning rate after `samples` samples of successful steps.

    With NumPy in float64, for the log; with `xp=jnp` in float32, inside the step.
    `run_samples` is the length of the run: the decay's, unless the config says otherwise.
    """
    o = optimizer
    warmup, decay_samples = o.schedule(run_samples)
    rising = o.init_lr + (o.peak_lr - o.init_lr) * (samples / max(warmup, 1))
    falling = _decayed(o, decay_samples, warmup, samples, xp)
    return xp.where((samples <= warmup) & (warmup > 0), rising, falling)


def _decayed(o: schema.Optimizer, decay_samples: int, warmup: float, samples: Any, xp: Any) -> Any:
    if o.decay == "constant":
        return o.peak_lr
    if o.decay == "inverse-square-root":
        root = xp.sqrt(max(warmup, 1) / xp.maximum(samples, 1))
        shape_lr = xp.maximum(o.min_lr, o.peak_lr * root)
    else:
        start = decay_samples - o.wsd_decay_samples if o.decay == "wsd" else warmup
        shape = o.wsd_decay if o.decay == "wsd" else o.decay
        # A run may be shorter than its warm-up: it then has no decay.
        ratio = xp.clip((samples - start) / max(decay_samples - start, 1), 0, 1)
        left = {
            "linear": lambda: 1 - ratio,
            "cosine": lambda: 0.5 * (1 + xp.cos(np.pi * ratio)),
            "exponential": lambda: 2 * 0.5**ratio - 1,
            "minus-sqrt": lambda: 1 - xp.sqrt(ratio),
        }[shape]()
        shape_lr = o.min_lr + (o.peak_lr - o.min_lr) * left
    return xp.where(samples > decay_samples, o.min_lr, shape_lr)


def weight_decay(optimizer: schema.Optimizer, run_samples: int, samples: Any, xp: Any = np) -> Any:
    """Return the weight decay after `samples` samples; it grows over the whole run."""
    o = optimizer
    if o.weight_decay_growth == "constant":
        return o.weight_decay
    ratio = xp.clip(samples / run_samples, 0, 1)
    if o.weight_decay_growth == "cosine":
        ratio = 0.5 * (1 + xp.cos(np.pi * (1 - ratio)))
    return o.start_weight_decay + (o.weight_decay - o.start_weight_decay) * ratio


def gradient_norms(grads: Any) -> tuple[jax.Array, jax.Array]:
    """Return the global L2 norm of a gradient, and the L2 norm of each of its arrays."""
    sums = [jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(grads)]
    return jnp.sqrt(sum(sums[1:], start=sums[0])), jnp.sqrt(jnp.stack(sums))


def clip_factor(norm: Any, clip_norm: float) -> Any:
    """Return what to multiply the gradient with so that its global L2 norm is at most clip_norm."""
    return jnp.minimum(1.0, clip_norm / (norm + 1e-6)) if clip_norm else 1.0


def adam(optimizer: schema.Optimizer) -> optax.GradientTransformation:
    """Return bias-corrected Adam without learning rate and decay (fp32 moments)."""
    return optax.scale_by_adam(b1=optimizer.beta1, b2=optimizer.beta2, eps=optimizer.eps)


def adamw_update(
    optimizer: schema.Optimizer, grads: Any, opt_state: Any, params: Any, lr: Any, decay: Any
) -> tuple[Any, Any]:
    """Return the new parameters and Adam state: params - lr (adam(grads) + decay params).

    Decay falls on the parameters declared with `decays` (matrices and embeddings).
    """
    updates, opt_state = adam(optimizer).update(grads, opt_state, params)

    def one(param: nnx.Variable[Any], update: nnx.Variable[Any]) -> Any:
        rate = decay if param.get_metadata("decays") else 0.0
        return jax.tree.map(lambda p, u: p - lr * (u + rate * p), param, update)

    return jax.tree.map(one, params, updates, is_leaf=layouts.is_variable), opt_state


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossScale:
    """The state of dynamic loss scaling; all scalars."""

    scale: Any
    good_steps: Any
    hysteresis: Any


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
    """Return the loss scale that a run goes on with, from the one that another precision left.

    A dynamic scale goes on, with as many overflows counted as there were; every other starts anew.
    """
    if not (then.scales_dynamically and now.scales_dynamically):
        return init_loss_scale(now)
    more_overflows = now.loss_scale_hysteresis - then.loss_scale_hysteresis
    return LossScale(
        scale=jnp.maximum(saved.scale, now.min_loss_scale),
        good_steps=saved.good_steps,
        hysteresis=saved.hysteresis + more_overflows,
    )


def next_loss_scale(precision: schema.Precision, state: LossScale, finite: Any) -> LossScale:
    """Return the loss scale after a step: doubled after a window of good ones, halved on overflow.

    The hysteresis is refilled only when the scale grows, so after the first overflows each
    further one halves at once (Megatron's rule).
    """
    if not precision.scales_dynamically:
        return state
    hysteresis = jnp.where(finite, state.hysteresis, state.hysteresis - 1)
    halve = ~finite & (hysteresis <= 0)
    good_steps = jnp.where(finite, state.good_steps + 1, 0)
    # A resumed run may have a shorter window than the good steps that it goes on from.
    double = good_steps >= precision.loss_scale_window
    halved = jnp.maximum(state.scale / 2, precision.min_loss_scale)
    return LossScale(
        scale=jnp.where(double, state.scale * 2, jnp.where(halve, halved, state.scale)),
        good_steps=jnp.where(double, 0, good_steps),
        hysteresis=jnp.where(double, precision.loss_scale_hysteresis, hysteresis),
    )
