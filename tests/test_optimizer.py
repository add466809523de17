"""Schedules, loss scaling, clipping and AdamW against Megatron's own sequences."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt3jax import errors, optimizer, step
from gpt3jax.config import layout, schema, validation
from gpt3jax.model import gpt

import numpy_gpt
import tiny

GOLDEN = pathlib.Path(__file__).parent / "golden" / "megatron_curve"
SCHEDULES = json.loads((GOLDEN / "schedules.json").read_text())["learning_rate"]
SCALERS = json.loads((GOLDEN / "loss_scaler.json").read_text())


def schedule_config(a):
    """Return our optimizer config of the arguments of Megatron's scheduler."""
    growth = a["wd_incr_style"]
    return schema.Optimizer(
        peak_lr=a["max_lr"],
        min_lr=a["min_lr"],
        init_lr=a["init_lr"],
        decay=a["lr_decay_style"].lower(),
        decay_samples=a["lr_decay_steps"],
        # A float is fraction x decay_samples there.
        warmup_samples=0 if isinstance(a["lr_warmup_steps"], float) else a["lr_warmup_steps"],
        warmup_fraction=a["lr_warmup_steps"] / a["lr_decay_steps"]
        if isinstance(a["lr_warmup_steps"], float)
        else 0.0,
        wsd_decay_samples=a["wsd_decay_steps"] or 0,
        wsd_decay=a["lr_wsd_decay_style"] or "exponential",
        weight_decay=a["end_wd"],
        start_weight_decay=0.0 if growth == "constant" else a["start_wd"],
        weight_decay_growth=growth,
    )


@pytest.mark.parametrize("case", SCHEDULES, ids=lambda case: case["name"])
def test_learning_rate_and_weight_decay_are_megatrons(case):
    o, run_samples = schedule_config(case["arguments"]), case["arguments"]["wd_incr_steps"]
    validation.validate(dataclasses.replace(tiny.make_config(), optimizer=o))
    samples, lr, decay = np.array(case["samples_lr_wd"]).T
    exact = optimizer.learning_rate(o, run_samples, samples)
    np.testing.assert_allclose(exact, lr, rtol=1e-13, atol=1e-20)
    np.testing.assert_allclose(
        optimizer.weight_decay(o, run_samples, samples) + 0 * samples, decay, rtol=1e-13
    )
    # What the step itself computes, in float32 from integer samples.
    in_step = optimizer.learning_rate(o, run_samples, jnp.asarray(samples, jnp.int32), jnp)
    np.testing.assert_allclose(in_step + 0 * samples, lr, rtol=2e-6, atol=1e-7 * o.peak_lr)


def test_a_schedule_that_fits_reaches_its_peak_and_one_that_does_not_is_refused():
    """Longer than the run, or than decay_samples, its decay would begin during the warm-up."""
    for warmup in ({"warmup_samples": 30}, {"warmup_fraction": 0.3}):
        for length, run in (({}, 100), ({"decay_samples": 100}, 60)):
            given = {"peak_lr": 1.0, "decay": "wsd", "wsd_decay": "linear", **warmup, **length}
            o = schema.Optimizer(**given, wsd_decay_samples=70)
            validation.check_schedule(o, run)
            assert optimizer.learning_rate(o, run, 30) == 1
            assert optimizer.learning_rate(o, run, 31) > 0.98
            o = schema.Optimizer(**given, wsd_decay_samples=90)
            assert optimizer.learning_rate(o, run, 31) < 0.8  # it falls at once
            has = r"optimizer.decay_samples=100: " if length else r"the run's 100 \("
            message = f"=90 after a warm-up of 30 samples takes 120 samples, .* exceeds {has}"
            with pytest.raises(errors.UserError, match=message):
                validation.check_schedule(o, run)


def test_a_part_of_a_sample_is_no_reason_to_refuse():
    o = schema.Optimizer(peak_lr=1.0, decay="wsd", warmup_fraction=0.333, wsd_decay_samples=67)
    validation.check_schedule(o, 100)  # 33.3 + 67


def test_a_run_shorter_than_its_warmup_only_warms_up():
    o = schema.Optimizer(peak_lr=1.0, warmup_samples=100)
    for xp in (np, jnp):
        lr = [float(optimizer.learning_rate(o, 50, xp.asarray(n), xp)) for n in (0, 25, 50)]
        np.testing.assert_allclose(lr, [0, 0.25, 0.5], rtol=1e-6)


@pytest.mark.parametrize("case", SCALERS["dynamic"], ids=lambda case: case["name"])
def test_dynamic_loss_scale_is_megatrons(case):
    a = case["arguments"]
    assert (a["growth_factor"], a["backoff_factor"]) == (2, 0.5)
    precision = schema.Precision(
        compute_dtype="float16",
        initial_loss_scale=a["initial_scale"],
        min_loss_scale=a["min_scale"],
        loss_scale_window=a["growth_interval"],
        loss_scale_hysteresis=a["hysteresis"],
    )
    state = optimizer.init_loss_scale(precision)
    advance = jax.jit(lambda s, ok: optimizer.next_loss_scale(precision, s, ok))
    key = "found_inf__scale_before__scale_after__growth_tracker__hysteresis_tracker"
    for inf, before, after, good_steps, hysteresis in case[key]:
        assert float(state.scale) == before
        state = advance(state, jnp.asarray(not inf))
        got = (float(state.scale), int(state.good_steps), int(state.hysteresis))
        assert got == (after, good_steps, hysteresis)


def test_static_loss_scale_stays():
    precision = schema.Precision(
        compute_dtype="float16", static_loss_scale=SCALERS["constant"]["scale"]
    )
    state = optimizer.init_loss_scale(precision)
    for finite in (True, False, False):
        state = optimizer.next_loss_scale(precision, state, jnp.asarray(finite))
    assert float(state.scale) == 128


def scaled(scale, good_steps=0, hysteresis=2):
    return optimizer.LossScale(jnp.float32(scale), jnp.int32(good_steps), jnp.int32(hysteresis))


HALF = schema.Precision(compute_dtype="float16")
STATIC = schema.Precision(compute_dtype="float16", static_loss_scale=128.0)
BFLOAT16 = schema.Precision()


@pytest.mark.parametrize(
    ("then", "now", "saved", "expected"),
    [
        (HALF, HALF, (2.0**9, 7, -3), (2.0**9, 7, -3)),
        (HALF, STATIC, (2.0**9, 7, 1), (128, 0, 2)),
        (HALF, BFLOAT16, (2.0**9, 7, 1), (1, 0, 2)),
        (BFLOAT16, HALF, (1, 0, 2), (2.0**32, 0, 2)),
        (STATIC, HALF, (128, 0, 2), (2.0**32, 0, 2)),
        (STATIC, dataclasses.replace(STATIC, static_loss_scale=64.0), (128, 0, 2), (64, 0, 2)),
        # As an earlier version left it, which kept the scale of another format.
        (BFLOAT16, BFLOAT16, (2.0**16, 0, 2), (1, 0, 2)),
        # Never below the new minimum; the overflows that were counted stay so.
        (HALF, dataclasses.replace(HALF, min_loss_scale=2.0**12), (8, 7, 1), (2.0**12, 7, 1)),
        (HALF, dataclasses.replace(HALF, loss_scale_hysteresis=4), (8, 7, 1), (8, 7, 3)),
        (dataclasses.replace(HALF, loss_scale_hysteresis=4), HALF, (8, 7, 4), (8, 7, 2)),
    ],
)  # fmt: skip
def test_a_dynamic_scale_is_kept_and_every_other_starts_as_the_config_says(
    then, now, saved, expected
):
    state = optimizer.resumed_loss_scale(then, now, scaled(*saved))
    assert (float(state.scale), int(state.good_steps), int(state.hysteresis)) == expected


def test_a_window_shorter_than_the_good_steps_so_far_ends_with_the_next():
    precision = dataclasses.replace(HALF, loss_scale_window=100)
    state = optimizer.next_loss_scale(precision, scaled(8, 300), jnp.asarray(True))
    assert (float(state.scale), int(state.good_steps)) == (16, 0)


def curve_config(c):
    shape, samples = c["shape"], c["global_batch"]
    cfg = schema.Config(
        model=schema.Model(
            n_layers=shape["layers"], d_model=shape["hidden"], n_heads=shape["heads"],
            seq_len=shape["seq"], vocab_size=c["true_vocab"], mask_padded_vocab=False,
            dropout=0.0, attention_dropout=0.0,
        ),
        optimizer=schema.Optimizer(
            peak_lr=c["lr"], min_lr=c["min_lr"], decay=c["style"],
            decay_samples=c["decay_steps"] * samples, warmup_samples=c["warmup_steps"] * samples,
            weight_decay=c["wd"], beta1=c["betas"][0], beta2=c["betas"][1], eps=c["eps"],
            clip_norm=c["clip"],
        ),
        precision=schema.Precision(compute_dtype="float32"),
        batch=schema.Batch(global_batch_size=samples, microbatch_size=c["micro_batch"]),
        train=schema.Train(n_steps=c["steps"]),
        data=schema.Data(paths=("curve",)),
    )  # fmt: skip
    return layout.plain(cfg)


@pytest.mark.usefixtures("full_precision")
def test_megatrons_training_curve_is_followed():
    initial, final, c, curve = numpy_gpt.load_curve()
    cfg = curve_config(c)
    validation.validate(cfg)
    run_samples = c["steps"] * c["global_batch"]
    program = step.build(cfg, tiny.make_mesh(), run_samples)
    state = dataclasses.replace(program.init(), params=tiny.params_from_numpy(initial, cfg.model))
    positions = np.tile(np.arange(32, dtype=np.int32), (2, 4, 1))
    for i, tokens in enumerate(curve["tokens"]):
        cut = tokens.reshape(2, 4, 33)
        batch = {
            "tokens": cut[..., :-1], "targets": cut[..., 1:], "positions": positions,
            "loss_mask": np.ones((2, 4, 32), np.float32),
            "samples": np.arange(8, dtype=np.int32).reshape(2, 4),
        }  # fmt: skip
        lr = optimizer.learning_rate(cfg.optimizer, run_samples, int(state.schedule_samples))
        assert lr == curve["lr"][i]
        state, m = program.train(state, batch)
        np.testing.assert_allclose(m["loss"], curve["loss"][i], rtol=1e-5, err_msg=f"step {i}")
        np.testing.assert_allclose(m["grad_norm"], curve["grad_norm"][i], rtol=1e-4)
    got = tiny.to_numpy_names(state.params)
    for name, error in numpy_gpt.relative_errors(got, final).items():
        assert error < 1e-4, f"{name}: {error:.1e}"


@pytest.mark.slow
def test_only_matrices_and_embeddings_decay():
    cfg = tiny.make_config().model
    params = jax.tree.map(jnp.ones_like, gpt.GPT(cfg, jax.random.key(0)))
    o = schema.Optimizer(peak_lr=1.0, weight_decay=0.1)
    zeros = jax.tree.map(jnp.zeros_like, params)
    new, _ = optimizer.adamw_update(o, zeros, optimizer.adam(o).init(params), params, 0.5, 0.1)
    for name, array in tiny.leaves(new).items():
        decays = name.rsplit("/", 1)[-1].startswith(("w_", "embedding", "positions"))
        np.testing.assert_allclose(array, 0.95 if decays else 1.0, err_msg=name)


def overflow_state(program, scale):
    state = program.init()
    scaler = dataclasses.replace(state.loss_scale, scale=jnp.float32(scale))
    return dataclasses.replace(state, loss_scale=scaler)


def test_float16_overflow_skips_the_step_and_nothing_advances():
    cfg = tiny.make_config(
        precision={"compute_dtype": "float16", "loss_scale_hysteresis": 1},
        model={"dropout": 0.0, "attention_dropout": 0.0},
        optimizer={"init_lr": 1e-3},
    )
    mesh = tiny.make_mesh()
    program = step.build(cfg, mesh, 320)
    before = tiny.leaves(overflow_state(program, 2.0**40))
    state, m = program.train(overflow_state(program, 2.0**40), tiny.make_batch(0, cfg, mesh, 2))
    assert m["skipped"] == 1 and int(state.schedule_samples) == 0 and int(state.step) == 1
    assert float(state.loss_scale.scale) == 2.0**39
    after = tiny.leaves(state)
    for name in before:
        if name.startswith(("params", "opt_state")):
            np.testing.assert_array_equal(after[name], before[name], err_msg=name)
    state = dataclasses.replace(state, loss_scale=overflow_state(program, 2.0**8).loss_scale)
    state, m = program.train(state, tiny.make_batch(1, cfg, mesh, 2))
    assert m["skipped"] == 0 and int(state.schedule_samples) == 16
    assert np.isfinite(m["loss"]) and np.isfinite(m["grad_norm"])
    assert program.train.jitted._cache_size() == 1


@pytest.mark.slow
@pytest.mark.parametrize("compute_dtype", ["float16", "bfloat16"])
def test_16_bit_gradients_are_near_those_of_fp32(compute_dtype):
    rates = {"dropout": 0.0, "attention_dropout": 0.0}
    norms = {}
    for dtype in ("float32", compute_dtype):
        precision = {"compute_dtype": dtype, "initial_loss_scale": 2.0**14}
        cfg = tiny.make_config(precision=precision, model=rates)
        _, _, m = tiny.run(cfg, tiny.make_mesh(), 2, 2)
        norms[dtype] = m["grad_norm"]
    np.testing.assert_allclose(norms[compute_dtype], norms["float32"], rtol=0.02)
