"""The search for the best layout of one batch size on N GPUs, by closed forms.

`config.layout` says what a layout is. Fields that the user gave are kept, and those that are `auto`
are found. The best few may be compiled, and their schedules decide then.
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import get_args

from gpt3jax import errors
from gpt3jax.config import batch_schedule, layout, ranges, schema
from gpt3jax.hardware import gpus
from gpt3jax.plan import memory_model, placement, time_model

REMATS: tuple[str, ...] = get_args(schema.Remat)[1:]  # the first is auto
VIRTUAL_STAGES = (1, 2, 3, 4, 6)  # with more the bubble hardly shrinks
LARGEST_MICROBATCH = 16
PER_MESH = 2  # layouts of one mesh that are compiled: they differ little
LONG_SEQUENCE = 8192  # tokens from which the sequence is cut too
_SHORTEST_SHARD = 2048  # tokens of a sequence that a device gets at least, where it is cut
_MOST_LOGITS = 4 << 30  # bytes of a chunk of logits
Fields = layout.Layout  # Candidate has a field of the name `layout`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layout that fits, by closed forms."""

    cfg: schema.Config
    """The recipe at one batch size, with the layout's fields."""
    layout: placement.Layout
    peak_bytes: float
    seconds: float

    @property
    def fields(self) -> Fields:
        """The fields that make the recipe this layout."""
        return layout.of(self.cfg)


def candidates(
    cfg: schema.Config, batch_size: int, n_gpus: int, gpu: gpus.Gpu, network: gpus.Network
) -> list[Candidate]:
    """Return the layouts of a batch size that fit, fastest first.

    Raises:
        UserError: no layout fits, or none is possible; it says which counts of GPUs do better.
    """
    possible = list(_possible(cfg, batch_size, n_gpus, network.gpus_per_node))
    if not possible:
        raise errors.UserError(
            f"no mesh of {n_gpus} GPUs divides a batch of {batch_size} and "
            f"batch.global_batch_size={cfg.batch.global_batch_size}, model.n_heads="
            f"{cfg.model.n_heads} and model.n_layers={cfg.model.n_layers}{_kept(cfg)}: change the "
            "number of GPUs, the batch, or what is given",
            page="parallelism.md#which-sizes-are-possible",
        )
    by_memory = [(_peak(*pair), pair) for pair in possible]
    fitting = [
        _candidate(peak, *pair, gpu, network)
        for peak, pair in by_memory
        if peak + memory_model.headroom(*pair, memory_model.pool(gpu)) <= memory_model.pool(gpu)
    ]
    if not fitting:
        least, (nearest, _) = min(by_memory, key=lambda row: row[0])
        raise errors.UserError(
            f"no layout of this model fits {n_gpus} x {gpu.name} with a batch of {batch_size}"
            f"{_kept(cfg)}: the smallest needs {least / 2**30:.1f} GiB of "
            f"{memory_model.pool(gpu) / 2**30:.1f} ({layout.in_words(layout.of(nearest))}); use "
            "more GPUs, or others",
            page="plan.md#layouts",
        )
    return sorted(fitting, key=_order)


def _order(candidate: Candidate) -> tuple[float, float]:
    """Return what layouts are sorted by: time, and memory where times are equal to 5 digits."""
    return float(f"{candidate.seconds:.5g}"), candidate.peak_bytes


def n_usable(
    cfg: schema.Config, batch_sizes: Sequence[int], n_gpus: int, gpus_per_node: int
) -> int:
    """Return how many GPUs, at most `n_gpus`, a run of these batch sizes can use; 0 if none."""
    return next(_usable_counts(cfg, batch_sizes, range(n_gpus, 0, -1), gpus_per_node), 0)


def next_usable(
    cfg: schema.Config, batch_sizes: Sequence[int], n_gpus: int, gpus_per_node: int
) -> int:
    """Return the next count above `n_gpus` of which none idles; 0 if none is below 4 times that."""
    above = range(n_gpus + 1, 4 * n_gpus)
    return next(_usable_counts(cfg, batch_sizes, above, gpus_per_node), 0)


def _usable_counts(
    cfg: schema.Config, batch_sizes: Sequence[int], counts: range, gpus_per_node: int
) -> Iterator[int]:
    """Yield the counts of which all GPUs work on a full batch, and on others as far as possible."""
    for n in counts:
        is_whole = n <= gpus_per_node or n % gpus_per_node == 0
        if is_whole and all(any(_possible(cfg, b, n, gpus_per_node)) for b in batch_sizes):
            yield n


class Queue:
    """The layouts to compile: fastest first, and only the fastest few of each mesh.

    The compiled peak of a layout corrects the closed forms of all that recompute alike.
    """

    def __init__(self, candidates: Sequence[Candidate], gpu: gpus.Gpu) -> None:
        """Start with nothing compiled."""
        self._left, self._gpu = list(candidates), gpu
        self._per_mesh: collections.Counter[str] = collections.Counter()
        self._corrections: dict[tuple[str, str], float] = {}

    def next(self) -> Candidate | None:
        """Return the next layout; None when no other may fit."""
        while self._left:
            candidate = self._left.pop(0)
            budget, headroom = memory_model.budget(candidate.cfg, candidate.layout, self._gpu)
            peak_bytes = candidate.peak_bytes * self._corrections.get(_kind(candidate), 1.0)
            if peak_bytes + headroom > budget:
                continue
            mesh = str(candidate.layout.sizes)
            self._per_mesh[mesh] += 1
            if self._per_mesh[mesh] <= PER_MESH:
                return candidate
        return None

    def note(self, candidate: Candidate, peak_bytes: float) -> None:
        """Correct the closed forms by the compiled peak of a layout (bytes)."""
        kind, correction = _kind(candidate), peak_bytes / candidate.peak_bytes
        self._corrections[kind] = max(self._corrections.get(kind, 1.0), correction)


def _kind(candidate: Candidate) -> tuple[str, str]:
    return candidate.cfg.model.remat, candidate.layout.attention


def _kept(cfg: schema.Config) -> str:
    fields = ", ".join(f"{name}={value}" for name, value in layout.given(cfg).items())
    return f" with {fields} as given" if fields else ""


def _peak(variant: schema.Config, placed: placement.Layout) -> float:
    return sum(memory_model.memory(variant, placed).values())


def _candidate(
    peak: float,
    variant: schema.Config,
    placed: placement.Layout,
    gpu: gpus.Gpu,
    network: gpus.Network,
) -> Candidate:
    seconds = time_model.estimate(variant, placed, gpu, network, "expected").parts.seconds
    return Candidate(cfg=variant, layout=placed, peak_bytes=peak, seconds=seconds)


def _possible(
    cfg: schema.Config, batch_size: int, n_gpus: int, gpus_per_node: int
) -> Iterator[tuple[schema.Config, placement.Layout]]:
    """Yield the variants of a recipe at a batch size whose sizes divide, with their layouts."""
    for variant in _variants(cfg, batch_size, n_gpus, gpus_per_node):
        try:
            yield variant, placement.lay_out(variant, n_gpus, gpus_per_node)
        except errors.UserError:  # a size does not divide
            continue


def _variants(
    cfg: schema.Config, batch_size: int, n_gpus: int, gpus_per_node: int
) -> Iterator[schema.Config]:
    """Yield the recipe at a batch size with every layout that is worth a look.

    Only for batches smaller than the full one may some GPUs compute the same as others.
    """
    at_size, asked = layout.at_batch_size(cfg, batch_size), layout.given(cfg)
    is_full = batch_size == cfg.batch.global_batch_size
    for copies in _choices(asked, "mesh.copies", [1] if is_full else ranges.divisors_of(n_gpus)):
        n_each, rest = divmod(n_gpus, copies)
        if rest or (n_each > gpus_per_node and n_each % gpus_per_node):
            continue
        for axes in _axes(cfg, asked, batch_size, n_each, gpus_per_node):
            for fields in _step_fields(at_size, asked, axes):
                yield layout.with_layout(at_size, {"mesh.copies": copies, **axes, **fields})


def _axes(
    cfg: schema.Config, asked: layout.Layout, batch_size: int, n_gpus: int, gpus_per_node: int
) -> Iterator[layout.Layout]:
    """Yield the sizes of the axes, but for copies, of meshes that divide model and batch.

    Tensor parallelism stays inside a node. The ranks divide the full batch too, of which
    evaluations are made.
    """
    for tensor, stage, context in itertools.product(
        _choices(asked, "mesh.tensor", ranges.divisors_of(min(gpus_per_node, n_gpus))),
        _choices(asked, "mesh.stage", ranges.divisors_of(cfg.model.n_layers)),
        _choices(asked, "mesh.context", _contexts(cfg.model.seq_len)),
    ):
        ranks, rest = divmod(n_gpus, tensor * stage * context)
        divides = ranks and not (batch_size % ranks or cfg.batch.global_batch_size % ranks)
        if rest or not divides or cfg.model.n_heads % tensor:
            continue
        for fsdp in _choices(asked, "mesh.fsdp", ranges.divisors_of(ranks)):
            data = ranks // fsdp
            if data * fsdp == ranks and data in _choices(asked, "mesh.data", [data]):
                sizes = {"data": data, "stage": stage, "fsdp": fsdp, "context": context}
                yield {f"mesh.{axis}": n for axis, n in (sizes | {"tensor": tensor}).items()}


def _choices(asked: layout.Layout, name: str, otherwise: Sequence[int]) -> Sequence[int]:
    """Return the values of a field to try: the one that was given, or these."""
    return [asked[name]] if name in asked else otherwise


def _contexts(seq_len: int) -> list[int]:
    if seq_len < LONG_SEQUENCE:
        return [1]
    return [n for n in ranges.divisors_of(seq_len) if seq_len // n >= _SHORTEST_SHARD]


def _step_fields(
    at_size: schema.Config, asked: layout.Layout, axes: layout.Layout
) -> Iterator[layout.Layout]:
    """Yield the other fields of layouts with these axes."""
    has_stages, has_replicas = axes["mesh.stage"] > 1, axes["mesh.data"] > 1
    rows = at_size.batch.global_batch_size // (axes["mesh.data"] * axes["mesh.fsdp"])
    sizes = [n for n in ranges.divisors_of(rows) if n <= LARGEST_MICROBATCH]
    shard = (False, True) if has_replicas else (False,)
    remats = REMATS[1:] if has_stages else REMATS  # with stages the first two are the same
    choices = {
        "mesh.virtual_stages": VIRTUAL_STAGES if has_stages else (1,),
        "mesh.shard_optimizer": shard,
        "mesh.sequence_parallel": (axes["mesh.tensor"] > 1,),
        "batch.microbatch_size": sizes,
        "model.remat": remats,
    }
    tried = [[asked[name]] if name in asked else values for name, values in choices.items()]
    for values in itertools.product(*tried):
        fields = dict(zip(choices, values, strict=True))
        chunks = _loss_chunks(at_size.model, axes, fields["batch.microbatch_size"])
        yield {**fields, "model.n_loss_chunks": asked.get("model.n_loss_chunks", chunks)}


def _loss_chunks(model: schema.Model, axes: layout.Layout, microbatch_size: int) -> int:
    """Return the fewest chunks, a power of 2, in which the logits stay small.

    A logit takes 6 bytes: fp32, and its gradient in 16 bits.
    """
    positions = model.seq_len // axes["mesh.context"]
    logits = microbatch_size * positions * model.padded_vocab_size / axes["mesh.tensor"]
    chunks = 1
    while 6 * logits / chunks > _MOST_LOGITS and positions % (2 * chunks) == 0:
        chunks *= 2
    return chunks


def batch_sizes(cfg: schema.Config) -> list[int]:
    """Return the batch sizes of a recipe's schedule, in the order of the run.

    Raises:
        UserError: the schedule cannot be read.
    """
    return [size for _, size in batch_schedule.from_config(cfg.batch, cfg.model.seq_len).stages]
