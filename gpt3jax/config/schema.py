"""The configuration: a frozen tree of dataclasses, each field with its unit.

`recipe` reads one from a file and the command line, `validation` says what makes it invalid.
"""

import dataclasses
import typing
from typing import Annotated, Any, Literal, TypeVar

from gpt3jax.config import ranges, user_paths

Tree = TypeVar("Tree")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention:
    """How attention is computed and what it sees."""

    implementation: Literal["auto", "xla", "cudnn"] = "auto"
    """auto: cudnn on a GPU where it serves (16-bit, no attention dropout), else xla."""
    pattern: Literal["dense", "alternating"] = "dense"
    """alternating: layers 1, 3, 5, ... are locally banded, the others dense (GPT-3 paper, 2.1)."""
    band: Annotated[int, ranges.Range(1, 2**24, "model.attention.pattern=dense has no bands")] = 256
    """Earlier positions that a banded layer sees, besides the token itself (tokens)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """The network, in the words of GPT-3's Table 2.1."""

    n_layers: Annotated[int, ranges.Range(1, 2**16)]
    """Transformer blocks."""
    d_model: Annotated[int, ranges.Range(1, 2**20)]
    """Width of the residual stream; heads have d_model / n_heads, the MLP 4 x d_model."""
    n_heads: Annotated[int, ranges.Range(1, 2**20)]
    """Attention heads in a layer."""
    seq_len: Annotated[int, ranges.Range(1, 2**24)]
    """Context length, and the length of every training sequence (tokens)."""
    vocab_size: Annotated[int, ranges.Range(1, 2**30)] = 50_257
    """True vocabulary (tokens); GPT-2's by default."""
    vocab_multiple: Annotated[int, ranges.Range(1, 2**20, "1 pads nothing")] = 128
    """The vocabulary is padded to a multiple of this, on every mesh the same."""
    mask_padded_vocab: bool = True
    """Keep the padded entries out of the softmax. Off: they take part, as in Megatron."""
    dropout: ranges.Probability = 0.1
    """Dropout after the embedding and on both residual branches (probability)."""
    attention_dropout: ranges.Probability = 0.1
    """Dropout of attention probabilities; above 0 it forbids the cuDNN kernel (probability)."""
    gelu: Literal["tanh", "erf"] = "tanh"
    """GELU: its tanh approximation (GPT-2, GPT-3, Megatron's default) or the exact erf form."""
    init_std: Annotated[float, ranges.Range(0, 100)] = 0.02
    """Std of initial weights; output projections get init_std / sqrt(2 n_layers)."""
    norm_eps: Annotated[float, ranges.Range(0, 1)] = 1e-5
    """Added to LayerNorm's variance."""
    remat: Literal["none", "dots", "mlp", "residual", "full"] = "full"
    """What the backward pass computes again, from nothing to whole layers: see
    `remat.POLICIES`. With stages `none` is `dots`."""
    n_loss_chunks: Annotated[int, ranges.Range(1, 2**24, "1 cuts nothing")] = 1
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

    peak_lr: Annotated[float, ranges.Range(0, 1e30)]
    """Learning rate at the end of the warm-up."""
    min_lr: Annotated[float, ranges.Range(0, 1e30)] = 0.0
    """Learning rate at the end of the decay and after it."""
    init_lr: Annotated[float, ranges.Range(0, 1e30)] = 0.0
    """Learning rate at the start of the warm-up."""
    decay: Literal["cosine", "linear", "constant", "inverse-square-root", "wsd"] = "cosine"
    """Shape of the decay from peak_lr to min_lr; wsd holds peak_lr and decays at the end."""
    decay_samples: ranges.Samples = 0
    """Samples after which min_lr is reached, warm-up included (0: the length of the run)."""
    warmup_samples: ranges.Samples = 0
    """Length of the linear warm-up (samples); give this or warmup_fraction."""
    warmup_fraction: ranges.Probability = 0.0
    """Length of the linear warm-up as a share of decay_samples."""
    wsd_decay: Literal["linear", "cosine", "exponential", "minus-sqrt"] = "exponential"
    """Shape of the final decay of wsd."""
    wsd_decay_samples: ranges.Samples = 0
    """Length of the final decay of wsd (samples)."""
    weight_decay: Annotated[float, ranges.Range(0, 1000)] = 0.1
    """Decoupled weight decay of matrices and embeddings (not biases or LayerNorm)."""
    start_weight_decay: Annotated[float, ranges.Range(0, 1000)] = 0.0
    """Weight decay at step 0 where weight_decay_growth is not constant."""
    weight_decay_growth: Literal["constant", "linear", "cosine"] = "constant"
    """How weight decay goes from start_weight_decay to weight_decay over the run."""
    beta1: ranges.Probability = 0.9
    """Decay of Adam's first moment."""
    beta2: ranges.Probability = 0.95
    """Decay of Adam's second moment."""
    eps: Annotated[float, ranges.Range(0, 1)] = 1e-8
    """Added to the root of Adam's second moment."""
    clip_norm: Annotated[float, ranges.Range(0, 1e30)] = 1.0
    """Largest global L2 norm of the gradient; what exceeds it is scaled down (0: no clipping)."""

    def schedule(self, run_samples: int) -> tuple[float, int]:
        """Return the samples of the warm-up, and of warm-up and decay, in a run of so many."""
        decay_samples = self.decay_samples or run_samples
        return self.warmup_samples or self.warmup_fraction * decay_samples, decay_samples


@dataclasses.dataclass(frozen=True, kw_only=True)
class Precision:
    """Number formats. Weights, Adam moments, softmax, LayerNorm, loss and sums are always fp32."""

    compute_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Format of matrix products and activations."""
    static_loss_scale: Annotated[float, ranges.Range(0, 2.0**64)] = 0.0
    """float16: a fixed loss scale (0: dynamic)."""
    initial_loss_scale: Annotated[float, ranges.Range(1, 2.0**64)] = 2.0**32
    """float16: where the dynamic loss scale starts."""
    min_loss_scale: Annotated[float, ranges.Range(1, 2.0**64)] = 1.0
    """float16: the dynamic loss scale never falls below."""
    loss_scale_window: ranges.Positive = 1000
    """float16: good steps in a row after which the scale doubles (steps)."""
    loss_scale_hysteresis: ranges.Positive = 2
    """float16: overflows before the scale halves; refilled only when the scale grows."""

    @property
    def scales_dynamically(self) -> bool:
        """Tell whether the loss scale changes in the course of a run."""
        return self.compute_dtype == "float16" and not self.static_loss_scale


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """How many sequences make a step, and how they are cut."""

    global_batch_size: Annotated[int, ranges.Range(1, 10**6)]
    """Sequences per step at full size, over all devices; no stage of a schedule exceeds it."""
    microbatch_size: Annotated[int, ranges.Range(1, 10**6)] = 1
    """Sequences per data-parallel rank that are on a device at once."""
    schedule: str = ""
    """Batch size by tokens seen, as "0:16 2.4B:320 12B:1536" (K, M, B, T = 10^3 ... 10^12)."""
    ramp: tuple[ranges.Samples, ...] = ()
    """Linear ramp: start size, increment, samples until global_batch_size is reached."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """The corpus and how samples are cut from it."""

    paths: tuple[user_paths.Path, ...] = ()
    """PREFIX of PREFIX.bin and PREFIX.idx; or a blend: WEIGHT PREFIX WEIGHT PREFIX ..."""
    train_paths: tuple[user_paths.Path, ...] = ()
    """In place of paths and split: corpora of the training split alone, prefixes or a blend."""
    validation_paths: tuple[user_paths.Path, ...] = ()
    """With train_paths: those of the validation split."""
    test_paths: tuple[user_paths.Path, ...] = ()
    """With train_paths: those of the test split."""
    mock: bool = False
    """In place of a corpus: made-up tokens, as Megatron's --mock-data (for benchmarks)."""
    from_text: user_paths.Path = ""
    """Make the corpus on first use from this folder of text; "python" is Python's own library."""
    vocab_file: user_paths.Path = ""
    """GPT-2 vocabulary (vocab.json); checked against model.vocab_size and data.eod_id."""
    merge_file: user_paths.Path = ""
    """GPT-2 merges (merges.txt)."""
    tokenizer: user_paths.Path = ""
    """In place of these two: a tokenizer.json, of which data.eod_id ends a document."""
    split: str = "949,50,1"
    """Shares of documents for training, validation and test, also as "90/5/5" or "90 5 5"."""
    eod_id: Annotated[int, ranges.Range(0, 2**30)] = 50_256
    """End-of-document token, for the three switches below."""
    eod_mask_loss: bool = False
    """Take no loss where the input is the end-of-document token."""
    reset_position_ids: bool = False
    """Restart positions after each end-of-document token."""
    reset_attention_mask: bool = False
    """Hide earlier documents of a sequence from later ones."""
    drop_last_partial_validation_sequence: bool = True
    """Off: the last validation sample may be part of a sequence, padded."""
    index_cache: user_paths.Path = ""
    """Folder that keeps the sample indices, shared by the processes of a host ("": each its own, in
    memory; 300B tokens take some 3 GB)."""
    skip_samples: tuple[str, ...] = ()
    """Stretches A:B of the training samples to leave out, A to B - 1, by their numbers in the run:
    "--data.skip-samples 8000:8640". A batch that reaches A goes on at B."""
    prefetch: Annotated[int, ranges.Range(0, 10_000)] = 4
    """Batches read ahead (0: none)."""
    read_threads: Annotated[int, ranges.Range(1, 1000, "data.prefetch=0 reads without threads")] = 2
    """Threads that read ahead; more help where the corpus lies on a slow network disk."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh:
    """How many ways each kind of parallelism divides the devices; -1 on one axis: the rest."""

    data: ranges.Axis = -1
    """Replicas of the model, each with its share of the batch."""
    stage: ranges.Axis = 1
    """Pipeline stages: each holds a part of the layers, microbatches stream through them."""
    virtual_stages: Annotated[int, ranges.Range(1, 2**16, "1 cuts nothing")] = 1
    """Parts of the layers that each pipeline stage holds: more shorten the pipeline's bubble."""
    fsdp: ranges.Axis = 1
    """Shards of parameters, optimizer state and batch."""
    context: ranges.Axis = 1
    """Shards of the sequence, for contexts whose activations do not fit one device."""
    tensor: ranges.Axis = 1
    """Shards of heads, MLP and vocabulary: keep inside one NVLink domain."""
    shard_optimizer: bool = False
    """Shard optimizer state and fp32 parameters over data too (ZeRO-1)."""
    sequence_parallel: bool = True
    """Shard the norm, dropout and residual regions along the sequence over the tensor axis."""
    cpu_devices: Annotated[int, ranges.Range(0, 4096)] = 0
    """Run on this many emulated CPU devices instead of what the machine has (0: off)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """Length of the run, evaluation, seed. The run ends at the first limit that is set."""

    n_steps: ranges.Count = 0
    """Train this many steps (0: no such limit)."""
    n_samples: ranges.Samples = 0
    """Train this many samples, as 300000 or 300K (0: no such limit)."""
    n_tokens: ranges.Tokens = 0
    """Train this many tokens, as 300B; K, M, B, T are 10^3 ... 10^12 (0: no such limit)."""
    seed: ranges.Seed = 1234
    """Seed of initial weights, dropout and sample order."""
    loss_mean: Literal["tokens", "microbatches"] = "tokens"
    """Gradient of the mean over all tokens of a batch, or of the mean of microbatch means."""
    eval_interval: ranges.Count = 1000
    """Steps between evaluations on the validation split (0: none, not even at the end)."""
    eval_batches: Annotated[
        int, ranges.Range(1, ranges.INT32, "train.eval_interval=0 turns evaluation off")
    ] = 10
    """Batches of global_batch_size in one evaluation."""
    max_fruitless_starts: ranges.Count = 10
    """Starts in a row that failed without a new checkpoint before the next is refused (0: any)."""
    checksum_interval: ranges.Count = 100
    """Steps between comparisons of the parameters' replicas, bit for bit (0: none); also made
    before each save then. They take a read of the parameters."""
    replay_step: ranges.Count = 0
    """In place of training: take this step twice from the checkpoint before it, and compare (0:
    off)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Faults:
    """What is done about steps with a loss or gradient that is not finite, and with loss spikes.

    A spike is a loss above the mean plus some standard deviations of the losses of earlier steps.
    """

    nonfinite: Literal["stop", "skip", "warn"] = "stop"
    """Not finite; no weight changes then in any case. stop: end the run; skip: tell, go on, and end
    after max_skipped_steps; warn: tell and go on without end. float16's loss scale comes first."""
    max_skipped_steps: Annotated[
        int, ranges.Range(1, ranges.INT32, "faults.nonfinite=warn goes on without end")
    ] = 10
    """Skipped steps in a row that end the run, where a policy is skip."""
    spike: Literal["off", "warn", "skip", "stop"] = "off"
    """A spike. warn: tell; skip: tell and leave the step's update out; stop: end the run."""
    spike_window: Annotated[int, ranges.Range(2, 10**6, "faults.spike=off seeks none")] = 100
    """Successful steps that the mean and deviation are of; there is no limit before (steps)."""
    spike_deviations: Annotated[float, ranges.Range(0, 10**6)] = 6.0
    """Standard deviations above the mean at which a loss is a spike."""

    @property
    def limits_loss(self) -> bool:
        """Tell whether the training step takes a limit, to skip losses above it by itself."""
        return self.spike == "skip"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Where the run's state is saved and found again."""

    dir: user_paths.Path = ""
    """Folder of this run's checkpoints, resumed from if it has one (empty: none are written)."""
    load: user_paths.Path = ""
    """Start from this folder's newest checkpoint where checkpoint.dir has none yet."""
    only_params: bool = False
    """Take the parameters alone from checkpoint.load: begin at step 0, with a fresh optimizer."""
    save_interval: Annotated[
        int, ranges.Range(1, ranges.INT32, "without checkpoint.dir nothing is saved")
    ] = 1000
    """Steps between checkpoints (one more is written at the end)."""
    max_to_keep: Annotated[
        int, ranges.Range(1, ranges.INT32, "keep_period equal to save_interval keeps all")
    ] = 3
    """Newest checkpoints kept; older ones are removed."""
    keep_period: ranges.Count = 0
    """Checkpoints of multiples of this many steps are kept for good, besides the newest (0: none).
    """
    max_failed_saves: ranges.Count = 5
    """Failed saves in a row that end the run, to be started again; the last save of a run is tried
    this often (0: failed saves end no run before its last, which is tried 5 times)."""
    retry_pause: Annotated[float, ranges.Range(0, 10**6)] = 10.0
    """Wait this long before the last save of a run is tried again (seconds)."""
    allow_new_data_order: bool = False
    """Resume although the order of samples changed: some may repeat and some may be missed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Log:
    """What the run tells."""

    dir: user_paths.Path = ""
    """Folder for metrics.jsonl, TensorBoard files and the resolved config (empty: none)."""
    interval: Annotated[int, ranges.Range(1, ranges.INT32, "a large number logs little")] = 100
    """Steps between console lines and logged metrics."""
    profile_steps: tuple[ranges.Count, ranges.Count] = (0, 0)
    """First and last step of a profile for TensorBoard or xprof (0 0: none)."""
    peak_tflops: Annotated[float, ranges.Range(0, 10**9)] = 0.0
    """Peak TFLOP/s of one device in the compute format, for the MFU (0: look the GPU up)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watchdog:
    """When a process that makes no progress is ended, with its stacks and exit status 1."""

    step_multiple: Annotated[float, ranges.Range(0, 10**6)] = 10.0
    """A part of a step may take this many times the usual time of a whole step (0: no watchdog)."""
    min_seconds: Annotated[
        float, ranges.Range(1, 10**6, "watchdog.step_multiple=0 turns the watchdog off")
    ] = 120.0
    """The limit of a part of a step is not shorter (seconds)."""
    slow_phase_seconds: Annotated[
        float, ranges.Range(1, 10**6, "watchdog.step_multiple=0 turns the watchdog off")
    ] = 3600.0
    """The limit of starting, compiling, restoring, evaluating or saving (seconds)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distributed:
    """The processes of the run: what no launcher tells of them."""

    n_processes: Annotated[int, ranges.Range(0, 2**20)] = 0
    """Processes expected; fewer are an error (0: as the launcher says, else 1)."""
    coordinator_address: str = ""
    """host:port of process 0, where no launcher tells."""
    process_id: Annotated[int, ranges.Range(-1, 2**20)] = -1
    """Number of this process, where no launcher tells."""
    start_timeout: Annotated[int, ranges.Range(1, 10**6)] = 300
    """Wait this long for all processes at the start (seconds)."""
    heartbeat_timeout: Annotated[int, ranges.Range(1, 10**6)] = 60
    """When one process is not heard of for this long, end all others (seconds)."""
    preflight: bool = True
    """Compare the processes before the first step: devices, code, config, program, files."""


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
    faults: Faults = Faults()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    watchdog: Watchdog = Watchdog()
    distributed: Distributed = Distributed()


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


def unflatten(kind: type[Tree], flat: dict[str, Any], prefix: str = "") -> Tree:
    """Return the config that `flatten` gave, read back from JSON; what it lacks has its default."""
    given: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(kind).items():
        value = flat.get(prefix + name)
        if dataclasses.is_dataclass(hint):
            given[name] = unflatten(typing.cast(type[Any], hint), flat, f"{prefix}{name}.")
        elif prefix + name in flat:
            given[name] = tuple(value) if isinstance(value, list) else value
    return kind(**given)
