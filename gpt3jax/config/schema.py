"""The configuration: a frozen tree of dataclasses. A field's docstring is its `--help` text.

`recipe` reads a config from a file and the command line; `validation` checks it.
"""

import dataclasses
import typing
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from gpt3jax.config import ranges, user_paths

_WATCHED = ranges.Range(1, 10**6, "watchdog.step_multiple=0 turns the watchdog off")  # seconds
AUTO: Any = "auto"  # a field of the layout that the run chooses itself
Remat: TypeAlias = Literal["auto", "none", "dots", "mlp", "residual", "full"]
Tree = TypeVar("Tree")
Flat: TypeAlias = dict[str, Any]  # a field's dotted name: bool, int, float, str, or a tuple of them


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention:
    """How attention is computed, and which positions it attends to."""

    implementation: Literal["auto", "xla", "cudnn", "triton"] = "auto"
    """auto: the fastest that serves. On GPUs in 16-bit formats cudnn without attention dropout, and
    triton with it (our kernel, the extra `triton`); else xla."""
    pattern: Literal["dense", "alternating"] = "dense"
    """alternating: layers 1, 3, 5, ... are locally banded, the others dense (GPT-3 paper, 2.1)."""
    band: Annotated[int, ranges.Range(1, 2**24, "model.attention.pattern=dense has no bands")] = 256
    """Earlier positions that a banded layer attends to, besides the token itself (tokens)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """The network, with the names of GPT-3's Table 2.1."""

    n_layers: Annotated[int, ranges.Range(1, 2**16)]
    """Number of transformer blocks."""
    d_model: Annotated[int, ranges.Range(1, 2**20)]
    """Width of the residual stream. Each head has d_model / n_heads, the MLP 4 x d_model."""
    n_heads: Annotated[int, ranges.Range(1, 2**20)]
    """Attention heads in each layer."""
    seq_len: Annotated[int, ranges.Range(1, 2**24)]
    """Context length, and the length of every training sequence (tokens)."""
    vocab_size: Annotated[int, ranges.Range(1, 2**30)] = 50_257
    """Size of the vocabulary before padding (tokens). The default is GPT-2's."""
    vocab_multiple: Annotated[int, ranges.Range(1, 2**20, "1 pads nothing")] = 128
    """Pad the vocabulary to a multiple of this, whatever the mesh (tokens)."""
    mask_padded_vocab: bool = True
    """Exclude the padding of the vocabulary from the softmax. Off: include it, as Megatron does."""
    dropout: ranges.Probability = 0.1
    """Dropout after the embedding and on both residual branches (probability)."""
    attention_dropout: ranges.Probability = 0.1
    """Dropout of attention weights (probability). The cuDNN kernel requires 0."""
    gelu: Literal["tanh", "erf"] = "tanh"
    """GELU: the tanh approximation (GPT-2, GPT-3, Megatron's default) or the exact form, erf."""
    init_std: Annotated[float, ranges.Range(0, 100)] = 0.02
    """Standard deviation of initial weights. Output projections: init_std / sqrt(2 n_layers)."""
    norm_eps: Annotated[float, ranges.Range(0, 1)] = 1e-5
    """Added to the variance in LayerNorm."""
    remat: Remat = AUTO
    """Which activations the backward pass recomputes, from none to those of whole layers (full):
    see `remat.SAVED`. With pipeline stages, none means dots. auto: chosen with the layout."""
    n_loss_chunks: Annotated[ranges.IntOrAuto, ranges.Range(1, 2**24, "1 cuts nothing")] = AUTO
    """Chunks of the sequence in the loss. More need less memory: one chunk's logits at a time.
    auto: chosen with the layout."""
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
    """Learning rate at the end of the decay, and after it."""
    init_lr: Annotated[float, ranges.Range(0, 1e30)] = 0.0
    """Learning rate at the start of the warm-up."""
    decay: Literal["cosine", "linear", "constant", "inverse-square-root", "wsd"] = "cosine"
    """Shape of the decay from peak_lr to min_lr. wsd keeps peak_lr until a final decay."""
    decay_samples: ranges.Samples = 0
    """Samples until the learning rate is min_lr, warm-up included (0: the length of the run)."""
    warmup_samples: ranges.Samples = 0
    """Length of the linear warm-up (samples). Set this or warmup_fraction."""
    warmup_fraction: ranges.Probability = 0.0
    """Length of the linear warm-up as a fraction of decay_samples."""
    wsd_decay: Literal["linear", "cosine", "exponential", "minus-sqrt"] = "exponential"
    """Shape of the final decay of wsd."""
    wsd_decay_samples: ranges.Samples = 0
    """Length of the final decay of wsd (samples)."""
    weight_decay: Annotated[float, ranges.Range(0, 1000)] = 0.1
    """Decoupled weight decay of matrices and embeddings. Biases and LayerNorm have none."""
    start_weight_decay: Annotated[float, ranges.Range(0, 1000)] = 0.0
    """Weight decay at step 0, if weight_decay_growth is not constant."""
    weight_decay_growth: Literal["constant", "linear", "cosine"] = "constant"
    """How weight decay changes over the run, from start_weight_decay to weight_decay."""
    beta1: ranges.Probability = 0.9
    """Decay rate of Adam's first moment."""
    beta2: ranges.Probability = 0.95
    """Decay rate of Adam's second moment."""
    eps: Annotated[float, ranges.Range(0, 1)] = 1e-8
    """Added to the square root of Adam's second moment."""
    clip_norm: Annotated[float, ranges.Range(0, 1e30)] = 1.0
    """Clip the gradient to this global L2 norm (0: no clipping)."""

    def schedule(self, run_samples: int) -> tuple[float, int]:
        """Return (samples of warm-up, samples of warm-up and decay) in a run of `run_samples`."""
        decay_samples = self.decay_samples or run_samples
        return self.warmup_samples or self.warmup_fraction * decay_samples, decay_samples


@dataclasses.dataclass(frozen=True, kw_only=True)
class Precision:
    """Number formats. Weights, Adam's moments, softmax, LayerNorm and loss are always in fp32."""

    compute_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Format of matrix products and activations."""
    matmul_dtype: Literal["compute_dtype", "float8"] = "compute_dtype"
    """Format of the layers' matrix products, but for attention's own. float8: 8 bits, forward and
    backward (E4M3, gradients E5M2), each tensor scaled by its largest value; for GPUs from Hopper
    and Ada on, with compute_dtype bfloat16. CPUs emulate it."""
    end_layers: Annotated[int, ranges.Range(0, 10**4)] = 0
    """float8: layers at either end whose products stay in compute_dtype."""
    static_loss_scale: Annotated[float, ranges.Range(0, 2.0**64)] = 0.0
    """float16: constant loss scale (0: a dynamic one)."""
    initial_loss_scale: Annotated[float, ranges.Range(1, 2.0**64)] = 2.0**32
    """float16: first value of the dynamic loss scale."""
    min_loss_scale: Annotated[float, ranges.Range(1, 2.0**64)] = 1.0
    """float16: lower bound of the dynamic loss scale."""
    loss_scale_window: ranges.Positive = 1000
    """float16: steps in a row without overflow after which the loss scale doubles (steps)."""
    loss_scale_hysteresis: ranges.Positive = 2
    """float16: overflows until the scale halves. They are counted anew only when it doubles."""
    deterministic: bool = False
    """On GPUs a step gives the same bits each time: kernels that add in a varying order are not
    used. It costs time where cuDNN's attention is."""

    @property
    def scales_dynamically(self) -> bool:
        """Return whether the loss scale changes during a run."""
        return self.compute_dtype == "float16" and not self.static_loss_scale


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """How many sequences a step has, and how they are divided into microbatches."""

    global_batch_size: Annotated[int, ranges.Range(1, 10**6)]
    """Sequences per step over all devices. It is also the upper bound of batch.schedule."""
    microbatch_size: Annotated[ranges.IntOrAuto, ranges.Range(1, 10**6)] = AUTO
    """Sequences that a data-parallel rank processes at a time. auto: chosen with the layout."""
    schedule: str = ""
    """Batch size by tokens consumed, as "0:16 2.4B:320 12B:1536" (K, M, B, T: 10^3 ... 10^12)."""
    ramp: tuple[ranges.Samples, ...] = ()
    """Linear growth of the batch size: first size, increment, samples until global_batch_size."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """The corpus, the tokenizer, and how samples are made of documents."""

    paths: tuple[user_paths.Path, ...] = ()
    """PREFIX of the files PREFIX.bin and PREFIX.idx; or a blend: WEIGHT PREFIX WEIGHT PREFIX ..."""
    train_paths: tuple[user_paths.Path, ...] = ()
    """In place of paths and split: the corpora of the training split alone, prefixes or a blend."""
    validation_paths: tuple[user_paths.Path, ...] = ()
    """With train_paths: the corpora of the validation split."""
    test_paths: tuple[user_paths.Path, ...] = ()
    """With train_paths: the corpora of the test split."""
    mock: bool = False
    """Train on generated tokens in place of a corpus, like Megatron's --mock-data."""
    from_text: user_paths.Path = ""
    """Make the corpus from this folder of text at the first start ("python": Python's library)."""
    vocab_file: user_paths.Path = ""
    """GPT-2 vocabulary (vocab.json). It is checked against model.vocab_size and data.eod_id."""
    merge_file: user_paths.Path = ""
    """GPT-2 merges (merges.txt)."""
    tokenizer: user_paths.Path = ""
    """A tokenizer.json, in place of vocab_file and merge_file."""
    split: str = "949,50,1"
    """Shares of the documents for training, validation and test, also as "90/5/5" or "90 5 5"."""
    eod_id: Annotated[int, ranges.Range(0, 2**30)] = 50_256
    """End-of-document token, used by the three options below."""
    eod_mask_loss: bool = False
    """Exclude from the loss each position whose input is the end-of-document token."""
    reset_position_ids: bool = False
    """Restart positions at 0 after each end-of-document token."""
    reset_attention_mask: bool = False
    """Attend only to positions of the same document."""
    drop_last_partial_validation_sequence: bool = True
    """Drop the last validation sample if it is shorter than a sequence. Off: pad it."""
    index_cache: user_paths.Path = ""
    """Folder for the sample indices, shared by the processes of a host (empty: each process has
    them in memory; for 300B tokens they are about 3 GB)."""
    skip_samples: tuple[str, ...] = ()
    """Ranges A:B of training samples to skip, A to B - 1, numbered as in this run, such as
    "--data.skip-samples 8000:8640". A batch that reaches A continues at B."""
    prefetch: Annotated[int, ranges.Range(0, 10_000)] = 4
    """Batches to read ahead (0: none)."""
    read_threads: Annotated[int, ranges.Range(1, 1000, "data.prefetch=0 reads without threads")] = 2
    """Threads that read ahead. More of them help on a slow network disk."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh:
    """Devices along each axis of parallelism; auto: chosen for each batch size, by speed.

    One axis may be -1: the rest of the devices. On CPUs auto is data parallelism.
    """

    copies: ranges.Axis = AUTO
    """Copies of all else that compute the same: what devices do that a small batch leaves over."""
    data: ranges.Axis = AUTO
    """Data parallelism: replicas of the model, each with its share of the batch."""
    stage: ranges.Axis = AUTO
    """Pipeline parallelism: stages, each with a part of the layers."""
    virtual_stages: Annotated[ranges.IntOrAuto, ranges.Range(1, 2**16, "1 cuts nothing")] = AUTO
    """Parts of the layers in each pipeline stage. More of them shorten the pipeline's bubble."""
    fsdp: ranges.Axis = AUTO
    """Fully sharded data parallelism: shards of parameters, optimizer state and batch."""
    context: ranges.Axis = AUTO
    """Context parallelism: shards of the sequence, for long sequences."""
    tensor: ranges.Axis = AUTO
    """Tensor parallelism: shards of heads, MLP and vocabulary. Keep it inside one NVLink domain."""
    shard_optimizer: ranges.BoolOrAuto = AUTO
    """Shard optimizer state and fp32 parameters over the data axis too (ZeRO-1)."""
    sequence_parallel: ranges.BoolOrAuto = AUTO
    """Shard LayerNorm, dropout and the residual stream along the sequence, over the tensor axis."""
    cpu_devices: Annotated[int, ranges.Range(0, 4096)] = 0
    """Run on this many emulated CPU devices in place of the machine's own devices (0: off)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """Length of the run, evaluation, seed. The run ends at the first of the limits that are set."""

    n_steps: ranges.Count = 0
    """Length of the run in steps (0: no such limit)."""
    n_samples: ranges.Samples = 0
    """Length of the run in samples, such as 300000 or 300K (0: no such limit)."""
    n_tokens: ranges.Tokens = 0
    """Length of the run in tokens, such as 300B (0: no such limit; K, M, B, T: 10^3 ... 10^12)."""
    seed: ranges.Seed = 1234
    """Random seed of initial weights, dropout and sample order."""
    loss_mean: Literal["tokens", "microbatches"] = "tokens"
    """Loss to differentiate: the mean over a batch's tokens, or the mean of microbatches' means."""
    eval_interval: ranges.Count = 1000
    """Steps between evaluations on the validation split (0: no evaluation, not even at the end)."""
    eval_batches: Annotated[int, ranges.positive("train.eval_interval=0 turns evaluation off")] = 10
    """Batches of global_batch_size in one evaluation."""
    max_fruitless_starts: ranges.Count = 10
    """Failed starts in a row without a new checkpoint after which a start is refused (0: never)."""
    checksum_interval: ranges.Count = 100
    """Steps between bitwise comparisons of the parameters' replicas, which are compared before
    each save as well (0: never). A comparison reads all parameters once."""
    replay_step: ranges.Count = 0
    """In place of training: run this step twice from a checkpoint and compare (0: off)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Faults:
    """What to do when the loss or the gradient is not finite, and when the loss spikes.

    A spike is a loss more than spike_deviations standard deviations above the mean of recent steps.
    """

    nonfinite: Literal["stop", "skip", "warn"] = "stop"
    """When the loss or gradient is not finite; the weights never change then. stop: end the run;
    skip: warn, and end the run after max_skipped_steps; warn: warn and continue. In float16 the
    loss scale handles overflows first."""
    max_skipped_steps: Annotated[int, ranges.positive("faults.nonfinite=warn has no limit")] = 10
    """Skipped steps in a row that end the run, if nonfinite or spike is skip (steps)."""
    spike: Literal["off", "warn", "skip", "stop"] = "off"
    """At a loss spike. warn: warn; skip: warn and omit the step's update; stop: end the run."""
    spike_window: Annotated[int, ranges.Range(2, 10**6, "faults.spike=off looks for none")] = 100
    """Earlier steps that give mean and deviation; before that, no loss is a spike (steps)."""
    spike_deviations: Annotated[float, ranges.Range(0, 10**6)] = 6.0
    """Standard deviations above the mean from which a loss is a spike."""

    @property
    def limits_loss(self) -> bool:
        """Return whether the training step gets a limit, and skips losses above it by itself."""
        return self.spike == "skip"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Where and when the state of the run is saved, and what it is restored from."""

    dir: user_paths.Path = ""
    """Folder of this run's checkpoints; it resumes from the newest one (empty: no checkpoints)."""
    load: user_paths.Path = ""
    """Folder whose newest checkpoint the run starts from, if checkpoint.dir has none yet."""
    only_params: bool = False
    """Load only the parameters from checkpoint.load: start at step 0 with a new optimizer state."""
    save_interval: Annotated[int, ranges.positive("without checkpoint.dir nothing is saved")] = 1000
    """Steps between checkpoints. The end of the run is saved too."""
    max_to_keep: Annotated[int, ranges.positive("keep_period equal to save_interval keeps all")] = 3
    """Number of newest checkpoints to keep. Older ones are removed."""
    keep_period: ranges.Count = 0
    """Also keep each checkpoint whose step is a multiple of this (steps; 0: none)."""
    max_failed_saves: ranges.Count = 5
    """Failed saves in a row that end the run with exit status 1; the last save of the run has as
    many attempts (0: failed saves do not end the run, and the last one has 5 attempts)."""
    retry_pause: Annotated[float, ranges.Range(0, 10**6)] = 10.0
    """Pause between attempts at the last save of the run (seconds)."""
    save_timeout: Annotated[int, ranges.positive("a large number waits long")] = 3000
    """Time limit of a save, from the copies until all processes have written it (seconds). 175B has
    2.1 TB with its moments: the default is enough for a store that takes 0.7 GB/s. It must be below
    watchdog.slow_phase_seconds."""
    allow_new_data_order: bool = False
    """Resume even if the order of samples has changed: some may repeat and some may be missed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Log:
    """Metrics, profiles and where they are written."""

    dir: user_paths.Path = ""
    """Folder for metrics.jsonl, TensorBoard files and the config of the run (empty: none)."""
    interval: Annotated[int, ranges.positive("a large number logs little")] = 100
    """Steps between console lines and logged metrics. With log.dir a terminal shows a live view in
    place of the lines on steps."""
    profile_steps: tuple[ranges.Count, ranges.Count] = (0, 0)
    """First and last step to profile for TensorBoard or xprof, in the first process (0 0: none)."""
    profile_memory: ranges.Count = 0
    """Step after which the first process writes what its devices' memory holds to
    LOG_DIR/memory-step-STEP.prof, for pprof (0: none)."""
    wandb_project: str = ""
    """Record the run at Weights & Biases too: PROJECT or TEAM/PROJECT there (empty: do not)."""
    peak_tflops: Annotated[float, ranges.Range(0, 10**9)] = 0.0
    """Peak TFLOP/s of one device in the format of the layers' products, for the MFU (0: look the
    GPU up)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watchdog:
    """When a process that makes no progress is ended: it prints its stacks and exits with 1."""

    step_multiple: Annotated[float, ranges.Range(0, 10**6)] = 10.0
    """Time limit of a part of a step, in usual times of a whole step (0: no watchdog)."""
    min_seconds: Annotated[float, _WATCHED] = 120.0
    """Lower bound of the time limit of a part of a step (seconds)."""
    slow_phase_seconds: Annotated[float, _WATCHED] = 3600.0
    """Time limit of each of starting, compiling, restoring, evaluating and saving (seconds)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distributed:
    """The processes of the run. Most launchers set the first three through the environment."""

    n_processes: Annotated[int, ranges.Range(0, 2**20)] = 0
    """Number of processes; fewer are an error (0: the launcher's number, or 1)."""
    coordinator_address: str = ""
    """HOST:PORT of process 0 (empty: the launcher's)."""
    process_id: Annotated[int, ranges.Range(-1, 2**20)] = -1
    """Number of this process, from 0 on (-1: the launcher's)."""
    start_timeout: Annotated[int, ranges.Range(1, 10**6)] = 300
    """Time limit for all processes to join at the start (seconds)."""
    heartbeat_timeout: Annotated[int, ranges.Range(1, 10**6)] = 60
    """End the run when a process has been silent for this long (seconds)."""
    preflight: bool = True
    """Compare the processes before the first step: devices, code, config, program, files."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that defines a run."""

    model: Model
    optimizer: Optimizer
    precision: Precision = Precision()
    batch: Batch
    data: Data = Data()
    mesh: Mesh = Mesh()
    layouts: user_paths.Path = ""
    """File of layouts that gpt3jax.plan --search wrote, in place of looking for them (empty: look
    for those of fields that are auto)."""
    train: Train = Train()
    faults: Faults = Faults()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    watchdog: Watchdog = Watchdog()
    distributed: Distributed = Distributed()


def flatten(config: object) -> Flat:
    """Return every field of a tree of dataclasses under its dotted name."""
    assert dataclasses.is_dataclass(config)
    flat: Flat = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flat |= {f"{field.name}.{name}": v for name, v in flatten(value).items()}
        else:
            flat[field.name] = value
    return flat


def unflatten(kind: type[Tree], flat: Flat, prefix: str = "") -> Tree:
    """Return the config of what `flatten` returned, also after JSON; absent fields get defaults."""
    values: dict[str, object] = {}
    for name, hint in typing.get_type_hints(kind).items():
        value = flat.get(prefix + name)
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            values[name] = unflatten(hint, flat, f"{prefix}{name}.")
        elif prefix + name in flat:
            values[name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)
