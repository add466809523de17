"""Generation: a cache changes nothing, nor do the other rows of a batch, nor does the mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt3jax import errors
from gpt3jax.config import schema
from gpt3jax.model import gpt
from gpt3jax.sample import cached_network, decoder_weights, generate, sampling, sampling_options

import tiny

MODELS = {
    "dense": {"n_layers": 2},
    "alternating": {
        "n_layers": 3, "attention": schema.Attention(pattern="alternating", band=4), "gelu": "erf"
    },
}  # fmt: skip
# Where recomputing everything shows the band in the quick tests already.
DENSE_FIRST = ["dense", pytest.param("alternating", marks=pytest.mark.slower)]
GREEDY = sampling_options.Options(temperature=0.0, max_new_tokens=12)
PROMPTS = [[5, 17, 3, 99, 250], [7], list(range(100, 111)), [499, 0, 1]]


def make_params(kind="dense", **changes):
    """Return random weights of a size that makes the layers matter."""
    cfg = tiny.make_config(model={"init_std": 0.2, "seq_len": 32, **MODELS[kind], **changes}).model
    params = gpt.GPT(cfg, jax.random.key(3))
    noise = iter(jax.random.split(jax.random.key(4), 100))
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(noise), x.shape), params)


def make_generator(params, mesh=None, eod_id=-1, **compute):
    copy = jax.tree.map(jnp.copy, params)  # its arrays are given up
    return generate.Generator(copy, gpt.Compute(**compute), mesh or tiny.one_device_mesh(), eod_id)


def make_rows(prompts=PROMPTS, options=GREEDY, numbers=None):
    each = options if isinstance(options, list) else [options] * len(prompts)
    numbers = numbers or range(len(prompts))
    return [
        generate.Row(prompt=prompt, options=option, number=number)
        for prompt, option, number in zip(prompts, each, numbers, strict=True)
    ]


def run(generator, prompts=PROMPTS, options=GREEDY, numbers=None):
    """Return the new tokens of each prompt."""
    out = [[] for _ in prompts]
    for new in generator.stream(make_rows(prompts, options, numbers)):
        for row, tokens in zip(out, new, strict=True):
            row.extend(tokens)
    return out


@jax.jit
def hidden(params, tokens_BT):
    return params(tokens_BT, jnp.arange(tokens_BT.shape[1])[None])


def uncached_logits(params, tokens):
    """Return the logits after each token of one sequence, `[T, V]`, of the true vocabulary."""
    padded = [*tokens, *[0] * (32 - len(tokens))]  # later tokens change nothing
    x_BTD = np.asarray(hidden(params, jnp.asarray([padded])))
    logits = x_BTD[0] @ np.asarray(params.embedding_VD[...]).T
    return logits[: len(tokens), : params.model.vocab_size]


@pytest.mark.parametrize("kind", DENSE_FIRST)
def test_logits_with_a_cache_are_those_without(kind):
    params = make_params(kind)
    rng = np.random.default_rng(0)
    sequences = rng.integers(0, tiny.VOCAB, (3, 20)).tolist()
    lengths = [5, 1, 8]
    with jax.set_mesh(tiny.one_device_mesh()):
        weights = decoder_weights.prepare(jax.tree.map(jnp.copy, params), gpt.Compute())
    tokens_BT = np.zeros((3, 8), np.int32)
    for row, tokens, n in zip(tokens_BT, sequences, lengths, strict=True):
        row[8 - n :] = tokens[:n]
    padding_B = jnp.asarray([8 - n for n in lengths])
    read = jax.jit(cached_network.prompt_logits, static_argnums=3)
    follow = jax.jit(cached_network.next_logits)
    logits_BV, cache = read(weights, jnp.asarray(tokens_BT), padding_B, 24)
    cache = dataclasses.replace(cache, slot=cache.slot + 1)
    expected = [uncached_logits(params, tokens) for tokens in sequences]
    for i in range(12):
        for row, n in enumerate(lengths):
            np.testing.assert_allclose(
                logits_BV[row, : tiny.VOCAB], expected[row][n + i - 1], rtol=1e-4, atol=2e-4
            )
        assert (np.asarray(logits_BV)[:, tiny.VOCAB :] == -np.inf).all()
        token_B = jnp.asarray([t[n + i] for t, n in zip(sequences, lengths, strict=True)])
        logits_BV, keys_values = follow(weights, cache, token_B)
        cache = cache.append(keys_values, cache.slot)


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=pytest.mark.slow if kind == "dense" else ()) for kind in MODELS],
)
def test_greedy_text_is_what_recomputing_everything_gives(kind):
    params = make_params(kind)
    generated = run(make_generator(params))
    for prompt, tokens in zip(PROMPTS, generated, strict=True):
        text = list(prompt)
        for _ in range(12):
            text.append(int(uncached_logits(params, text)[-1].argmax()))
        assert tokens == text[len(prompt) :]


RANDOM = sampling_options.Options(temperature=0.9, max_new_tokens=10, seed=5)
MIXED = [
    RANDOM,
    dataclasses.replace(RANDOM, top_k=7),
    dataclasses.replace(GREEDY, max_new_tokens=3),
    dataclasses.replace(RANDOM, top_p=0.8, seed=6),
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", DENSE_FIRST)
def test_a_row_is_the_same_alone_and_in_a_batch(kind):
    generator = make_generator(make_params(kind))
    together = run(generator, options=MIXED, numbers=[0, 0, 0, 2])
    assert [len(tokens) for tokens in together] == [10, 10, 3, 10]
    for i, row in enumerate([0, 0, 0, 2]):
        assert run(generator, PROMPTS[i : i + 1], MIXED[i : i + 1], [row]) == [together[i]]


def test_rows_and_seeds_draw_apart():
    generator = make_generator(make_params())
    out = run(generator, [PROMPTS[0]] * 4, RANDOM)
    other = run(generator, [PROMPTS[0]], dataclasses.replace(RANDOM, seed=6))
    assert len({tuple(tokens) for tokens in out + other}) == 5


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"data": 4, "tensor": 2}])
def test_every_mesh_gives_the_text_of_one_device(axes):
    params = make_params("alternating")
    expected = run(make_generator(params), options=MIXED)
    generator = make_generator(params, tiny.make_mesh(**axes))
    layout = generator.weights.layers[0].w_in_FD.sharding.shard_shape((256, 64))
    assert layout == (128, 64 // axes.get("fsdp", 1))
    assert run(generator, options=MIXED) == expected
    assert run(generator, PROMPTS[:1], MIXED[:1]) == expected[:1]


def test_bfloat16_follows_the_training_network():
    params = make_params()
    compute = gpt.Compute(dtype="bfloat16")
    with jax.set_mesh(tiny.one_device_mesh()):
        weights = decoder_weights.prepare(jax.tree.map(jnp.copy, params), compute)
    tokens_BT = jnp.asarray([PROMPTS[2]])
    read = jax.jit(cached_network.prompt_logits, static_argnums=3)
    logits_BV, cache = read(weights, tokens_BT, jnp.zeros(1, jnp.int32), 16)
    assert cache.layers[0][0].dtype == jnp.bfloat16
    x_BTD = params(tokens_BT, jnp.arange(11)[None], compute=compute)
    expected = x_BTD[0, -1].astype(jnp.float32) @ weights.head_VD.T.astype(jnp.float32)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(logits_BV[0, :500], expected[:500], atol=0.01 * scale)


def test_text_ends_with_the_end_of_text_token():
    params = make_params()
    full = run(make_generator(params))
    eod_id = full[0][4]
    cut = [tokens[: tokens.index(eod_id) + 1] if eod_id in tokens else tokens for tokens in full]
    generator = make_generator(params, eod_id=eod_id)
    assert run(generator) == cut and len(cut[0]) <= 5
    assert run(generator, options=dataclasses.replace(GREEDY, ignore_eod=True)) == full


def test_text_ends_where_the_context_is_full():
    generator = make_generator(make_params(seq_len=16))
    out = run(generator, options=dataclasses.replace(GREEDY, max_new_tokens=100))
    assert [len(p) + len(t) for p, t in zip(PROMPTS, out, strict=True)] == [16] * 4


def test_padded_vocabulary_is_never_chosen():
    params = make_params(mask_padded_vocab=False)
    params.embedding_VD[...] = params.embedding_VD[...].at[500:].mul(100.0)
    out = run(make_generator(params), options=dataclasses.replace(RANDOM, temperature=5.0))
    assert all(0 <= token < 500 for tokens in out for token in tokens)


def test_lengths_in_one_bucket_share_their_programs():
    generator = make_generator(make_params(seq_len=48))  # a model that no other test compiles

    def n_programs():
        return generator.prefill._cache_size(), generator.decode._cache_size()

    n_prefill, n_decode = n_programs()
    for prompt in ([1, 2, 3], [4] * 7, [9] * 8):
        run(generator, [prompt])
        assert n_programs() == (n_prefill + 1, n_decode + 1)
    run(generator, [[9] * 9])  # in the next bucket, with a cache of the same length
    assert n_programs() == (n_prefill + 2, n_decode + 1)


@pytest.mark.parametrize(
    ("prompt", "changes", "message"),
    [
        ([], {}, "a prompt is empty"),
        ([1] * 32, {}, "a prompt has 32 tokens, and model.seq_len=32"),
        ([500], {}, "ids from 500 to 500"),
        ([1], {"temperature": -1.0}, "temperature=-1.0 must be at least 0"),
        ([1], {"top_p": 0.0}, "top_p=0.0 must be above 0"),
        ([1], {"top_p": float("nan")}, "top_p=nan"),
        ([1], {"max_new_tokens": -1}, "max_new_tokens=-1 must be at least 0"),
        ([1], {"seed": -1}, "seed=-1 must be"),
    ],
)
def test_what_cannot_be_generated_is_refused(prompt, changes, message):
    generator = object.__new__(generate.Generator)
    generator.model = tiny.make_config().model
    with pytest.raises(errors.UserError, match=message):
        generator.check(prompt, dataclasses.replace(GREEDY, **changes))


def log_softmax(params, tokens):
    """Return the training network's log-probabilities after each token, `[T, V]`."""
    padded = [*tokens, *[0] * (32 - len(tokens))]
    logits = np.asarray(hidden(params, jnp.asarray([padded])))[0, : len(tokens)]
    logits = logits @ np.asarray(params.embedding_VD[...]).T[:, : params.model.softmax_size]
    return logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))


@pytest.mark.parametrize("mask_padded_vocab", [pytest.param(True, marks=pytest.mark.slow), False])
def test_scores_are_the_training_networks_log_softmax(mask_padded_vocab):
    """Of prompts and of new tokens, whatever chooses these."""
    params = make_params(mask_padded_vocab=mask_padded_vocab)
    generator = make_generator(params)
    tokens, scores = [[] for _ in PROMPTS], generator.score(PROMPTS)
    for new in generator.steps(make_rows(PROMPTS, MIXED, [0, 0, 0, 2]), scored=True):
        for row, row_scores, ids, added in zip(tokens, scores, *new, strict=True):
            row += ids
            row_scores += added
    assert tokens == run(generator, options=MIXED, numbers=[0, 0, 0, 2])
    for prompt, row, row_scores in zip(PROMPTS, tokens, scores, strict=True):
        whole = prompt + row
        expected = log_softmax(params, whole)
        assert len(row_scores) == len(whole) - 1
        for after, token, score in zip(expected, whole[1:], row_scores, strict=False):
            likeliest = np.argsort(-after[: tiny.VOCAB])[:5]
            assert [i for i, _ in score.likeliest] == likeliest.tolist()
            logprobs = [score.logprob, *(logprob for _, logprob in score.likeliest)]
            np.testing.assert_allclose(logprobs, after[[token, *likeliest]], atol=5e-4)


@pytest.mark.parametrize("mode", ["random", "filtered"])
def test_the_least_temperature_takes_the_likeliest(mode):
    logits_BV = jnp.asarray([[1.0, 9e3, 1e4, -jnp.inf]] * 8)
    options = [sampling_options.Options(temperature=1e-37, top_p=0.9)] * 8
    arrays = dataclasses.replace(sampling.option_arrays(options, list(range(8))), mode=mode)
    assert (sampling.choose(logits_BV, jnp.arange(8), arrays) == 2).all()


def numpy_allowed(logits, top_k, top_p):
    """Return the ids that top-k and then top-p leave, by the definition."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    order = order[:top_k] if top_k else order
    exp = np.exp(np.float64(logits[order]) - logits[order].max())
    kept, total = [], 0.0
    for token, p in zip(order, exp / exp.sum(), strict=True):
        if total < top_p:
            kept.append(token)
        total += p
    return kept


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (1, 1.0), (5, 1.0), (0, 0.51), (20, 0.9), (99, 0.9)]
)
def test_top_k_and_top_p_leave_what_the_definition_says(top_k, top_p):
    rng = np.random.default_rng(1)
    logits_BV = rng.normal(0, 2, (6, 50)).astype(np.float32)
    logits_BV[0] = 0.0  # ties
    logits_BV[1, 10:] = -np.inf
    mask_BV = sampling.allowed(jnp.asarray(logits_BV), jnp.full(6, top_k), jnp.full(6, top_p))
    for row, logits in zip(np.asarray(mask_BV), logits_BV, strict=True):
        kept = np.flatnonzero(row & np.isfinite(logits))
        expected = [i for i in numpy_allowed(logits, top_k, top_p) if np.isfinite(logits[i])]
        assert sorted(expected) == kept.tolist()


def test_draws_follow_the_probabilities():
    logits_V = np.log(np.asarray([0.5, 0.3, 0.15, 0.05], np.float32))
    options = [sampling_options.Options(temperature=0.5, top_k=3)] * 4000
    arrays = sampling.option_arrays(options, list(range(4000)))
    logits_BV = jnp.broadcast_to(jnp.asarray(logits_V), (4000, 4))
    tokens_B = sampling.choose(logits_BV, jnp.full(4000, 9), arrays)
    p = np.asarray([0.5, 0.3, 0.15, 0.0]) ** 2
    shares = np.bincount(tokens_B, minlength=4) / 4000
    np.testing.assert_allclose(shares, p / p.sum(), atol=0.03)  # 3.8 standard deviations


def test_the_weights_of_training_are_held_once():
    params = make_params()
    generator = make_generator(params)
    held = sum(x.nbytes for x in jax.tree.leaves(generator.weights.layers))
    assert held == sum(x.nbytes for x in jax.tree.leaves(params.blocks))
