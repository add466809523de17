"""A reader of XLA's scheduled HLO text: instructions, and the mesh axes that a collective spans.

It understands what `jax.stages.Compiled.as_text()` gives for GPUs in the versions of JAX in
`TRIED`. XLA's text has no specification and changes: unexpected text is an error (`unreadable`).
"""

import dataclasses
import functools
import importlib.metadata
import math
import re
from collections.abc import Iterator

import numpy as np

from gpt3jax import errors

TRIED = ("0.10.2", "0.11.2", "0.12.0.1")  # versions of JAX
_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CALLERS = ("call", "call-start", "async-start", "conditional")
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
CUBLAS_8_BITS = "__cublas$lt$matmul$f8"
CUBLAS_PRODUCTS = ("__cublas$gemm", "__cublas$lt$matmul", CUBLAS_8_BITS)
# ...ScaleBiasSoftmax with a mask of segments.
_CUDNN_ATTENTION = re.compile(r"__cudnn\$fmha\w*Softmax(Backward)?")
# jax-triton's target from 0.4 on, and before; kernels have the names of `triton_attention._call`.
_TRITON_TARGETS = ("triton_kernel_call_ffi", "triton_kernel_call")
_TRITON_ATTENTION = re.compile(
    r'op_name="[^"]*/triton_(\w+?)(?:_window_(\d+))?/triton_kernel_call"'
)


def unreadable(reason: str) -> errors.UserError:
    """Return the error for a program that differs from those of the versions in `TRIED`."""
    return errors.UserError(
        f"the plan cannot read the step that jax {importlib.metadata.version('jax')} compiled: "
        f"{reason}. Use --no-compile, or a version that was tried: {', '.join(TRIED)}",
        page="plan.md#where-the-figures-come-from",
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction of a computation."""

    name: str
    shape: str
    """The shape of its result, as XLA writes it."""
    op: str
    operands: tuple[str, ...]
    """Names of instructions of the same computation."""
    attributes: str
    """The rest of the line; for a constant, its value too."""

    @property
    def collective(self) -> str:
        """The kind of collective that it is or starts; "" for all others."""
        kind = self.op.removesuffix("-start")
        return kind if kind in _KINDS else ""

    @property
    def callees(self) -> list[str]:
        """Names of computations that it runs; a fusion or a sort is one kernel, and has none."""
        if self.op not in _CALLERS:
            return []
        names = _CALLED.findall(self.attributes)
        if branches := _BRANCHES.search(self.attributes):
            names += [branch.strip().lstrip("%") for branch in branches[1].split(",")]
        if not names:
            raise unreadable(f"the computation that {self.name} runs was not found")
        return names

    @property
    def target(self) -> str:
        """The function that a custom call calls; "" for all other instructions."""
        match = _TARGET.search(self.attributes) if self.op == "custom-call" else None
        return match[1] if match else ""

    @property
    def body(self) -> str:
        """The computation that a loop repeats."""
        match = re.search(r"body=%?([\w.\-]+)", self.attributes)
        if not match:
            raise unreadable(f"the computation that {self.name} repeats was not found")
        return match[1]


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program."""

    entry: str
    computations: dict[str, list[Instruction]]

    def body(self, name: str) -> list[Instruction]:
        """Return a computation's instructions, in the order of the schedule.

        Raises:
            UserError: no computation has this name.
        """
        if name not in self.computations:
            raise unreadable(f"it runs {name}, which was not found")
        return self.computations[name]

    def fused(self, kernel: Instruction) -> list[Instruction]:
        """Return the instructions inside a fusion, started or run at once; none for all others."""
        if kernel.op not in ("fusion", "fusion-start"):
            return []
        names = _CALLED.findall(kernel.attributes)
        if not names:
            raise unreadable(f"the computation that {kernel.name} fuses was not found")
        return [part for name in names for part in self.body(name)]


def parse(text: str) -> Program:
    """Return the program of an HLO text."""
    entry, computations = "", dict[str, list[Instruction]]()
    lines: list[Instruction] = []
    for line in text.splitlines():
        if match := _INSTRUCTION.match(line):
            lines.append(_instruction(match[1], line[match.end() :]))
        elif match := _COMPUTATION.match(line):
            lines = computations.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
    if not entry:
        raise unreadable("no entry computation was found")
    return Program(entry, computations)


def _instruction(name: str, text: str) -> Instruction:
    end = _closing(text) if text.startswith("(") else text.index(" ")
    shape, rest = text[:end], text[end:].lstrip()
    start = rest.index("(")
    length = _closing(rest[start:])
    arguments = rest[start : start + length]
    operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
    attributes = rest[start + length :] if operands else rest[start:]
    return Instruction(name, shape, rest[:start], operands, attributes)


def trips(program: Program, loop: Instruction) -> int:
    """Return how often a loop runs its body.

    Where XLA does not say, it is the number that the condition compares with, because JAX's loops
    count from 0 by 1. This is a constant in the condition, or one that the loop carries (`step`
    hides the number of microbatches).

    Raises:
        UserError: none of them says.
    """
    if match := _TRIPS.search(loop.attributes):
        return int(match[1])
    condition = list(_condition(program, loop))
    constants = [part for part in condition if _is_integer(part)]
    carried = [part for part in condition if part.op == "get-tuple-element"]
    bounds = [_value(constant) for constant in constants[:1] or _starts(program, loop, carried)]
    if max(bounds, default=0):
        return max(bounds)
    raise unreadable(f"it has a loop, {loop.name}, and XLA does not say how often it runs")


def _condition(program: Program, loop: Instruction) -> Iterator[Instruction]:
    """Yield the instructions that decide whether the loop goes on."""
    names = re.findall(r"condition=%?([\w.\-]+)", loop.attributes)
    for name in names:
        for instruction in program.body(name):
            names += re.findall(r"calls=%?([\w.\-]+)", instruction.attributes)
            yield instruction


def _starts(
    program: Program, loop: Instruction, carried: list[Instruction]
) -> Iterator[Instruction]:
    """Yield the constants with which a loop starts the values that its condition reads."""
    by_name = {part.name: part for body in program.computations.values() for part in body}
    starts = by_name[loop.operands[0]].operands
    for value in carried:
        index = re.search(r"index=(\d+)", value.attributes)
        name = starts[int(index[1])] if index and int(index[1]) < len(starts) else ""
        while name and by_name[name].op == "copy":
            name = by_name[name].operands[0]
        if name and _is_integer(by_name[name]):
            yield by_name[name]


def _is_integer(instruction: Instruction) -> bool:
    return instruction.op == "constant" and instruction.shape == "s32[]"


def _value(constant: Instruction) -> int:
    return int(constant.attributes[1 : constant.attributes.index(")")])


def _closing(text: str) -> int:
    """Return the position after the bracket that closes the first one."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    raise AssertionError(f"brackets do not close: {text[:80]}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective instruction, with the mesh axes that its groups span."""

    kind: str
    axes: tuple[str, ...]
    group_size: int
    """Members of a group; 2 for a permutation, which sends from one to one."""
    in_node: int
    """Members of a group that share a node; the fewest where nodes differ."""
    n_bytes: int
    """The whole buffer of one execution: the array gathered, reduced, scattered or sent."""
    is_async: bool
    """Whether arithmetic may run meanwhile."""

    @property
    def crossing_bytes(self) -> float:
        """Bytes that leave each GPU in one execution, by the ring algorithms."""
        if self.kind == "collective-permute":
            return self.n_bytes
        ways = 2 if self.kind == "all-reduce" else 1
        return ways * self.n_bytes * (self.group_size - 1) / self.group_size


def collective(
    instruction: Instruction, axis_sizes: tuple[tuple[str, int], ...], gpus_per_node: int
) -> Collective:
    """Return the collective that an instruction runs.

    `axis_sizes` are the mesh's, slowest first. Devices are numbered in the mesh's order, and each
    `gpus_per_node` of them are a node.
    """
    name, shape, attributes = instruction.op, instruction.shape, instruction.attributes
    return _collective(name, shape, attributes, axis_sizes, gpus_per_node)


def cudnn_pass(target: str) -> str:
    """Return "forward" or "backward" for a call of cuDNN's attention, "" for all others."""
    match = _CUDNN_ATTENTION.fullmatch(target)
    return ("backward" if match[1] else "forward") if match else ""


def triton_kernel(call: Instruction) -> tuple[str, int | None]:
    """Return the name of our attention's kernel that is called, and its window; else ""."""
    if call.target not in _TRITON_TARGETS:
        return "", None
    match = _TRITON_ATTENTION.search(call.attributes)
    if not match:
        raise unreadable(f"the name of the Triton kernel that {call.name} calls was not found")
    return match[1], int(match[2]) if match[2] else None


def fused_attention(text: str) -> dict[str, bool]:
    """Return whether a fused kernel of attention is in the program, forward and backward."""
    passes = {cudnn_pass(target) for target in _TARGET.findall(text)}
    passes |= {match[1] for match in _TRITON_ATTENTION.finditer(text)}
    in_triton = {"backward_queries", "backward_keys"} <= passes
    return {"forward": "forward" in passes, "backward": "backward" in passes or in_triton}


@functools.cache
def _collective(
    op: str,
    shape: str,
    attributes: str,
    axis_sizes: tuple[tuple[str, int], ...],
    gpus_per_node: int,
) -> Collective:
    axes, sizes = zip(*axis_sizes, strict=True)
    kind = op.removesuffix("-start")
    members = groups(attributes, math.prod(sizes))
    places = np.stack(np.unravel_index(members, sizes))
    varies = (places != places[..., :1]).any(axis=(1, 2))
    group_size = members.shape[1]
    nodes = members // gpus_per_node
    return Collective(
        kind=kind,
        axes=tuple(axis for axis, moves in zip(axes, varies, strict=True) if moves),
        group_size=group_size,
        in_node=int((nodes[:, :, None] == nodes[:, None]).sum(axis=2).min()),
        n_bytes=_buffer_bytes(kind, shape, group_size, starts=op != kind),
        is_async=op != kind and '"is_sync":true' not in attributes,
    )


def n_bytes(shape: str) -> int:
    """Return the bytes of a shape; for a tuple, of all its parts together."""
    return sum(_size(*match.groups()) for match in _SHAPE.finditer(shape))


def dims(shape: str) -> tuple[int, ...]:
    """Return the dimensions of a shape, or of a tuple's first part."""
    match = _SHAPE.search(shape)
    assert match, f"not a shape: {shape}"
    return tuple(int(d) for d in match[2].split(",") if d)


def _buffer_bytes(kind: str, shape: str, group_size: int, *, starts: bool) -> int:
    """Return the bytes of the whole buffer; the shape of a `-start` lists inputs, then outputs."""
    total = n_bytes(shape)
    if kind in ("all-gather", "reduce-scatter") and starts:
        return total * group_size // (group_size + 1)
    if kind == "reduce-scatter":
        return total * group_size
    if kind in ("all-to-all", "collective-permute") and starts:
        return total // 2
    return total


def _size(dtype: str, dims: str) -> int:
    """Return the bytes of an array."""
    if dtype in ("u32", "token") and not dims:  # a permutation's context, not data
        return 0
    digits = re.search(r"\d+", dtype)
    bits = int(digits[0]) // 8 if digits else 1
    width = _BYTES.get(dtype, bits)
    return width * math.prod(int(d) for d in dims.split(",") if d)


def groups(attributes: str, n_devices: int) -> np.ndarray:
    """Return the devices of each group, `[groups, members]`, from any of XLA's spellings.

    Raises:
        UserError: the spelling is not known.
    """
    if re.search(r"replica_groups=\{\}", attributes):
        return np.arange(n_devices)[None]  # one group of all
    if match := re.search(r"(?:source_target_pairs|replica_groups)=\{(\{[\d,{}]*\})\}", attributes):
        listed = re.findall(r"\{([\d,]+)\}", match[1])
        return np.array([[int(d) for d in group.split(",")] for group in listed])
    if match := re.search(
        r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes
    ):
        return _iota(match[3]).reshape(int(match[1]), int(match[2]))
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\]([^{]*)\{([^}]*)\}", attributes):
        return _mesh_groups(match[1], match[2], match[3])
    raise unreadable(f"groups of a collective are written in another way: {attributes[:80]}")


def _iota(text: str) -> np.ndarray:
    """Return the flat device numbers that "[8,128]T(1,0)" means."""
    dims, _, order = text.partition("T")
    sizes = [int(d) for d in dims.strip("[]").split(",")]
    numbers = np.arange(math.prod(sizes)).reshape(sizes)
    if order:
        numbers = numbers.transpose([int(d) for d in order.strip("()").split(",")])
    return numbers.ravel()


def _mesh_groups(sizes: str, devices: str, named: str) -> np.ndarray:
    """Return the groups of "mesh['a'=128,'b'=8], device_ids=([128,8]T(1,0)) {'b'}".

    A named axis may be a part of a mesh axis, "'a':(before)size": the part of this size that comes
    after `before` parts.
    """
    axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", sizes)}
    order = re.search(r"device_ids=\((\[[\d,]+\](?:T\([\d,]+\))?)\)", devices)
    flat = _iota(order[1]) if order else np.arange(math.prod(axes.values()))
    parts: list[int] = []
    members: list[int] = []
    wanted = {
        name: (int(before or 1), int(size or 0))
        for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", named)
    }
    for name, size in axes.items():
        before, part = wanted.get(name, (1, 1))
        part = part or size
        members += [len(parts) + 1] if name in wanted else []
        parts += [before, part, size // (before * part)]
    n = math.prod(parts[dim] for dim in members)
    return np.moveaxis(flat.reshape(parts), members, range(-len(members), 0)).reshape(-1, n)
