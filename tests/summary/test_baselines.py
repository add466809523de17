"""Guesses by frequency and by the token before, where the best possible loss is known."""

import numpy as np
import pytest

from gpt3jax.summary import baselines

N_IDS = 50


def pairs_of(tokens):
    return tokens[:-1], tokens[1:]


def entropy(probabilities):
    p = probabilities[probabilities > 0]
    return -(p * np.log(p)).sum()


def test_tokens_without_order_have_the_loss_of_their_entropy():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(N_IDS))
    seen, new = (rng.choice(N_IDS, 400_000, p=p) for _ in range(2))
    learner = baselines.Baselines(*pairs_of(seen), N_IDS)
    before, tokens = pairs_of(new)
    assert learner.unigram_losses(tokens).mean() == pytest.approx(entropy(p), abs=0.01)
    assert learner.bigram_losses(before, tokens).mean() == pytest.approx(entropy(p), abs=0.01)


def test_tokens_that_follow_the_one_before_have_the_loss_of_their_transitions():
    """Token h is followed by one of 4 tokens, with the probabilities p."""
    rng = np.random.default_rng(1)
    p = np.array([0.5, 0.25, 0.15, 0.1])

    def chain(n):
        after = np.random.default_rng(2).permuted(np.tile(np.arange(N_IDS), (N_IDS, 1)), axis=1)
        tokens = np.zeros(n, int)
        for i, choice in enumerate(rng.choice(4, n - 1, p=p)):
            tokens[i + 1] = after[tokens[i], choice]
        return tokens

    learner = baselines.Baselines(*pairs_of(chain(100_000)), N_IDS)
    before, tokens = pairs_of(chain(20_000))
    assert learner.bigram_losses(before, tokens).mean() == pytest.approx(entropy(p), abs=0.02)
    assert learner.unigram_losses(tokens).mean() > 3.0


def test_probabilities_are_those_of_the_formulas_and_sum_to_one():
    before, tokens = np.array([[1, 1], [1, 2]]), np.array([[3, 3], [0, 3]])
    learner = baselines.Baselines(before, tokens, 5)
    every = np.arange(5)
    unigram = np.exp(-learner.unigram_losses(every))
    assert unigram == pytest.approx(np.array([2, 1, 1, 4, 1]) / 9)
    for h, expected in (
        (1, (np.array([1, 0, 0, 2, 0]) + 2 * unigram) / (3 + 2)),
        (2, (np.array([0, 0, 0, 1, 0]) + 1 * unigram) / (1 + 1)),
        (4, unigram),  # nothing followed it
    ):
        bigram = np.exp(-learner.bigram_losses(np.full(5, h), every))
        assert bigram == pytest.approx(expected) and bigram.sum() == pytest.approx(1.0)


def test_nothing_learned_is_a_guess_among_all_tokens():
    none = np.zeros((0, 4), int)
    learner = baselines.Baselines(none, none, N_IDS)
    tokens = np.arange(N_IDS)
    assert learner.unigram_losses(tokens) == pytest.approx(np.log(N_IDS))
    assert learner.bigram_losses(tokens, tokens[::-1]) == pytest.approx(np.log(N_IDS))
