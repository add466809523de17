"""The order in which a blend draws from its maps, as Megatron's `build_blending_indices`.

Each step chooses the map that is furthest behind its share. Megatron does so in a loop in C++; here
the steps are cut into segments that NumPy computes side by side, with the same result.
Source: Megatron-LM `helpers.cpp` at d98e8a64dd.
"""

from collections.abc import Sequence

import numpy as np

MIN_SEGMENT = 1024  # steps
LEAD_IN = 256  # steps before a segment, after which a guessed start is mostly the true one
_MAX_SEGMENTS = 16_384


def normalise(weights: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return weights as float64 that add up to 1."""
    weights = np.asarray(weights, np.float64)
    return weights / weights.sum()


def choose_maps(weights: np.ndarray, n_steps: int, limits: np.ndarray | None = None) -> np.ndarray:
    """Return the map chosen at each step, int16 `[n_steps]`.

    Step k chooses the map i with the largest weight_i max(k, 1) - count_i, the first of equals.
    count_i is how often map i was chosen before, at most limits_i times. In float64, step by step,
    this is what Megatron's loop computes. Here all segments run side by side, each from a guess of
    the counts at its start. A segment whose start is not the end of the segment before it runs
    again from there, until all of them join.
    """
    length = max(MIN_SEGMENT, -(-n_steps // _MAX_SEGMENTS))
    starts = np.arange(0, n_steps, length, dtype=np.float64)
    begins = np.zeros((len(weights), len(starts)))
    early = np.maximum(starts[1:] - LEAD_IN, 0)
    begins[:, 1:] = run_steps(weights, early, guess_counts(weights, early), LEAD_IN, limits)[1]
    order, ends = run_steps(weights, starts, begins, min(length, n_steps), limits)
    while len(wrong := 1 + np.flatnonzero((begins[:, 1:] != ends[:, :-1]).any(axis=0))):
        begins[:, wrong] = ends[:, wrong - 1]
        order[wrong], ends[:, wrong] = run_steps(
            weights, starts[wrong], begins[:, wrong], length, limits
        )
    return order.reshape(-1)[:n_steps]


def guess_counts(weights: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Return likely counts `[maps, n]` at steps `[n]`: shares, rounded so that the sum is right."""
    shares = weights[:, None] * steps
    counts = np.floor(shares)
    by_remainder = np.argsort(counts - shares, axis=0, kind="stable")
    rank = np.argsort(by_remainder, axis=0)
    return counts + (rank < steps - counts.sum(axis=0))


def run_steps(
    weights: np.ndarray,
    starts: np.ndarray,
    counts: np.ndarray,
    n_steps: int,
    limits: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Take n_steps steps from each start `[n]` with its counts `[maps, n]`.

    Returns:
        The chosen maps `[n, n_steps]` int16, and the counts after the last step.
    """
    n = len(starts)
    counts, columns = counts.copy(), np.arange(n)
    chosen = np.empty((n, n_steps), np.int16)
    lag, most = np.empty(n), np.empty(n)
    choice, is_more = np.empty(n, np.int64), np.empty(n, bool)
    for t in range(n_steps):
        steps = np.maximum(starts + t, 1)
        choice[:] = 0
        most[:] = -np.inf
        for i, weight in enumerate(weights):
            np.multiply(steps, weight, out=lag)
            lag -= counts[i]
            if limits is not None:
                lag[counts[i] >= limits[i]] = -np.inf
            np.greater(lag, most, out=is_more)
            np.putmask(choice, is_more, i)
            np.maximum(lag, most, out=most)
        chosen[:, t] = choice
        counts[choice, columns] += 1
    return chosen, counts


def count_before(order: np.ndarray, n_maps: int) -> tuple[np.ndarray, list[int]]:
    """Return how often each map of the order was chosen before, int64, and how often in all."""
    before, totals = np.empty(len(order), np.int64), []
    for i in range(n_maps):
        places = np.flatnonzero(order == i)
        before[places] = np.arange(len(places))
        totals.append(len(places))
    return before, totals
