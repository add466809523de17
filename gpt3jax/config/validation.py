"""Checks of a config: what makes it invalid.

What depends on the devices is checked in `sharding` and `step`; `unused_fields` has what is valid
and has no effect. Imports no JAX.
"""

import math
import re

from gpt3jax import errors
from gpt3jax.config import batch_schedule, layout, ranges, schema


def validate(cfg: schema.Config) -> None:
    """Check each group of a config, and fields of one group against those of another.

    Raises:
        UserError: it names the field, the value, the constraint and the fix.
    """
    check_ranges(cfg)
    check_model(cfg.model, cfg.data)
    _check_optimizer(cfg.optimizer)
    _check_precision(cfg.precision, cfg.model.attention, cfg.model)
    _check_mesh(cfg.mesh, cfg.model, cfg.precision)
    _check_run(cfg)
    _check_data(cfg.data)


def check_ranges(tree: object, prefix: str = "") -> None:
    """Check each number in a tree of dataclasses; the prefix is "--" for a command's options.

    Raises:
        UserError: a number is out of its range.
    """
    for name, value, bounds in ranges.numbers(tree):
        problem = bounds.problem(value)
        if problem:
            field, page = name, f"reference/options.md#{name.partition('.')[0]}"
            if prefix:
                field, page = f"{prefix}{name.replace('_', '-')}", "reference/commands.md"
            raise errors.UserError(f"{field}={value} {problem}", page=page)


def check_model(model: schema.Model, data: schema.Data) -> None:
    """Check a model's fields against each other, and the end-of-document token.

    Raises:
        UserError: it names the fields.
    """
    if model.d_model % model.n_heads:
        raise errors.UserError(
            f"model.n_heads={model.n_heads} does not divide model.d_model={model.d_model}: "
            f"use one of {ranges.divisors(model.d_model)}",
            page="reference/options.md#model",
        )
    if model.n_loss_chunks != schema.AUTO and model.seq_len % model.n_loss_chunks:
        raise errors.UserError(
            f"model.n_loss_chunks={model.n_loss_chunks} does not divide "
            f"model.seq_len={model.seq_len}: use one of {ranges.divisors(model.seq_len)}",
            page="reference/options.md#model",
        )
    resets = data.eod_mask_loss or data.reset_position_ids or data.reset_attention_mask
    if resets and data.eod_id >= model.vocab_size:
        raise errors.UserError(
            f"data.eod_id={data.eod_id} is not below model.vocab_size={model.vocab_size}: "
            "give the end-of-document token of the corpus",
            page="reference/options.md#data",
        )


def _check_optimizer(optimizer: schema.Optimizer) -> None:
    o = optimizer
    if o.min_lr > o.peak_lr:
        raise errors.UserError(
            f"optimizer.min_lr={o.min_lr} exceeds optimizer.peak_lr={o.peak_lr}: lower it",
            page="reference/options.md#optimizer",
        )
    if o.warmup_samples and o.warmup_fraction:
        raise errors.UserError(
            f"optimizer.warmup_samples={o.warmup_samples} and optimizer.warmup_fraction="
            f"{o.warmup_fraction} both set the warm-up: set one of them to 0",
            page="reference/options.md#optimizer",
        )
    if o.decay_samples and o.warmup_samples >= o.decay_samples:
        raise errors.UserError(
            f"optimizer.warmup_samples={o.warmup_samples} must be below "
            f"optimizer.decay_samples={o.decay_samples}, which includes it: shorten the warm-up",
            page="reference/options.md#optimizer",
        )
    if (o.decay == "wsd") != (o.wsd_decay_samples > 0):
        raise errors.UserError(
            f"optimizer.decay={o.decay} with optimizer.wsd_decay_samples={o.wsd_decay_samples}: "
            "wsd, and only wsd, needs the length of its final decay: change one of them",
            page="reference/options.md#optimizer",
        )
    if o.decay_samples:
        check_schedule(o, o.decay_samples)
    if o.weight_decay_growth == "constant" and o.start_weight_decay:
        raise errors.UserError(
            f"optimizer.start_weight_decay={o.start_weight_decay} has no effect with "
            "optimizer.weight_decay_growth=constant: choose linear or cosine",
            page="reference/options.md#optimizer",
        )


def check_schedule(optimizer: schema.Optimizer, run_samples: int) -> None:
    """Check that warm-up and final decay fit in a run of this length (samples).

    Otherwise the decay would begin during the warm-up, and the learning rate would drop at once.

    Raises:
        UserError: they are longer than the run or `optimizer.decay_samples`.
    """
    o, (warmup, length) = optimizer, optimizer.schedule(run_samples)
    needed = int(warmup) + o.wsd_decay_samples
    if o.decay == "wsd" and needed > length:
        limit = f"optimizer.decay_samples={length}: shorten the decay, or raise the limit"
        if not o.decay_samples:
            limit = (
                f"the run's {length} (optimizer.decay_samples=0): shorten it, train longer, or "
                "give the optimizer.decay_samples of the longer run that this one is a part of"
            )
        raise errors.UserError(
            f"optimizer.wsd_decay_samples={o.wsd_decay_samples} after a warm-up of {int(warmup)} "
            f"samples takes {needed} samples, which exceeds {limit}",
            page="reference/options.md#optimizer",
        )


def _check_precision(
    precision: schema.Precision, attention: schema.Attention, model: schema.Model
) -> None:
    if precision.compute_dtype != "float16" and precision.static_loss_scale:
        raise errors.UserError(
            f"precision.static_loss_scale={precision.static_loss_scale} has no effect with "
            f"precision.compute_dtype={precision.compute_dtype}: only float16 scales the loss",
            page="reference/options.md#precision",
        )
    if precision.scales_dynamically and precision.initial_loss_scale < precision.min_loss_scale:
        raise errors.UserError(
            f"precision.initial_loss_scale={precision.initial_loss_scale} is below "
            f"precision.min_loss_scale={precision.min_loss_scale}: raise it, or lower the minimum",
            page="reference/options.md#precision",
        )
    _check_float8(precision, model)
    if attention.implementation == "cudnn" and model.attention_dropout:
        raise errors.UserError(
            f"model.attention_dropout={model.attention_dropout} cannot run on "
            "model.attention.implementation=cudnn: set it to 0, or use auto, triton or xla",
            page="reference/options.md#model",
        )
    fused = attention.implementation in ("cudnn", "triton")
    if fused and precision.compute_dtype == "float32":
        raise errors.UserError(
            "precision.compute_dtype=float32 cannot run on "
            f"model.attention.implementation={attention.implementation}: "
            "use bfloat16 or float16, or xla",
            page="reference/options.md#precision",
        )


def _check_float8(precision: schema.Precision, model: schema.Model) -> None:
    if precision.matmul_dtype != "float8":
        return
    if precision.compute_dtype == "float16":
        raise errors.UserError(
            "precision.matmul_dtype=float8 cannot be with precision.compute_dtype=float16: use "
            "bfloat16, which needs no loss scale",
            page="training.md#8-bit-products",
        )
    if 2 * precision.end_layers >= model.n_layers:
        raise errors.UserError(
            f"precision.end_layers={precision.end_layers} at either end leave none of "
            f"model.n_layers={model.n_layers} in 8 bits: use at most {(model.n_layers - 1) // 2}, "
            "or precision.matmul_dtype=compute_dtype",
            page="training.md#8-bit-products",
        )


def _check_mesh(mesh: schema.Mesh, model: schema.Model, precision: schema.Precision) -> None:
    sizes = {axis: getattr(mesh, axis) for axis in layout.AXES}
    if list(sizes.values()).count(-1) > 1:
        rest = " and ".join(f"mesh.{axis}" for axis, size in sizes.items() if size == -1)
        raise errors.UserError(
            f"{rest} are all -1: only one axis can be the rest of the devices; give the others a "
            "size",
            page="parallelism.md#which-sizes-are-possible",
        )
    # What is -1 or auto is known only with the devices: `step.build` checks again.
    known = {axis: n if n not in (-1, schema.AUTO) else 1 for axis, n in sizes.items()}
    if mesh.stage == known["stage"]:
        check_end_layers(precision, mesh.stage)
        virtual_stages = 1 if mesh.virtual_stages == schema.AUTO else mesh.virtual_stages
        check_pipeline(model, mesh.stage, virtual_stages)
    for field, size in (("n_heads", model.n_heads), ("padded_vocab_size", model.padded_vocab_size)):
        if size % known["tensor"]:
            raise errors.UserError(
                f"mesh.tensor={mesh.tensor} does not divide model.{field}={size}: "
                f"use one of {ranges.divisors(size)}",
                page="parallelism.md#which-sizes-are-possible",
            )
    check_sequence(model, mesh, known["context"], known["tensor"])


def check_sequence(model: schema.Model, mesh: schema.Mesh, context: int, tensor: int) -> None:
    """Check that the sequence divides over axes of these sizes.

    Raises:
        UserError: model.seq_len or model.n_loss_chunks does not fit.
    """
    shards = context * (tensor if mesh.sequence_parallel else 1)
    multiple = math.lcm(shards, 2 * context if context > 1 else 1)
    if model.seq_len % multiple:
        raise errors.UserError(
            f"model.seq_len={model.seq_len} must be a multiple of {multiple} for mesh.context="
            f"{context} (two chunks each) and mesh.tensor={tensor} (mesh.sequence_parallel="
            f"{mesh.sequence_parallel}): use {-(-model.seq_len // multiple) * multiple}",
            page="parallelism.md#which-sizes-are-possible",
        )
    if model.n_loss_chunks == schema.AUTO:
        return
    if model.seq_len % (model.n_loss_chunks * context):
        raise errors.UserError(
            f"model.n_loss_chunks={model.n_loss_chunks} does not divide the "
            f"{model.seq_len // context} positions that each of mesh.context={context} holds: "
            f"use one of {ranges.divisors(model.seq_len // context)}",
            page="parallelism.md#which-sizes-are-possible",
        )


def check_pipeline(model: schema.Model, n_stages: int, virtual_stages: int) -> None:
    """Check that the layers divide into equal parts over this many stages.

    Raises:
        UserError: it names the numbers.
    """
    if n_stages == 1 and virtual_stages > 1:
        raise errors.UserError(
            f"mesh.virtual_stages={virtual_stages} has no effect with mesh.stage=1: set it to 1",
            page="parallelism.md#which-sizes-are-possible",
        )
    unit = 2 if model.attention.pattern == "alternating" and n_stages > 1 else 1
    if model.n_layers % (n_stages * virtual_stages * unit):
        pairs = " in pairs (model.attention.pattern=alternating)" if unit == 2 else ""
        raise errors.UserError(
            f"mesh.stage={n_stages} x mesh.virtual_stages={virtual_stages} does not divide "
            f"model.n_layers={model.n_layers}{pairs}: their product must be one of "
            f"{ranges.divisors(model.n_layers // unit)}",
            page="parallelism.md#which-sizes-are-possible",
        )


def check_end_layers(precision: schema.Precision, n_stages: int) -> None:
    """Check that all layers compute alike where pipeline stages run one program.

    Raises:
        UserError: layers at the ends are to be in another format.
    """
    is_in_use = precision.matmul_dtype == "float8" and precision.end_layers
    if is_in_use and n_stages > 1:
        raise errors.UserError(
            f"precision.end_layers={precision.end_layers} cannot be with mesh.stage={n_stages}: "
            "all stages run one program; set either to its smallest value",
            page="training.md#8-bit-products",
        )


def _check_run(cfg: schema.Config) -> None:
    train, batch = cfg.train, cfg.batch
    if not (train.n_steps or train.n_samples or train.n_tokens):
        raise errors.UserError(
            "the run has no length: set train.n_steps, train.n_samples or train.n_tokens",
            page="reference/options.md#train",
        )
    if batch.schedule and batch.ramp:
        raise errors.UserError(
            "batch.schedule and batch.ramp both set the batch size: clear one of them",
            page="reference/options.md#batch",
        )
    batch_schedule.from_config(batch, cfg.model.seq_len)
    if train.loss_mean == "microbatches" and batch.microbatch_size == schema.AUTO:
        raise errors.UserError(
            "train.loss_mean=microbatches makes batch.microbatch_size a part of the loss, so auto "
            "cannot choose it: give it, for instance --batch.microbatch-size 1",
            page="reference/options.md#batch",
        )
    first, last = cfg.log.profile_steps
    if (first, last) != (0, 0) and not (0 < first <= last and cfg.log.dir):
        raise errors.UserError(
            f"log.profile_steps={first} {last} must be a first and a last step from 1 on, "
            "and needs a log.dir for the profile",
            page="reference/options.md#log",
        )
    if cfg.log.profile_memory and not cfg.log.dir:
        raise errors.UserError(
            f"log.profile_memory={cfg.log.profile_memory} needs a log.dir for its file: give one",
            page="watching.md#profiles",
        )
    if cfg.log.wandb_project and not cfg.log.dir:
        raise errors.UserError(
            f"log.wandb_project={cfg.log.wandb_project} needs a log.dir, which keeps the run's id "
            "and files at Weights & Biases: give one",
            page="watching.md#weights--biases",
        )
    _check_checkpoint(cfg.checkpoint, cfg.watchdog)


def _check_checkpoint(checkpoint: schema.Checkpoint, watchdog: schema.Watchdog) -> None:
    if checkpoint.allow_new_data_order and not (checkpoint.dir or checkpoint.load):
        raise errors.UserError(
            "checkpoint.allow_new_data_order has no effect without a checkpoint.dir or "
            "checkpoint.load: leave it out",
            page="checkpoints.md#resuming",
        )
    period, interval = checkpoint.keep_period, checkpoint.save_interval
    if period % interval:
        raise errors.UserError(
            f"checkpoint.keep_period={period} must be a multiple of checkpoint.save_interval="
            f"{interval}, or some of the steps to keep are never saved: use "
            f"{-(-period // interval) * interval}",
            page="checkpoints.md#saving",
        )
    slowest = watchdog.slow_phase_seconds
    if checkpoint.dir and watchdog.step_multiple and checkpoint.save_timeout >= slowest:
        raise errors.UserError(
            f"checkpoint.save_timeout={checkpoint.save_timeout} must be below "
            f"watchdog.slow_phase_seconds={slowest:g}, after which the watchdog ends a process "
            "that waits for a save: lower the one or raise the other",
            page="checkpoints.md#saving",
        )
    if checkpoint.only_params and not checkpoint.load:
        raise errors.UserError(
            "checkpoint.only_params has no effect without checkpoint.load: name the folder to load "
            "parameters from",
            page="checkpoints.md#starting-from-another-run",
        )


def split_weights(split: str) -> list[float]:
    """Return the three weights of data.split; weights that are left out are 0.

    Like Megatron's `--split`, it accepts any separators.

    Raises:
        UserError: a weight is not a number, there are more than three, or all are 0.
    """
    words = re.split(r"[\s,/:;%|]+", split.strip(" ,()[]%"))
    weights = [float(x) for x in words if re.fullmatch(r"\d+\.?\d*|\.\d+", x)]
    if not len(words) == len(weights) <= 3 or sum(weights) <= 0:
        raise errors.UserError(
            f'data.split={split!r} must be up to three weights, not all 0, like "949,50,1" or '
            '"90/5/5"',
            page="data.md#which-corpora-a-run-reads",
        )
    return [*weights, 0.0, 0.0][:3]


def stretch(
    text: str,
    field: str = "data.skip_samples",
    page: str = "numerical_faults.md#leaving-data-out",
) -> tuple[int, int]:
    """Return (A, B) of a range of samples "A:B"; messages have its field and page.

    Raises:
        UserError: the text is not a range, or the range is empty.
    """
    try:
        first, stop = map(ranges.read_count, text.split(":"))
    except ValueError:  # not two numbers
        first = stop = -1
    if not 0 <= first < stop <= ranges.INT32:
        raise errors.UserError(
            f"{field}={text} must be A:B with A < B, as in 8000:8640 for the samples "
            "8000 to 8639, or 8K:9K",
            page=page,
        )
    return first, stop


def _check_data(data: schema.Data) -> None:
    for text in data.skip_samples:
        stretch(text)
    if data.paths:
        split_weights(data.split)
    given = [n for n in ("paths", "train_paths", "mock") if getattr(data, n)]
    if not given:
        raise errors.UserError(
            "data.paths is empty: give --data.paths PREFIX for the files PREFIX.bin and "
            "PREFIX.idx, or --data.mock",
            page="data.md#which-corpora-a-run-reads",
        )
    if len(given) > 1:
        raise errors.UserError(
            f"data.{' and data.'.join(given)} each say what to train on: keep one",
            page="data.md#which-corpora-a-run-reads",
        )
    if (data.validation_paths or data.test_paths) and not data.train_paths:
        raise errors.UserError(
            "data.validation_paths and data.test_paths go with data.train_paths: give it in place "
            "of data.paths",
            page="data.md#which-corpora-a-run-reads",
        )
    if data.from_text and len(data.paths) != 1:
        raise errors.UserError(
            f"data.paths has {len(data.paths)} entries, but data.from_text makes one "
            "corpus: give one prefix",
            page="data.md#which-corpora-a-run-reads",
        )
    if bool(data.vocab_file) != bool(data.merge_file):
        raise errors.UserError(
            "data.vocab_file and data.merge_file go together: give both or neither",
            page="data.md#which-corpora-a-run-reads",
        )
    if data.tokenizer and data.vocab_file:
        raise errors.UserError(
            f"data.tokenizer={data.tokenizer} and data.vocab_file={data.vocab_file} each name a "
            "tokenizer: keep one of them",
            page="data.md#which-corpora-a-run-reads",
        )
