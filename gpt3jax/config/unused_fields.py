"""Fields of a valid config that were set and have no effect. Imports no JAX."""

from gpt3jax.config import schema


def without_effect(cfg: schema.Config) -> list[str]:
    """Return a warning for each field that was changed from its default and has no effect.

    Where this is likely to be a mistake, `validation.validate` refuses the config instead.
    """
    values = schema.flatten(cfg)
    return [
        f"WARNING: {name}={values[name]} has no effect with {reason}"
        for reason, applies, names in (*_unused_in_training(cfg), *_unused_in_operation(cfg))
        for name in names
        if applies and values[name] != _DEFAULTS[name]
    ]


_Unused = list[tuple[str, bool, tuple[str, ...]]]  # reason, whether it applies, fields it disables


def _unused_in_training(cfg: schema.Config) -> _Unused:
    o, data, precision = cfg.optimizer, cfg.data, cfg.precision
    dynamic_scale = (
        "precision.initial_loss_scale", "precision.min_loss_scale",
        "precision.loss_scale_window", "precision.loss_scale_hysteresis",
    )  # fmt: skip
    return [
        ("model.attention.pattern=dense", cfg.model.attention.pattern == "dense",
         ("model.attention.band",)),
        (f"optimizer.decay={o.decay}", o.decay != "wsd", ("optimizer.wsd_decay",)),
        ("optimizer.decay=constant", o.decay == "constant", ("optimizer.min_lr",)),
        ("no warm-up", not (o.warmup_samples or o.warmup_fraction), ("optimizer.init_lr",)),
        (f"precision.compute_dtype={precision.compute_dtype}",
         precision.compute_dtype != "float16", dynamic_scale),
        ("precision.static_loss_scale", precision.static_loss_scale > 0, dynamic_scale),
        ("precision.matmul_dtype=compute_dtype", precision.matmul_dtype == "compute_dtype",
         ("precision.end_layers",)),
        ("data.train_paths", bool(data.train_paths), ("data.split",)),
        ("data.mock", data.mock, ("data.split",)),
        ("data.prefetch=0", not data.prefetch, ("data.read_threads",)),
    ]  # fmt: skip


def _unused_in_operation(cfg: schema.Config) -> _Unused:
    faults = cfg.faults
    validation = (
        "train.eval_batches", "data.validation_paths", "data.test_paths",
        "data.drop_last_partial_validation_sequence",
    )  # fmt: skip
    return [
        ("mesh.data=1", cfg.mesh.data == 1, ("mesh.shard_optimizer",)),
        ("mesh.tensor=1", cfg.mesh.tensor == 1, ("mesh.sequence_parallel",)),
        ("train.eval_interval=0", not cfg.train.eval_interval, validation),
        ("neither faults.nonfinite nor faults.spike at skip",
         "skip" not in (faults.nonfinite, faults.spike), ("faults.max_skipped_steps",)),
        ("faults.spike=off", faults.spike == "off",
         ("faults.spike_window", "faults.spike_deviations")),
        ("watchdog.step_multiple=0", not cfg.watchdog.step_multiple, ("watchdog.min_seconds",)),
        ("no log.dir", not cfg.log.dir, ("train.max_fruitless_starts",)),
    ]  # fmt: skip


_DEFAULTS = schema.flatten(
    schema.Config(
        model=schema.Model(n_layers=1, d_model=1, n_heads=1, seq_len=1),
        optimizer=schema.Optimizer(peak_lr=0.0),
        batch=schema.Batch(global_batch_size=1),
    )
)
