"""The promise, for all tests of it: a config trains on every mesh as on one device."""

import dataclasses
import functools

import numpy as np

from gpt3jax import step
from gpt3jax.config import layout, schema

import tiny

NORMS = ("loss", "grad_norm")


@dataclasses.dataclass(frozen=True)
class Run:
    """What a few steps of a config did; arrays by name, as numpy."""

    initial: dict[str, np.ndarray]
    moments: dict[str, np.ndarray]  # Adam's first ones after a step: its gradient, clipped
    weights: dict[str, np.ndarray]  # after the last step
    metrics: dict[str, np.ndarray]  # of each step: loss, gradient norm, norm of each array
    evaluated: tuple[float, ...]  # loss sum and tokens of the last batch, where asked for
    n_compiled: int


@dataclasses.dataclass(frozen=True)
class Steps:
    """Which steps are taken: how many, and what their random batches are like."""

    n: int
    masked: bool = False
    documents: bool = False
    evaluate: bool = False

    def batch(self, i, cfg, mesh, n_microbatches):
        """Return the batch of step i, laid out on a mesh."""
        batch = tiny.make_batch(i, cfg, mesh, n_microbatches, self.masked)
        return tiny.add_documents(batch) if self.documents else batch


def train(cfg, mesh, n_microbatches, steps):
    """Train on a mesh whose batches have so many microbatches."""
    program = step.build(cfg, mesh, cfg.train.n_steps * cfg.batch.global_batch_size)
    state = program.init()
    initial, moments, metrics = tiny.leaves(state.params), {}, []
    for i in range(steps.n):
        batch = steps.batch(i, cfg, mesh, n_microbatches)
        state, values = program.train(state, batch)
        metrics.append({name: np.asarray(values[name]) for name in (*NORMS, "grad_norms")})
        moments = moments or tiny.leaves(state.opt_state.mu)
    return Run(
        initial=initial,
        moments=moments,
        weights=tiny.leaves(state.params),
        metrics={name: np.stack([m[name] for m in metrics]) for name in metrics[0]},
        evaluated=tuple(map(float, program.eval(state.params, batch))) if steps.evaluate else (),
        n_compiled=program.train.jitted._cache_size(),
    )


@functools.cache
def alone(cfg, steps):
    """Train on one device a config that has no mesh of its own."""
    return train(cfg, tiny.make_mesh(), 1, steps)


def check(cfg, n_microbatches, steps, *, rtol=1e-5, rtol_later=None, rtol_norms=None, weights=True):
    """Train on the mesh of a config, and compare with one device.

    `rtol` is of losses and gradient norms, which `rtol_norms` sets apart; `rtol_later` of those
    after the first step. In 16 bits
    some gradients, as of the bias of keys, are rounding noise, which Adam scales up: there
    `weights=False` compares neither gradients nor weights array by array.
    """
    mesh = tiny.make_mesh(**dataclasses.asdict(cfg.mesh))
    run = train(cfg, mesh, n_microbatches, steps)
    one = alone(layout.plain(dataclasses.replace(cfg, mesh=schema.Mesh())), steps)
    for name, array in run.initial.items():
        np.testing.assert_array_equal(array, like(one.initial, name, array), err_msg=name)
    for name in NORMS:
        ours, theirs = run.metrics[name], one.metrics[name]
        own = rtol_norms if rtol_norms and name == "grad_norm" else rtol
        np.testing.assert_allclose(ours[0], theirs[0], rtol=own, err_msg=name)
        np.testing.assert_allclose(ours, theirs, rtol=max(own, rtol_later or 0), err_msg=name)
    np.testing.assert_allclose(run.evaluated, one.evaluated, rtol=rtol)
    if weights:
        for name, array in run.moments.items():
            expected = like(one.moments, name, array)
            assert error(array, expected, 0) < max(rtol, 1e-5), f"gradient of {name}"
        for name, array in run.weights.items():
            expected, initial = (like(a, name, array) for a in (one.weights, one.initial))
            assert error(array, expected, initial) < 100 * (rtol_later or rtol), name
    assert run.n_compiled == 1, "the step was compiled more than once"


def like(arrays, name, array):
    """Return an array of one device in the shape of another mesh: virtual stages cut layers."""
    return arrays[name].reshape(array.shape)


def error(array, expected, since):
    """Return the error of an array relative to how far it went since."""
    return np.linalg.norm(array - expected) / np.linalg.norm(expected - since)
