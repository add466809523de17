"""Reading XLA's scheduled HLO text: which collectives a step runs, how often, over which mesh axes.

Understands what `jax.stages.Compiled.as_text()` gives for GPUs, as of JAX 0.10.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_COLLECTIVE = re.compile(
    r" = (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_BODY = re.compile(r"body=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
CUDNN_ATTENTION = {
    "forward": '"__cudnn$fmhaSoftmax"',
    "backward": '"__cudnn$fmhaSoftmaxBackward"',
}


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective instruction, with the mesh axes that its groups span."""

    kind: str
    axes: tuple[str, ...]
    group_size: int
    stride: int
    """Devices between neighbours of a group."""
    n_bytes: int
    """The whole buffer of one execution: what is gathered, reduced, scattered or sent."""
    count: int
    """Executions in a step."""
    is_async: bool

    @property
    def crossing_bytes(self) -> float:
        """Bytes that leave each GPU in one execution, by the ring algorithms."""
        if self.kind == "collective-permute":
            return self.n_bytes
        ways = 2 if self.kind == "all-reduce" else 1
        return ways * self.n_bytes * (self.group_size - 1) / self.group_size


def collectives(text: str, axis_sizes: dict[str, int]) -> list[Collective]:
    """Return the collectives of a step; equal ones are one entry, with their counts added.

    `axis_sizes` are the mesh's, slowest first; devices are numbered in its order. Executions count
    the trips of loops; of a conditional's branches all count.
    """
    bodies = _computations(text)
    counts: collections.Counter[tuple[str, str, str]] = collections.Counter()
    for line, times in _executed(bodies, _entry(text), 1):
        match = _COLLECTIVE.search(line)
        if match:
            counts[match[1], match[2] + (match[3] or ""), line[match.end() :]] += times
    merged: collections.Counter[Collective] = collections.Counter()
    for (shape, name, rest), times in counts.items():
        merged[_collective(shape, name, rest, axis_sizes)] += times
    return [dataclasses.replace(one, count=times) for one, times in merged.items()]


def cudnn_attention(text: str) -> dict[str, bool]:
    """Tell whether cuDNN's attention is in the program, forward and backward."""
    return {name: target in text for name, target in CUDNN_ATTENTION.items()}


def _computations(text: str) -> dict[str, list[str]]:
    """Return the instructions of each computation."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if line.startswith("  "):
            lines.append(line)
        elif match := _COMPUTATION.match(line):
            lines = found.setdefault(match[1], [])
    return found


def _entry(text: str) -> str:
    match = re.search(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)
    assert match, "the HLO text has no entry computation"
    return match[1]


def _executed(bodies: dict[str, list[str]], name: str, times: int) -> Iterator[tuple[str, int]]:
    """Yield each instruction that a computation runs, and how often."""
    for line in bodies.get(name, []):
        yield line, times
        if body := _BODY.search(line):
            trips = _TRIPS.search(line)
            yield from _executed(bodies, body[1], times * (int(trips[1]) if trips else 1))
            continue
        if " fusion(" in line:  # holds no collective
            continue
        called = [match[1] for match in _CALLED.finditer(line)]
        if branches := _BRANCHES.search(line):
            called += [branch.strip().lstrip("%") for branch in branches[1].split(",")]
        for callee in called:
            yield from _executed(bodies, callee, times)


def _collective(shape: str, name: str, rest: str, axis_sizes: dict[str, int]) -> Collective:
    kind = name.removesuffix("-start")
    n_devices = math.prod(axis_sizes.values())
    group = _first_group(rest, n_devices)
    places = np.stack(np.unravel_index(group, tuple(axis_sizes.values())))
    varies = (places != places[:, :1]).any(axis=1)
    n = len(group)
    return Collective(
        kind=kind,
        axes=tuple(axis for axis, moves in zip(axis_sizes, varies, strict=True) if moves),
        # A permutation's pair has two members; its axis has more, all of which take part.
        group_size=n,
        stride=abs(int(group[1]) - int(group[0])) if n > 1 else 1,
        n_bytes=_buffer_bytes(kind, name != kind, shape, n),
        count=1,
        is_async=name != kind and '"is_sync":true' not in rest,
    )


def _buffer_bytes(kind: str, starts: bool, shape: str, group_size: int) -> int:
    """Return the size of the whole buffer; a `-start` lists inputs, then outputs."""
    total = sum(_size(*match.groups()) for match in _SHAPE.finditer(shape))
    if kind in ("all-gather", "reduce-scatter") and starts:
        return total * group_size // (group_size + 1)
    if kind == "reduce-scatter":
        return total * group_size
    if kind in ("all-to-all", "collective-permute") and starts:
        return total // 2
    return total


def _size(dtype: str, dims: str) -> int:
    if dtype in ("u32", "token") and not dims:  # a permutation's context, not data
        return 0
    digits = re.search(r"\d+", dtype)
    bits = int(digits[0]) // 8 if digits else 1
    width = _BYTES.get(dtype, bits)
    return width * math.prod(int(d) for d in dims.split(",") if d)


def _first_group(rest: str, n_devices: int) -> np.ndarray:
    """Return the devices of the first group, in any of XLA's spellings."""
    if match := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", rest):
        return np.array([int(match[1]), int(match[2])])
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return np.array([int(d) for d in match[1].split(",")])
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", rest):
        return _iota(match[3]).reshape(int(match[1]), int(match[2]))[0]
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\]([^{]*)\{([^}]*)\}", rest):
        return _mesh_group(match[1], match[2], match[3])
    return np.arange(n_devices)  # {}: all


def _iota(text: str) -> np.ndarray:
    """Return the device numbers that "[8,128]T(1,0)" stands for, flat."""
    dims, _, order = text.partition("T")
    sizes = [int(d) for d in dims.strip("[]").split(",")]
    numbers = np.arange(math.prod(sizes)).reshape(sizes)
    if order:
        numbers = numbers.transpose([int(d) for d in order.strip("()").split(",")])
    return numbers.ravel()


def _mesh_group(sizes: str, devices: str, named: str) -> np.ndarray:
    """Return the first group of "mesh['a'=128,'b'=8], device_ids=([128,8]T(1,0)) {'b'}".

    A named axis may be a part of a mesh axis, "'a':(pre)size": the part of that size which comes
    after `pre` parts.
    """
    axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", sizes)}
    order = re.search(r"device_ids=\((\[[\d,]+\](?:T\([\d,]+\))?)\)", devices)
    flat = _iota(order[1]) if order else np.arange(math.prod(axes.values()))
    parts: list[int] = []
    spans: list[int | slice] = []
    wanted = {
        name: (int(before or 1), int(size or 0))
        for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", named)
    }
    for name, size in axes.items():
        before, part = wanted.get(name, (1, 1))
        part = part or size
        parts += [before, part, size // (before * part)]
        spans += [0, slice(None), 0] if name in wanted else [0, 0, 0]
    numbers = flat.reshape(parts)
    return numbers[tuple(spans)].ravel()
