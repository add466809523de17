"""The configuration: a frozen tree of dataclasses, how it is read, and what makes it invalid.

A recipe (`configs/*.py`) defines `get_config() -> Config`; the command line overrides fields;
`parse` joins both and validates once. Nothing here imports JAX: devices are checked in `sharding`.
"""

import argparse
import dataclasses
import importlib.util
import math
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, Literal

import tyro


class UserError(ValueError):
    """What a user can cause and mend: `main` prints it without a traceback."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention:
    """How attention is computed and what it sees."""

    implementation: Literal["auto", "xla", "cudnn"] = "auto"
    """auto: cudnn on a GPU where it serves (16-bit, no attention dropout), else xla."""
    pattern: Literal["dense", "alternating"] = "dense"
    """alternating: layers 1, 3, 5, ... are locally banded, the others dense (GPT-3 paper, 2.1)."""
    band: int = 256
    """Earlier positions that a banded layer sees, besides the token itself (tokens)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """The network, in the words of GPT-3's Table 2.1."""

    n_layers: int
    """Transformer blocks."""
    d_model: int
    """Width of the residual stream; heads have d_model / n_heads, the MLP 4 x d_model."""
    n_heads: int
    """Attention heads in a layer."""
    seq_len: int
    """Context length, and the length of every training sequence (tokens)."""
    vocab_size: int = 50_257
    """True vocabulary (tokens); GPT-2's by default."""
    vocab_multiple: int = 128
    """The vocabulary is padded to a multiple of this, on every mesh the same."""
    mask_padded_vocab: bool = True
    """Keep the padded entries out of the softmax. Off: they take part, as in Megatron."""
    dropout: float = 0.1
    """Dropout after the embedding and on both residual branches (probability)."""
    attention_dropout: float = 0.1
    """Dropout of attention probabilities; above 0 it forbids the cuDNN kernel (probability)."""
    gelu: Literal["tanh", "erf"] = "tanh"
    """GELU: its tanh approximation (GPT-2, GPT-3, Megatron's default) or the exact erf form."""
    init_std: float = 0.02
    """Std of initial weights; output projections get init_std / sqrt(2 n_layers)."""
    norm_eps: float = 1e-5
    """Added to LayerNorm's variance."""
    remat: Literal["none", "attention", "dots", "residual", "full"] = "full"
    """What the backward pass computes again, from nothing to whole layers: see `model.REMAT`."""
    n_loss_chunks: int = 1
    """Pieces of the sequence whose logits are held at a time; more save memory."""
    attention: Attention = Attention()

    @property
    def d_head(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_heads

    @property
    def d_ff(self) -> int:
        """Width of the MLP's hidden layer."""
        return 4 * self.d_model

    @property
    def padded_vocab_size(self) -> int:
        """`vocab_size` rounded up to a multiple of `vocab_multiple`."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def softmax_size(self) -> int:
        """Entries of the padded vocabulary that take part in the softmax."""
        return self.vocab_size if self.mask_padded_vocab else self.padded_vocab_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW, gradient clipping, and schedules counted in samples (sequences)."""

    peak_lr: float
    """Learning rate at the end of the warm-up."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay and after it."""
    init_lr: float = 0.0
    """Learning rate at the start of the warm-up."""
    decay: Literal["cosine", "linear", "constant", "inverse-square-root", "wsd"] = "cosine"
    """Shape of the decay from peak_lr to min_lr; wsd holds peak_lr and decays at the end."""
    decay_samples: int = 0
    """Samples after which min_lr is reached, warm-up included (0: the length of the run)."""
    warmup_samples: int = 0
    """Length of the linear warm-up (samples); give this or warmup_fraction."""
    warmup_fraction: float = 0.0
    """Length of the linear warm-up as a share of decay_samples."""
    wsd_decay: Literal["linear", "cosine", "exponential", "minus-sqrt"] = "exponential"
    """Shape of the final decay of wsd."""
    wsd_decay_samples: int = 0
    """Length of the final decay of wsd (samples)."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices and embeddings (not biases or LayerNorm)."""
    start_weight_decay: float = 0.0
    """Weight decay at step 0 where weight_decay_growth is not constant."""
    weight_decay_growth: Literal["constant", "linear", "cosine"] = "constant"
    """How weight decay goes from start_weight_decay to weight_decay over the run."""
    beta1: float = 0.9
    """Decay of Adam's first moment."""
    beta2: float = 0.95
    """Decay of Adam's second moment."""
    eps: float = 1e-8
    """Added to the root of Adam's second moment."""
    clip_norm: float = 1.0
    """Largest global L2 norm of the gradient; what exceeds it is scaled down (0: no clipping)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Precision:
    """Number formats. Weights, Adam moments, softmax, LayerNorm, loss and sums are always fp32."""

    compute_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Format of matrix products and activations."""
    static_loss_scale: float = 0.0
    """float16: a fixed loss scale (0: dynamic)."""
    initial_loss_scale: float = 2.0**32
    """float16: where the dynamic loss scale starts."""
    min_loss_scale: float = 1.0
    """float16: the dynamic loss scale never falls below."""
    loss_scale_window: int = 1000
    """float16: good steps in a row after which the scale doubles (steps)."""
    loss_scale_hysteresis: int = 2
    """float16: overflows before the scale halves; refilled only when the scale grows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """How many sequences make a step, and how they are cut."""

    global_batch_size: int
    """Sequences per step at full size, over all devices; no stage of a schedule exceeds it."""
    microbatch_size: int = 1
    """Sequences per data-parallel rank that are on a device at once."""
    schedule: str = ""
    """Batch size by tokens seen, as "0:16 2.4B:320 12B:1536" (K, M, B, T = 10^3 ... 10^12)."""
    ramp: tuple[int, ...] = ()
    """Linear ramp: start size, increment, samples until global_batch_size is reached."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """The corpus and how samples are cut from it."""

    paths: tuple[str, ...] = ()
    """PREFIX of PREFIX.bin and PREFIX.idx; or a blend: WEIGHT PREFIX WEIGHT PREFIX ..."""
    train_paths: tuple[str, ...] = ()
    """In place of paths and split: corpora of the training split alone, prefixes or a blend."""
    validation_paths: tuple[str, ...] = ()
    """With train_paths: those of the validation split."""
    test_paths: tuple[str, ...] = ()
    """With train_paths: those of the test split."""
    mock: bool = False
    """In place of a corpus: made-up tokens, as Megatron's --mock-data (for benchmarks)."""
    from_text: str = ""
    """Make the corpus on first use from this folder of text; "python" is Python's own library."""
    vocab_file: str = ""
    """GPT-2 vocabulary (vocab.json); checked against model.vocab_size and data.eod_id."""
    merge_file: str = ""
    """GPT-2 merges (merges.txt)."""
    split: str = "949,50,1"
    """Shares of documents for training, validation and test."""
    eod_id: int = 50_256
    """End-of-document token, for the three switches below."""
    eod_mask_loss: bool = False
    """Take no loss where the input is the end-of-document token."""
    reset_position_ids: bool = False
    """Restart positions after each end-of-document token."""
    reset_attention_mask: bool = False
    """Hide earlier documents of a sequence from later ones."""
    drop_last_partial_validation_sequence: bool = True
    """Off: the last validation sample may be part of a sequence, padded."""
    index_cache: str = ""
    """Folder that keeps the sample indices, shared by the processes of a host ("": each its own, in
    memory; 300B tokens take some 3 GB)."""
    prefetch: int = 4
    """Batches read ahead (0: none)."""
    read_threads: int = 2
    """Threads that read ahead; more help where the corpus lies on a slow network disk."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh:
    """How many ways each kind of parallelism divides the devices; -1 on one axis: the rest."""

    data: int = -1
    """Replicas of the model, each with its share of the batch."""
    stage: int = 1
    """Pipeline stages: each holds a part of the layers, microbatches stream through them."""
    virtual_stages: int = 1
    """Parts of the layers that each pipeline stage holds: more shorten the pipeline's bubble."""
    fsdp: int = 1
    """Shards of parameters, optimizer state and batch."""
    context: int = 1
    """Shards of the sequence, for contexts whose activations do not fit one device."""
    tensor: int = 1
    """Shards of heads, MLP and vocabulary: keep inside one NVLink domain."""
    shard_optimizer: bool = False
    """Shard optimizer state and fp32 parameters over data too (ZeRO-1)."""
    sequence_parallel: bool = True
    """Shard the norm, dropout and residual regions along the sequence over the tensor axis."""
    cpu_devices: int = 0
    """Run on this many emulated CPU devices instead of what the machine has (0: off)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """Length of the run, evaluation, seed. The run ends at the first limit that is set."""

    n_steps: int = 0
    """Train this many steps (0: no such limit)."""
    n_samples: int = 0
    """Train this many samples (0: no such limit)."""
    n_tokens: int = 0
    """Train this many tokens (0: no such limit)."""
    seed: int = 1234
    """Seed of initial weights, dropout and sample order."""
    loss_mean: Literal["tokens", "microbatches"] = "tokens"
    """Gradient of the mean over all tokens of a batch, or of the mean of microbatch means."""
    eval_interval: int = 1000
    """Steps between evaluations on the validation split (0: none, not even at the end)."""
    eval_batches: int = 10
    """Batches of global_batch_size in one evaluation."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Where the run's state is saved and found again."""

    dir: str = ""
    """Folder of this run's checkpoints, resumed from if it has one (empty: none are written)."""
    load: str = ""
    """Start from this folder's newest checkpoint where checkpoint.dir has none yet."""
    save_interval: int = 1000
    """Steps between checkpoints (one more is written at the end)."""
    max_to_keep: int = 3
    """Newest checkpoints kept; older ones are removed."""
    allow_new_data_order: bool = False
    """Resume although the order of samples changed: some may repeat and some may be missed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Log:
    """What the run tells."""

    dir: str = ""
    """Folder for metrics.jsonl, TensorBoard files and the resolved config (empty: none)."""
    interval: int = 100
    """Steps between console lines and logged metrics."""
    profile_steps: tuple[int, int] = (0, 0)
    """First and last step of a profile for TensorBoard or xprof (0 0: none)."""
    peak_tflops: float = 0.0
    """Peak TFLOP/s of one device in the compute format, for the MFU (0: look the GPU up)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distributed:
    """The processes of the run; under srun or mpirun they are found, else say all three."""

    n_processes: int = 0
    """Processes expected; fewer are an error (0: as Slurm or Open MPI says, else 1)."""
    coordinator_address: str = ""
    """host:port of process 0, where no launcher tells."""
    process_id: int = -1
    """Number of this process, where no launcher tells."""
    start_timeout: int = 300
    """Wait this long for all processes at the start (seconds)."""
    heartbeat_timeout: int = 60
    """When one process is not heard of for this long, end all others (seconds)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a run."""

    model: Model
    optimizer: Optimizer
    precision: Precision = Precision()
    batch: Batch
    data: Data = Data()
    mesh: Mesh = Mesh()
    train: Train = Train()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    distributed: Distributed = Distributed()


def parse(args: Sequence[str]) -> Config:
    """Return the validated config of a command line: `--config RECIPE` and overrides.

    Exits with tyro's own message on an unknown or ill-typed option, and on `--help`.

    Raises:
        UserError: no recipe, an unreadable recipe, or values that do not go together.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", default="")
    known, overrides = parser.parse_known_args(list(args))
    if not known.config and not {"-h", "--help"} & set(overrides):
        raise UserError("no recipe: add --config=FILE, for example --config=configs/quickstart.py")
    recipe: dict[str, Any] = {"default": load(known.config)} if known.config else {}
    config: Config = tyro.cli(
        Config,
        prog="python -m gpt3jax.main --config RECIPE.py",
        description="Train a GPT-3 model: the recipe's values, and these options over them.",
        args=overrides,
        **recipe,
    )
    validate(config)
    return config


def load(path: str) -> Config:
    """Return what `get_config()` of a recipe file returns, not yet validated."""
    file = pathlib.Path(path)
    if not file.is_file():
        near = ", ".join(sorted(p.name for p in file.parent.glob("*.py"))) or "none"
        raise UserError(f"--config={path}: no such file (recipes in {file.parent}: {near})")
    spec = importlib.util.spec_from_file_location(f"recipe_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise UserError(f"--config={path}: a recipe is a Python file, ending in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"--config={path}: {type(error).__name__}: {error}; mend it") from error
    if not hasattr(module, "get_config"):
        raise UserError(f"--config={path}: the file must define get_config() -> Config")
    config = module.get_config()
    if not isinstance(config, Config):
        raise UserError(f"--config={path}: get_config() returned {type(config)}, not a Config")
    return config


def flatten(config: Any) -> dict[str, Any]:
    """Return every field under its dotted name, as in the command line's options."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flat |= {f"{field.name}.{name}": v for name, v in flatten(value).items()}
        else:
            flat[field.name] = value
    return flat


def validate(config: Config) -> None:
    """Check every group and what goes between them.

    Raises:
        UserError: it names the field, the value, the constraint and the fix.
    """
    _check_ranges(config)
    _check_model(config.model, config.data)
    _check_optimizer(config.optimizer)
    _check_precision(config.precision, config.model.attention, config.model)
    _check_mesh(config.mesh, config.model)
    _check_run(config)
    _check_data(config.data)


_AT_LEAST: dict[str, float] = {
    "model.n_layers": 1, "model.d_model": 1, "model.n_heads": 1, "model.seq_len": 1,
    "model.vocab_size": 1, "model.vocab_multiple": 1, "model.init_std": 0, "model.norm_eps": 0,
    "model.n_loss_chunks": 1, "model.attention.band": 1,
    "optimizer.peak_lr": 0, "optimizer.min_lr": 0, "optimizer.init_lr": 0,
    "optimizer.decay_samples": 0, "optimizer.warmup_samples": 0, "optimizer.warmup_fraction": 0,
    "optimizer.wsd_decay_samples": 0, "optimizer.weight_decay": 0,
    "optimizer.start_weight_decay": 0, "optimizer.eps": 0, "optimizer.clip_norm": 0,
    "precision.static_loss_scale": 0, "precision.initial_loss_scale": 1,
    "precision.min_loss_scale": 1, "precision.loss_scale_window": 1,
    "precision.loss_scale_hysteresis": 1,
    "batch.global_batch_size": 1, "batch.microbatch_size": 1,
    "data.prefetch": 0, "data.read_threads": 1, "data.eod_id": 0, "mesh.cpu_devices": 0,
    "mesh.virtual_stages": 1,
    "train.n_steps": 0, "train.n_samples": 0, "train.n_tokens": 0, "train.seed": 0,
    "train.eval_interval": 0, "train.eval_batches": 1,
    "checkpoint.save_interval": 1, "checkpoint.max_to_keep": 1,
    "log.interval": 1, "log.peak_tflops": 0, "distributed.n_processes": 0,
    "distributed.start_timeout": 1, "distributed.heartbeat_timeout": 1,
}  # fmt: skip
_BELOW_ONE = (
    "model.dropout", "model.attention_dropout", "optimizer.beta1", "optimizer.beta2",
    "optimizer.warmup_fraction",
)  # fmt: skip


def _check_ranges(config: Config) -> None:
    flat = flatten(config)
    for name, least in _AT_LEAST.items():
        if not math.isfinite(flat[name]):
            raise UserError(f"{name}={flat[name]} must be finite: give a number")
        if flat[name] < least:
            raise UserError(f"{name}={flat[name]} must be at least {least:g}: raise it")
    for name in _BELOW_ONE:
        if not 0 <= flat[name] < 1:
            raise UserError(f"{name}={flat[name]} must be in [0, 1): choose a value there")


def _check_model(model: Model, data: Data) -> None:
    if model.d_model % model.n_heads:
        raise UserError(
            f"model.n_heads={model.n_heads} does not divide model.d_model={model.d_model}: "
            f"use one of {divisors(model.d_model)}"
        )
    if model.seq_len % model.n_loss_chunks:
        raise UserError(
            f"model.n_loss_chunks={model.n_loss_chunks} does not divide "
            f"model.seq_len={model.seq_len}: use one of {divisors(model.seq_len)}"
        )
    resets = data.eod_mask_loss or data.reset_position_ids or data.reset_attention_mask
    if resets and data.eod_id >= model.vocab_size:
        raise UserError(
            f"data.eod_id={data.eod_id} is not below model.vocab_size={model.vocab_size}: "
            "give the corpus's own end-of-document token"
        )


def _check_optimizer(optimizer: Optimizer) -> None:
    o = optimizer
    if o.min_lr > o.peak_lr:
        raise UserError(
            f"optimizer.min_lr={o.min_lr} exceeds optimizer.peak_lr={o.peak_lr}: lower it"
        )
    if o.warmup_samples and o.warmup_fraction:
        raise UserError(
            f"optimizer.warmup_samples={o.warmup_samples} and optimizer.warmup_fraction="
            f"{o.warmup_fraction} both set the warm-up: set one of them to 0"
        )
    if o.decay_samples and o.warmup_samples >= o.decay_samples:
        raise UserError(
            f"optimizer.warmup_samples={o.warmup_samples} must be below "
            f"optimizer.decay_samples={o.decay_samples}, which includes it: shorten the warm-up"
        )
    if (o.decay == "wsd") != (o.wsd_decay_samples > 0):
        raise UserError(
            f"optimizer.decay={o.decay} with optimizer.wsd_decay_samples={o.wsd_decay_samples}: "
            "wsd, and only wsd, needs the length of its final decay: change one of them"
        )
    if o.decay_samples and o.wsd_decay_samples > o.decay_samples:
        raise UserError(
            f"optimizer.wsd_decay_samples={o.wsd_decay_samples} exceeds "
            f"optimizer.decay_samples={o.decay_samples}: shorten it"
        )
    if o.weight_decay_growth == "constant" and o.start_weight_decay:
        raise UserError(
            f"optimizer.start_weight_decay={o.start_weight_decay} has no effect with "
            "optimizer.weight_decay_growth=constant: choose linear or cosine"
        )


def _check_precision(precision: Precision, attention: Attention, model: Model) -> None:
    if precision.compute_dtype != "float16" and precision.static_loss_scale:
        raise UserError(
            f"precision.static_loss_scale={precision.static_loss_scale} has no effect with "
            f"precision.compute_dtype={precision.compute_dtype}: only float16 scales the loss"
        )
    if attention.implementation == "cudnn" and model.attention_dropout:
        raise UserError(
            f"model.attention_dropout={model.attention_dropout} cannot run on "
            "model.attention.implementation=cudnn: set it to 0, or use xla"
        )
    if attention.implementation == "cudnn" and precision.compute_dtype == "float32":
        raise UserError(
            "precision.compute_dtype=float32 cannot run on model.attention.implementation=cudnn: "
            "use bfloat16 or float16, or xla"
        )


def _check_mesh(mesh: Mesh, model: Model) -> None:
    sizes = {axis: getattr(mesh, axis) for axis in ("data", "stage", "fsdp", "context", "tensor")}
    for axis, size in sizes.items():
        if size != -1 and size < 1:
            raise UserError(f"mesh.{axis}={size} must be at least 1, or -1 for the rest")
    if list(sizes.values()).count(-1) > 1:
        rest = " and ".join(f"mesh.{axis}" for axis, size in sizes.items() if size == -1)
        raise UserError(f"{rest} are all -1: only one axis can take the rest of the devices")
    if mesh.stage > 0:
        check_pipeline(model, mesh.stage, mesh.virtual_stages)
    for field, size in (("n_heads", model.n_heads), ("padded_vocab_size", model.padded_vocab_size)):
        if mesh.tensor > 0 and size % mesh.tensor:
            raise UserError(
                f"mesh.tensor={mesh.tensor} does not divide model.{field}={size}: "
                f"use one of {divisors(size)}"
            )
    # What -1 stands for is known once the devices are: `step.build` checks again.
    check_sequence(model, mesh, max(mesh.context, 1), max(mesh.tensor, 1))


def check_sequence(model: Model, mesh: Mesh, context: int, tensor: int) -> None:
    """Check that the sequence can be cut as axes of these sizes need it.

    Raises:
        UserError: model.seq_len or model.n_loss_chunks does not fit.
    """
    shards = context * (tensor if mesh.sequence_parallel else 1)
    multiple = math.lcm(shards, 2 * context if context > 1 else 1)
    if model.seq_len % multiple:
        raise UserError(
            f"model.seq_len={model.seq_len} must be a multiple of {multiple} for mesh.context="
            f"{context} (two chunks each) and mesh.tensor={tensor} (mesh.sequence_parallel="
            f"{mesh.sequence_parallel}): use {-(-model.seq_len // multiple) * multiple}"
        )
    if model.seq_len % (model.n_loss_chunks * context):
        raise UserError(
            f"model.n_loss_chunks={model.n_loss_chunks} does not divide the "
            f"{model.seq_len // context} positions that each of mesh.context={context} holds: "
            f"use one of {divisors(model.seq_len // context)}"
        )


def check_pipeline(model: Model, n_stages: int, virtual_stages: int) -> None:
    """Check that the layers divide into equal parts, for stages that are known by now.

    Raises:
        UserError: it names the numbers.
    """
    if n_stages == 1 and virtual_stages > 1:
        raise UserError(
            f"mesh.virtual_stages={virtual_stages} has no effect with mesh.stage=1: set it to 1"
        )
    if virtual_stages > 1 and model.remat in ("none", "attention"):
        raise UserError(
            f"model.remat={model.remat} with mesh.virtual_stages={virtual_stages} would keep a "
            "copy of the weights for every microbatch: use full, residual or dots"
        )
    unit = 2 if model.attention.pattern == "alternating" and n_stages > 1 else 1
    if model.n_layers % (n_stages * virtual_stages * unit):
        pairs = " in pairs (model.attention.pattern=alternating)" if unit == 2 else ""
        raise UserError(
            f"mesh.stage={n_stages} x mesh.virtual_stages={virtual_stages} does not divide "
            f"model.n_layers={model.n_layers}{pairs}: their product must be one of "
            f"{divisors(model.n_layers // unit)}"
        )


def _check_run(config: Config) -> None:
    train, batch, checkpoint = config.train, config.batch, config.checkpoint
    if not (train.n_steps or train.n_samples or train.n_tokens):
        raise UserError("the run has no length: set train.n_steps, train.n_samples or n_tokens")
    if batch.schedule and batch.ramp:
        raise UserError("batch.schedule and batch.ramp both set the batch size: clear one of them")
    first, last = config.log.profile_steps
    if (first, last) != (0, 0) and not (0 < first <= last and config.log.dir):
        raise UserError(
            f"log.profile_steps={first} {last} must be a first and a last step from 1 on, "
            "and needs log.dir to write the profile to"
        )
    if checkpoint.allow_new_data_order and not (checkpoint.dir or checkpoint.load):
        raise UserError("checkpoint.allow_new_data_order has no effect without a checkpoint.dir")


def _check_data(data: Data) -> None:
    given = [n for n in ("paths", "train_paths", "mock") if getattr(data, n)]
    if not given:
        raise UserError("data.paths is empty: give --data.paths PREFIX, of PREFIX.bin and .idx")
    if len(given) > 1:
        raise UserError(f"data.{' and data.'.join(given)} each say what to train on: keep one")
    if (data.validation_paths or data.test_paths) and not data.train_paths:
        raise UserError(
            "data.validation_paths and data.test_paths go with data.train_paths: give all in "
            "place of data.paths"
        )
    if data.from_text and len(data.paths) != 1:
        raise UserError(
            f"data.paths has {len(data.paths)} entries, but data.from_text makes one "
            "corpus: give one prefix"
        )
    if bool(data.vocab_file) != bool(data.merge_file):
        raise UserError("data.vocab_file and data.merge_file go together: give both or neither")


def divisors(n: int) -> str:
    """Return the divisors of n as text for messages, at most 16 of them."""
    found = [str(d) for d in range(1, n + 1) if n % d == 0]
    return ", ".join(found[:16]) + (", ..." if len(found) > 16 else "")
