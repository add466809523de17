"""Every token counts once, in its context, and no mesh, batch or window changes its loss."""

import functools
import pathlib

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt3jax import errors, step
from gpt3jax.checkpoint import parameters
from gpt3jax.config import schema
from gpt3jax.convert import __main__ as convert
from gpt3jax.evaluate import token_losses, windows

import tiny

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "hf_gpt2"
MODELS = {
    "dense": {},
    "padding takes part": {"mask_padded_vocab": False},
    "alternating": {
        "n_layers": 3, "attention": schema.Attention(pattern="alternating", band=4), "gelu": "erf"
    },
}  # fmt: skip


def make_config(kind="dense", **data):
    changes = {"n_layers": 2, **MODELS[kind]}
    return tiny.make_config(model=changes, data=data)


@functools.cache
def make_scorer(cfg, mesh=None, batch_size=4):
    program = step.build(cfg, mesh or tiny.one_device_mesh(), 1)
    return token_losses.Scorer(tiny.random_params(cfg.model), program, cfg.data, batch_size)


def make_rows(n, lengths=(33, 5, 20, 2, 32), seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, tiny.VOCAB, lengths[i % len(lengths)]) for i in range(n)]


def score(scorer, rows):
    """Return the losses and bools of any number of rows, each joined."""
    scored = []
    for i in range(0, len(rows), scorer.n_rows):
        scored += scorer.score(rows[i : i + scorer.n_rows])
    return tuple(np.concatenate(parts) for parts in zip(*scored, strict=True))


def plain_logits(params, inputs):
    """Return float64 logits `[T, V]` by the training network alone, those of the softmax."""
    n_positions = params.model.seq_len
    padded = jnp.pad(jnp.asarray(inputs), (0, n_positions - len(inputs)))[None]
    x_BTD = network(params, padded, jnp.arange(n_positions)[None])
    x_TD = np.asarray(x_BTD[0, : len(inputs)], np.float64)
    logits = x_TD @ np.asarray(params.embedding_VD[...], np.float64).T
    return logits[:, : params.model.softmax_size]


@jax.jit
def network(params, tokens, positions):
    return params(tokens, positions)


def plain_losses(logits, targets):
    top = logits.max(-1)
    return (
        np.log(np.exp(logits - top[:, None]).sum(-1)) + top - logits[range(len(targets)), targets]
    )


@hypothesis.given(st.integers(0, 100), st.integers(1, 20), st.data())
def test_every_token_counts_once_with_the_context_that_was_promised(n_tokens, seq_len, data):
    stride = data.draw(st.integers(1, seq_len))
    counted = []
    for first, start, stop in windows.windows(n_tokens, seq_len, stride):
        assert stop - first == min(seq_len, n_tokens)
        assert not counted or start - first >= seq_len - stride
        counted += range(start, stop)
    assert counted == list(range(n_tokens))


@pytest.mark.parametrize("kind", MODELS)
def test_losses_are_those_of_the_training_network(kind):
    cfg = make_config(kind)
    params, rows = tiny.random_params(cfg.model), make_rows(5)
    likeliest = plain_logits(params, rows[0][:1])[0].argmax()
    assert likeliest < tiny.VOCAB
    rows.append(np.asarray([rows[0][0], likeliest]))
    scored = make_scorer(cfg, batch_size=6).score(rows)
    for row, (losses, greedy) in zip(rows, scored, strict=True):
        logits = plain_logits(params, row[:-1])
        np.testing.assert_allclose(losses, plain_losses(logits, row[1:]), rtol=1e-5, atol=1e-5)
        assert (greedy == (logits.argmax(-1) == row[1:])).all()
    assert greedy.all()


@pytest.mark.parametrize("stride", [1, 16, 32])
def test_windows_give_what_each_token_has_in_its_context_alone(stride):
    cfg = make_config()
    scorer, params = make_scorer(cfg), tiny.random_params(cfg.model)
    tokens, eod_id, seq_len = make_rows(1, (70,))[0], 7, cfg.model.seq_len
    rows = list(windows.window_rows(tokens, eod_id, seq_len, stride))
    losses = np.concatenate([scorer.score([row])[0][0][-n:] for row, n in rows])
    stream = np.asarray([eod_id, *tokens])
    stops = [min(70, seq_len + i * stride) for i in range(80)]
    for i in range(0, 70, 3):
        stop = next(s for s in stops if s > i)
        context = stream[max(0, stop - seq_len) : i + 1]
        [expected] = plain_losses(plain_logits(params, context)[-1:], tokens[[i]])
        np.testing.assert_allclose(losses[i], expected, atol=2e-5)


@pytest.mark.parametrize("axes", [{"data": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_no_mesh_changes_a_loss(axes):
    cfg, rows = make_config("alternating"), make_rows(10)
    alone = score(make_scorer(cfg), rows)
    spread = score(make_scorer(cfg, tiny.make_mesh(**axes), batch_size=3), rows)
    np.testing.assert_allclose(spread[0], alone[0], rtol=1e-5, atol=1e-5)
    assert (spread[1] == alone[1]).all()


@pytest.mark.parametrize("batch_size", [1, 7])
def test_no_other_row_and_no_padding_changes_a_loss(batch_size):
    cfg, rows = make_config(), make_rows(9)
    expected = score(make_scorer(cfg, batch_size=4), rows)
    losses = score(make_scorer(cfg, batch_size=batch_size), rows)
    np.testing.assert_allclose(losses[0], expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("masked", [True, False])
def test_a_uniform_model_loses_the_logarithm_of_the_vocabulary(masked):
    cfg = make_config("dense" if masked else "padding takes part")
    params = tiny.random_params(cfg.model)
    params.embedding_VD[...] = jnp.zeros_like(params.embedding_VD[...])  # of the head as well
    program = step.build(cfg, tiny.one_device_mesh(), 1)
    losses, _ = token_losses.Scorer(params, program, cfg.data, 1).score(make_rows(1))[0]
    np.testing.assert_allclose(losses, np.log(500 if masked else 512), rtol=1e-6)


def test_hugging_face_has_the_same_loss(tmp_path):
    """Its mean, and each token's, from the logits that it computed."""
    folder = str(tmp_path / "checkpoint")
    convert.from_hf(convert.FromHf(folder=str(GOLDEN), output=folder))
    source = parameters.open_newest(folder, tiny.one_device_mesh())
    scorer = token_losses.Scorer(source.params(), source.program, source.cfg.data, 4)
    golden = np.load(GOLDEN / "golden.npz")
    ids, logits = golden["input_ids"], golden["logits"].astype(np.float64)
    scored = scorer.score(list(ids))
    for row, row_logits, (losses, greedy) in zip(ids, logits, scored, strict=True):
        np.testing.assert_allclose(losses, plain_losses(row_logits[:-1], row[1:]), atol=1e-4)
        assert (greedy == (row_logits[:-1].argmax(-1) == row[1:])).all()
    mean = np.concatenate([losses for losses, _ in scored]).mean()
    np.testing.assert_allclose(mean, golden["loss"], rtol=1e-5)


def test_documents_hide_as_they_did_in_training():
    first, second = make_rows(2, (9, 12))
    joined = np.concatenate([[0], first, [0], second])
    for resets in (True, False):
        cfg = make_config(reset_position_ids=resets, reset_attention_mask=resets)
        scorer = make_scorer(cfg)
        alone, _ = scorer.score([second])[0]
        losses, _ = scorer.score([joined])[0]
        assert np.allclose(losses[-len(alone) :], alone, atol=1e-5) == resets


def test_a_token_that_the_model_does_not_know_is_an_error():
    with pytest.raises(
        errors.UserError, match=r"ids from 1 to 500, but the model knows ids from 0 to 499"
    ):
        make_scorer(make_config()).score([np.asarray([1, 500, 3])])
