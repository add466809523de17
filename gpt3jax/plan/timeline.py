"""The time of a compiled step: a walk of its schedule on two streams, arithmetic and communication.

Products and attention take the time of their FLOPs or of their bytes at an assumed rate; all other
kernels take the time of the bytes that XLA's cost model counts. A collective starts when the one
before it ends. Arithmetic waits for it where the schedule does, and that wait is exposed. A fusion
that XLA starts beside the arithmetic (since 0.11: copies into a loop's stack and out of it) still
takes its time in line, because it needs the same memory.
"""

import collections
import copy
import dataclasses
import math
import re

from gpt3jax.hardware import gpus
from gpt3jax.plan import hlo

_MASK = re.compile(r'"mask_type":\s*"(\w+)"')
COST = re.compile(r'"exec_time_us":([\d.e+-]+),[^{}]*"name":"([^"]*)"')
_CONTRACTED = re.compile(r'"lhs_contracting_dimensions":\[([^\]]*)\]')
_WINDOW = re.compile(r'"sliding_window_length":\s*"?(\d+)')
_WORKSPACE = re.compile(r"\b[su]8\[\d*\]")  # the last part of a library's result, any size
# A cost that is no cost: this many times the time of operands and result plus 10 us. The largest
# multiple seen is 9, for dropout's random bits.
TOO_LONG = 100
# Operations that take no time of their own: they name existing arrays, or copy to the host.
_FREE = {
    "parameter", "constant", "bitcast", "tuple", "get-tuple-element", "partition-id", "after-all",
    "add-dependency", "opt-barrier", "copy-start",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """The rates that a GPU is assumed to reach."""

    matmul: float
    """FLOP/s of large products in 16 bits or more."""
    matmul_8_bits: float
    cudnn: float
    """FLOP/s of cuDNN's attention, counting the scores that its mask leaves."""
    cudnn_backward: float
    """The same of its backward pass."""
    triton: float
    """The same of our own attention."""
    memory: float
    """Bytes a second of kernels that only move data."""
    memory_peak: float
    """Bytes a second that XLA's cost model assumes."""
    network: gpus.Network


Key = tuple[str, str, str]
"""Kind, mesh axes joined by +, network."""


def _by_kernel() -> dict[str, float]:
    return collections.defaultdict(float)


def _by_key() -> dict[Key, float]:
    return collections.defaultdict(float)


@dataclasses.dataclass
class Timeline:
    """The seconds of a step so far, and how they are spent."""

    seconds: float = 0.0
    link_free: float = 0.0
    """When the communication stream is next free."""
    flops: float = 0.0
    """FLOPs of products and attention."""
    flops_8_bits: float = 0.0
    """The part of them in products in 8 bits."""
    kernels: dict[str, float] = dataclasses.field(default_factory=_by_kernel)
    """Seconds of matmul, attention, elementwise."""
    count: dict[Key, float] = dataclasses.field(default_factory=_by_key)
    crossing_bytes: dict[Key, float] = dataclasses.field(default_factory=_by_key)
    """Bytes that leave a GPU."""
    busy: dict[Key, float] = dataclasses.field(default_factory=_by_key)
    """Seconds that collectives would take alone."""
    exposed: dict[Key, float] = dataclasses.field(default_factory=_by_key)
    """Seconds that arithmetic waits for them."""

    def repeat(self, before: "Timeline", times: int) -> None:
        """Add, this many times more, what happened since `before`."""
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
    shapes = {instruction.name: instruction.shape for instruction in instructions}
    under_way: dict[str, tuple[float, Key]] = {}
    for instruction in instructions:
        op = instruction.op
        if instruction.collective:
            collective = hlo.collective(instruction, axis_sizes, rates.network.gpus_per_node)
            under_way[instruction.name] = _start(collective, rates, line)
        elif op.endswith("-done") and instruction.operands[0] in under_way:
            _wait(*under_way.pop(instruction.operands[0]), line)
        elif op == "while":
            _loop(program, instruction, axis_sizes, rates, line)
        elif op == "conditional":
            branches = [copy.deepcopy(line) for _ in instruction.callees]
            for callee, branch in zip(instruction.callees, branches, strict=True):
                _walk(program, callee, axis_sizes, rates, branch)
            vars(line).update(vars(max(branches, key=lambda branch: branch.seconds)))
        elif instruction.callees:
            _walk(program, instruction.callees[0], axis_sizes, rates, line)
        elif op not in _FREE and not op.endswith(("-update", "-done")):
            if op.endswith("-start") and op != "fusion-start":
                raise hlo.unreadable(f"it starts {op}, which is not known")
            _run(instruction, program.fused(instruction), shapes, rates, line)


def _loop(
    program: hlo.Program,
    loop: hlo.Instruction,
    axis_sizes: tuple[tuple[str, int], ...],
    rates: Rates,
    line: Timeline,
) -> None:
    """Walk a loop's body twice, and let every further trip take as long as the second."""
    trips = hlo.trips(program, loop)
    for _ in range(min(trips, 2)):
        before = copy.deepcopy(line)
        _walk(program, loop.body, axis_sizes, rates, line)
    if trips > 2:
        line.repeat(before, trips - 2)


def _start(collective: hlo.Collective, rates: Rates, line: Timeline) -> tuple[float, Key]:
    """Start a collective; return when it ends, and its key."""
    network, _ = rates.network.bandwidth(collective.group_size, collective.in_node)
    key = collective.kind, "+".join(collective.axes), network
    seconds = rates.network.seconds(
        collective.crossing_bytes, collective.group_size, collective.in_node
    )
    line.count[key] += 1
    line.crossing_bytes[key] += collective.crossing_bytes
    line.busy[key] += seconds
    line.link_free = max(line.link_free, line.seconds) + seconds
    if not collective.is_async:
        _wait(line.link_free, key, line)
    return line.link_free, key


def _wait(end: float, key: Key, line: Timeline) -> None:
    line.exposed[key] += max(0.0, end - line.seconds)
    line.seconds = max(line.seconds, end)


def _run(
    kernel: hlo.Instruction,
    fused: list[hlo.Instruction],
    shapes: dict[str, str],
    rates: Rates,
    line: Timeline,
) -> None:
    """Add the time of a kernel: a library's call, a fusion around such calls, or any other."""
    if calls := [part for part in fused if _is_library(part)]:
        shapes = {part.name: part.shape for part in fused}
    elif _is_library(kernel):
        calls = [kernel]
    for call in calls:
        _call(call, shapes, rates, line)
    if not calls:
        seconds = _moving_seconds(kernel, fused, shapes, rates)
        line.kernels["elementwise"] += seconds
        line.seconds += seconds


def _is_library(kernel: hlo.Instruction) -> bool:
    attends = hlo.cudnn_pass(kernel.target) or hlo.triton_kernel(kernel)[0]
    return kernel.target in hlo.CUBLAS_PRODUCTS or bool(attends)


def _call(call: hlo.Instruction, shapes: dict[str, str], rates: Rates, line: Timeline) -> None:
    """Add the time of a product of cuBLAS, or of a fused attention."""
    if call.target in hlo.CUBLAS_PRODUCTS:
        kind, n_flops, rate = "matmul", _matmul_flops(call, shapes), rates.matmul
        if call.target == hlo.CUBLAS_8_BITS:
            rate = rates.matmul_8_bits
            line.flops_8_bits += n_flops
    elif way := hlo.cudnn_pass(call.target):
        rate = rates.cudnn_backward if way == "backward" else rates.cudnn
        kind, n_flops = "attention", _cudnn_flops(call, shapes)
    else:
        kind, n_flops, rate = "attention", _triton_flops(call, shapes), rates.triton
    moved = hlo.n_bytes(_WORKSPACE.sub("", call.shape))
    moved += sum(hlo.n_bytes(shapes[name]) for name in call.operands)
    seconds = max(n_flops / rate, moved / rates.memory)
    line.kernels[kind] += seconds
    line.flops += n_flops
    line.seconds += seconds


def _moving_seconds(
    kernel: hlo.Instruction, fused: list[hlo.Instruction], shapes: dict[str, str], rates: Rates
) -> float:
    """Return the seconds by XLA's cost model, at the rate reached instead of the peak."""
    costs = {name: float(us) * 1e-6 for us, name in COST.findall(kernel.attributes)}
    if not costs:
        return (_slice_bytes(fused) or hlo.n_bytes(kernel.shape)) / rates.memory
    # Triton's kernels have this entry too, and their first one is far off.
    seconds = costs.get("indexing-cost-model", costs.get(""))
    if seconds is None:
        raise hlo.unreadable(f"{kernel.name} has no cost that is known, but {', '.join(costs)}")
    moved = hlo.n_bytes(kernel.shape) + sum(hlo.n_bytes(shapes[name]) for name in kernel.operands)
    if seconds > TOO_LONG * (moved / rates.memory_peak + 1e-5):
        raise hlo.unreadable(f"{kernel.name}, which moves {moved:,} bytes, costs {seconds:.3g} s")
    return seconds * rates.memory_peak / rates.memory


def _slice_bytes(fused: list[hlo.Instruction]) -> int:
    """Return the bytes of a fusion that copies slices into an array or out of it; 0 for others."""
    shapes = {part.name: part.shape for part in fused}
    slices = [shapes[part.operands[1]] for part in fused if part.op == "dynamic-update-slice"]
    slices += [part.shape for part in fused if part.op == "dynamic-slice"]
    return 2 * sum(hlo.n_bytes(shape) for shape in slices)  # read and written


def _matmul_flops(product: hlo.Instruction, shapes: dict[str, str]) -> float:
    left = hlo.dims(shapes[product.operands[0]])
    match = _CONTRACTED.search(product.attributes)
    if not match:
        raise hlo.unreadable(f"the product {product.name} has no dimensions that it sums over")
    contracted = math.prod(left[int(d)] for d in re.findall(r"\d+", match[1]))
    return 2.0 * math.prod(hlo.dims(product.shape)) * contracted


def _cudnn_flops(call: hlo.Instruction, shapes: dict[str, str]) -> float:
    """Count two products of all pairs forward, five backward; a causal mask leaves half."""
    mask, window = _MASK.search(call.attributes), _WINDOW.search(call.attributes)
    if not mask or not window or len(hlo.dims(call.shape)) != 4:
        raise hlo.unreadable(
            f"mask, window or 4 dimensions of the attention {call.name} are missing"
        )
    b, h, t, k = hlo.dims(call.shape)
    s = math.prod(hlo.dims(shapes[call.operands[1]])) / (b * h * k)
    pairs = t * s / 2 if mask[1] == "CAUSAL" else t * s
    pairs = min(pairs, t * float(window[1])) if int(window[1]) else pairs
    products = 5 if hlo.cudnn_pass(call.target) == "backward" else 2
    return products * 2.0 * b * h * pairs * k


def _triton_flops(call: hlo.Instruction, shapes: dict[str, str]) -> float:
    """Count the products of our kernels; a GPU's queries see half of the keys, or a window."""
    name, window = hlo.triton_kernel(call)
    products = {"forward": 2, "backward_queries": 3, "backward_keys": 4}.get(name)
    queries, keys = (hlo.dims(shapes[name]) for name in call.operands[:2])
    if not products or len(queries) != 4 or len(keys) != 4:
        raise hlo.unreadable(f"the arrays of the attention {call.name} are not as expected")
    b, t, h, k = queries
    pairs = t * keys[1] / 2
    pairs = pairs if window is None else min(pairs, t * float(window))
    return products * 2.0 * b * h * pairs * k
