"""The time of a compiled step: its schedule walked on two streams, arithmetic and communication.

Products and attention take what their FLOPs need at an assumed rate, or what their bytes need;
all other kernels what XLA's cost model says they move. A collective starts when the one before it
ends; arithmetic waits for it where the schedule does, and that wait is what is exposed. A fusion
that XLA starts beside the arithmetic (since 0.11: copies into a loop's stack and out of it) takes
its time in line all the same: it needs the memory, of which there is one.
"""

import collections
import copy
import dataclasses
import math
import re
from typing import Any

from gpt3jax.hardware import gpus
from gpt3jax.plan import hlo

_MASK = re.compile(r'"mask_type":\s*"(\w+)"')
COST = re.compile(r'"exec_time_us":([\d.e+-]+),[^{}]*"name":"([^"]*)"')
_CONTRACTED = re.compile(r'"lhs_contracting_dimensions":\[([^\]]*)\]')
_WINDOW = re.compile(r'"sliding_window_length":\s*"?(\d+)')
_WORKSPACE = re.compile(r"\b[su]8\[\d*\]")  # the last part of a library's result, of any size
# A cost that is no cost: so many times what operands and result, and 10 us, take. The most that was
# seen is 9, of dropout's random bits.
TOO_LONG = 100
# Operations that take no time of their own: names for what is there already; a copy to the host.
_FREE = {
    "parameter", "constant", "bitcast", "tuple", "get-tuple-element", "partition-id", "after-all",
    "add-dependency", "opt-barrier", "copy-start",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """What a GPU is taken to reach."""

    matmul: float
    """FLOP/s of large products."""
    attention: float
    """FLOP/s of cuDNN's attention, of what its mask leaves."""
    memory: float
    """Bytes a second of kernels that only move data."""
    memory_peak: float
    """Bytes a second that XLA's cost model reckons with."""
    network: gpus.Network


Key = tuple[str, str, str]
"""Kind, mesh axes joined by +, network."""


def _amounts() -> collections.defaultdict[Any, float]:
    return collections.defaultdict(float)


@dataclasses.dataclass
class Timeline:
    """Seconds of a step, and what they are spent on."""

    seconds: float = 0.0
    link_free: float = 0.0
    """When the communication stream is next free."""
    flops: float = 0.0
    """Of products and attention."""
    kernels: dict[str, float] = dataclasses.field(default_factory=_amounts)
    """Seconds of matmul, attention, elementwise."""
    count: dict[Key, float] = dataclasses.field(default_factory=_amounts)
    crossing_bytes: dict[Key, float] = dataclasses.field(default_factory=_amounts)
    """What leaves a GPU."""
    busy: dict[Key, float] = dataclasses.field(default_factory=_amounts)
    """Seconds that collectives take on their own."""
    exposed: dict[Key, float] = dataclasses.field(default_factory=_amounts)
    """Seconds that arithmetic waits for them."""

    def repeat(self, before: "Timeline", times: int) -> None:
        """Add what happened since `before` so many times more."""
        for name, old in vars(before).items():
            now = getattr(self, name)
            if isinstance(old, dict):
                for key in now:
                    now[key] += times * (now[key] - old[key])
            else:
                setattr(self, name, now + times * (now - old))


def walk(program: hlo.Program, axis_sizes: dict[str, int], rates: Rates) -> Timeline:
    """Return the timeline of a step on a mesh of these sizes, slowest axis first."""
    timeline = Timeline()
    _walk(program, program.entry, tuple(axis_sizes.items()), rates, timeline)
    timeline.seconds = max(timeline.seconds, timeline.link_free)
    return timeline


def _walk(
    program: hlo.Program,
    name: str,
    axis_sizes: tuple[tuple[str, int], ...],
    rates: Rates,
    line: Timeline,
) -> None:
    instructions = program.body(name)
    shapes = {one.name: one.shape for one in instructions}
    under_way: dict[str, tuple[float, Key]] = {}
    for one in instructions:
        if one.collective:
            found = hlo.collective(one, axis_sizes, rates.network.gpus_per_node)
            under_way[one.name] = _start(found, rates, line)
        elif one.op.endswith("-done") and one.operands[0] in under_way:
            _wait(*under_way.pop(one.operands[0]), line)
        elif one.op == "while":
            _loop(program, one, axis_sizes, rates, line)
        elif one.op == "conditional":
            branches = [copy.deepcopy(line) for _ in one.callees]
            for callee, branch in zip(one.callees, branches, strict=True):
                _walk(program, callee, axis_sizes, rates, branch)
            vars(line).update(vars(max(branches, key=lambda branch: branch.seconds)))
        elif one.callees:
            _walk(program, one.callees[0], axis_sizes, rates, line)
        elif one.op not in _FREE and not one.op.endswith(("-update", "-done")):
            if one.op.endswith("-start") and one.op != "fusion-start":
                raise hlo.unreadable(f"it starts {one.op}, which is not known")
            _run(one, program.fused(one), shapes, rates, line)


def _loop(
    program: hlo.Program,
    one: hlo.Instruction,
    axis_sizes: tuple[tuple[str, int], ...],
    rates: Rates,
    line: Timeline,
) -> None:
    """Walk a loop's body twice and take the second trip for the others."""
    trips = hlo.trips(program, one)
    for _ in range(min(trips, 2)):
        before = copy.deepcopy(line)
        _walk(program, one.body, axis_sizes, rates, line)
    if trips > 2:
        line.repeat(before, trips - 2)


def _start(one: hlo.Collective, rates: Rates, line: Timeline) -> tuple[float, Key]:
    network, _ = rates.network.bandwidth(one.group_size, one.in_node)
    key = one.kind, "+".join(one.axes), network
    seconds = rates.network.seconds(one.crossing_bytes, one.group_size, one.in_node)
    line.count[key] += 1
    line.crossing_bytes[key] += one.crossing_bytes
    line.busy[key] += seconds
    line.link_free = max(line.link_free, line.seconds) + seconds
    if not one.is_async:
        _wait(line.link_free, key, line)
    return line.link_free, key


def _wait(end: float, key: Key, line: Timeline) -> None:
    line.exposed[key] += max(0.0, end - line.seconds)
    line.seconds = max(line.seconds, end)


def _run(
    one: hlo.Instruction,
    fused: list[hlo.Instruction],
    shapes: dict[str, str],
    rates: Rates,
    line: Timeline,
) -> None:
    """Let a kernel take its time: a library's call, one with the slices it reads, or another."""
    if calls := [part for part in fused if _is_library(part)]:
        shapes = {part.name: part.shape for part in fused}
    elif _is_library(one):
        calls = [one]
    for call in calls:
        _call(call, shapes, rates, line)
    if not calls:
        seconds = _moving_seconds(one, fused, shapes, rates)
        line.kernels["elementwise"] += seconds
        line.seconds += seconds


def _is_library(one: hlo.Instruction) -> bool:
    return one.target in hlo.CUBLAS_PRODUCTS or bool(hlo.attention_pass(one.target))


def _call(one: hlo.Instruction, shapes: dict[str, str], rates: Rates, line: Timeline) -> None:
    """Let a product of cuBLAS, or cuDNN's attention, take its time."""
    if one.target in hlo.CUBLAS_PRODUCTS:
        kind, n_flops, rate = "matmul", _matmul_flops(one, shapes), rates.matmul
    else:
        kind, n_flops, rate = "attention", _attention_flops(one, shapes), rates.attention
    moved = hlo.n_bytes(_WORKSPACE.sub("", one.shape))
    moved += sum(hlo.n_bytes(shapes[name]) for name in one.operands)
    seconds = max(n_flops / rate, moved / rates.memory)
    line.kernels[kind] += seconds
    line.flops += n_flops
    line.seconds += seconds


def _moving_seconds(
    one: hlo.Instruction, fused: list[hlo.Instruction], shapes: dict[str, str], rates: Rates
) -> float:
    """Return what XLA's cost model says, at the rate reached in place of the peak."""
    costs = {name: float(us) * 1e-6 for us, name in COST.findall(one.attributes)}
    if not costs:
        return (_slice_bytes(fused) or hlo.n_bytes(one.shape)) / rates.memory
    # Where it has this entry, for Triton's kernels, the first one is far off.
    seconds = costs.get("indexing-cost-model", costs.get(""))
    if seconds is None:
        raise hlo.unreadable(f"{one.name} has no cost that is known, but {', '.join(costs)}")
    moved = hlo.n_bytes(one.shape) + sum(hlo.n_bytes(shapes[name]) for name in one.operands)
    if seconds > TOO_LONG * (moved / rates.memory_peak + 1e-5):
        raise hlo.unreadable(f"{one.name}, which moves {moved:,} bytes, costs {seconds:.3g} s")
    return seconds * rates.memory_peak / rates.memory


def _slice_bytes(fused: list[hlo.Instruction]) -> int:
    """Return what a fusion moves that copies slices into an array or out of it; 0 of others."""
    shapes = {one.name: one.shape for one in fused}
    slices = [shapes[one.operands[1]] for one in fused if one.op == "dynamic-update-slice"]
    slices += [one.shape for one in fused if one.op == "dynamic-slice"]
    return 2 * sum(hlo.n_bytes(shape) for shape in slices)  # read and written


def _matmul_flops(one: hlo.Instruction, shapes: dict[str, str]) -> float:
    left = hlo.dims(shapes[one.operands[0]])
    match = _CONTRACTED.search(one.attributes)
    if not match:
        raise hlo.unreadable(f"the product {one.name} has no dimensions that it sums over")
    contracted = math.prod(left[int(d)] for d in re.findall(r"\d+", match[1]))
    return 2.0 * math.prod(hlo.dims(one.shape)) * contracted


def _attention_flops(one: hlo.Instruction, shapes: dict[str, str]) -> float:
    """Two products of all pairs forward, five backward, of which a causal mask leaves half."""
    mask, window = _MASK.search(one.attributes), _WINDOW.search(one.attributes)
    if not mask or not window or len(hlo.dims(one.shape)) != 4:
        raise hlo.unreadable(
            f"mask, window or 4 dimensions of the attention {one.name} are missing"
        )
    b, h, t, k = hlo.dims(one.shape)
    s = math.prod(hlo.dims(shapes[one.operands[1]])) / (b * h * k)
    pairs = t * s / 2 if mask[1] == "CAUSAL" else t * s
    pairs = min(pairs, t * float(window[1])) if int(window[1]) else pairs
    products = 5 if hlo.attention_pass(one.target) == "backward" else 2
    return products * 2.0 * b * h * pairs * k
