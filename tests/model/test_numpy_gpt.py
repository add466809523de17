"""The reference itself: against finite differences, Megatron-LM's and Hugging Face's numbers."""

import numpy as np
import pytest

import numpy_gpt

VOCAB_SIZE, PADDED_VOCAB, SEQ_LEN = 20, 24, 6
SHAPES = {
    "embedding_VD": (PADDED_VOCAB, 8),
    "positions_TD": (SEQ_LEN, 8),
    "blocks/norm_1_scale_LD": (2, 8),
    "blocks/norm_1_bias_LD": (2, 8),
    "blocks/w_qkv_LD3HK": (2, 8, 3, 2, 5),
    "blocks/b_qkv_L3HK": (2, 3, 2, 5),
    "blocks/w_out_LHKD": (2, 2, 5, 8),
    "blocks/b_out_LD": (2, 8),
    "blocks/norm_2_scale_LD": (2, 8),
    "blocks/norm_2_bias_LD": (2, 8),
    "blocks/w_in_LDF": (2, 8, 12),
    "blocks/b_in_LF": (2, 12),
    "blocks/w_down_LFD": (2, 12, 8),
    "blocks/b_down_LD": (2, 8),
    "norm_scale_D": (8,),
    "norm_bias_D": (8,),
}


def random_inputs(rng, *, every_option):
    tokens_BT, targets_BT = rng.integers(VOCAB_SIZE, size=(2, 3, SEQ_LEN))
    inputs = {"tokens_BT": tokens_BT, "targets_BT": targets_BT}
    if every_option:
        inputs |= {
            "loss_mask_BT": rng.random((3, SEQ_LEN)).round(),
            "positions_BT": rng.integers(SEQ_LEN, size=(3, SEQ_LEN)),
            "allowed_BTS": (rng.random((3, SEQ_LEN, SEQ_LEN)) < 0.7) | np.eye(SEQ_LEN, dtype=bool),
            "gelu": "erf",
            "vocab_size": VOCAB_SIZE,
            "layer_windows": [2, None],
            "eps": 1e-3,
        }
    return inputs


@pytest.mark.parametrize("every_option", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_gradient_equals_finite_differences(name, every_option):
    rng = np.random.default_rng(0)
    weights = {n: 0.5 * rng.standard_normal(shape) for n, shape in SHAPES.items()}
    inputs = random_inputs(rng, every_option=every_option)
    grad = numpy_gpt.loss_and_grads(weights, **inputs)[-1][name]

    def slope(direction, step=1e-5):
        beyond, before = (
            numpy_gpt.loss_and_grads(weights | {name: weights[name] + s * direction}, **inputs)[0]
            for s in (step, -step)
        )
        return (beyond - before) / (2 * step)

    def one_entry():
        direction = np.zeros(SHAPES[name])
        direction.flat[rng.integers(direction.size)] = 1
        return direction

    # Every entry at once, then a few alone: 1e-9 is the rounding of a loss of 3 over 2e-5.
    for direction in [rng.standard_normal(SHAPES[name]), *(one_entry() for _ in range(4))]:
        error = abs(slope(direction) - (grad * direction).sum())
        assert error < 1e-7 * np.linalg.norm(grad) + 1e-9


def assert_golden(results, expected):
    """Compare in float64 with a peer's float32: 1e-5 of each array's norm."""
    loss, logits_BTV, token_loss_BT, grads = results
    actual = {"logits_BTV": logits_BTV[..., : expected["logits_BTV"].shape[-1]]}
    actual["token_loss_BT"] = token_loss_BT
    arrays = {name: expected[name] for name in actual if name in expected}
    errors = numpy_gpt.relative_errors(actual | grads, arrays | expected["grads"])
    assert set(grads) == set(expected["grads"]) == set(SHAPES)
    assert {name: error for name, error in errors.items() if error >= 1e-5} == {}
    assert loss == pytest.approx(expected["loss"], rel=1e-6)


@pytest.mark.parametrize("variant", ["tanh", "erf", "reset", "window"])
def test_equals_megatron(variant):
    weights, inputs, expected = numpy_gpt.load_megatron(variant)
    assert_golden(numpy_gpt.loss_and_grads(weights, **inputs), expected)


@pytest.mark.parametrize("padded_vocab", [257, 384])
def test_equals_hugging_face_whatever_the_padding(padded_vocab):
    weights, inputs, expected = numpy_gpt.load_hf(padded_vocab)
    assert_golden(numpy_gpt.loss_and_grads(weights, **inputs), expected)


def test_follows_megatrons_training_curve():
    weights, final_weights, config, curve = numpy_gpt.load_curve()
    (beta1, beta2), state, losses, grad_norms = config["betas"], None, [], []
    options = {"beta1": beta1, "beta2": beta2, "eps": config["eps"]}
    options |= {"weight_decay": config["wd"], "clip": config["clip"]}
    # The two equal microbatches of each step at once: nothing is masked, so the mean is the same.
    for tokens_BT, lr in zip(curve["tokens"], curve["lr"], strict=True):
        loss, _, _, grads = numpy_gpt.loss_and_grads(weights, tokens_BT[:, :-1], tokens_BT[:, 1:])
        weights, state, grad_norm = numpy_gpt.adamw_step(weights, grads, state, lr, **options)
        losses.append(loss)
        grad_norms.append(grad_norm)
    np.testing.assert_allclose(losses, curve["loss"], rtol=1e-6)
    np.testing.assert_allclose(grad_norms, curve["grad_norm"], rtol=1e-5)
    assert max(numpy_gpt.relative_errors(weights, final_weights).values()) < 1e-5


def test_clipping_adds_1e_6_to_the_norm_as_megatron_does():
    weights, grads = {"norm_bias_D": np.zeros(2)}, {"norm_bias_D": np.array([3e-6, 4e-6])}
    _, (_, mean, _), norm = numpy_gpt.adamw_step(weights, grads, None, 0.1, beta1=0, clip=3e-6)
    assert norm == pytest.approx(5e-6)
    np.testing.assert_allclose(mean["norm_bias_D"], [1.5e-6, 2e-6])  # 3 / (5 + 1) = 0.5
