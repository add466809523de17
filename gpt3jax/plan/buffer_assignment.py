"""The largest temporary arrays of a compiled program, with the source line that makes each.

Reads XLA's report on buffers (`--xla_dump_to`), and the tables of stack frames at the start of an
HLO text.
"""

import dataclasses
import re

from gpt3jax.plan import hlo

_TEMPORARIES = re.compile(
    r"^allocation \d+: size \d+,.* preallocated-temp:\n((?: value: .*\n)*)", re.M
)
_VALUE = re.compile(
    r"^ value: <\d+ ([\w.\-]+)(?:\{[\d,]*\})? @\d+> \(size=(\d+),offset=(\d+)\): (.*)$", re.M
)


@dataclasses.dataclass(frozen=True)
class Buffer:
    """The memory of an instruction's result; other results may use it before and after."""

    n_bytes: int
    shape: str
    operation: str
    """Its place in the traced function, as "while/body/checkpoint/add"."""
    source: str
    """File and line in this package that the instruction comes from, "" if none."""


def largest(assignment: str, text: str, n: int = 10) -> list[Buffer]:
    """Return the n largest that do not share memory, from XLA's report and the HLO text."""
    program, frames = hlo.parse(text), _Frames(text)
    by_name = {part.name: part for body in program.computations.values() for part in body}
    match = _TEMPORARIES.search(assignment)
    values = _VALUE.findall(match[1]) if match else []
    buffers, ranges = list[Buffer](), list[tuple[int, int]]()
    for name, size, offset, shape in sorted(values, key=lambda value: -int(value[1])):
        start, end = int(offset), int(offset) + int(size)
        if name not in by_name or any(start < b and a < end for a, b in ranges):
            continue
        ranges.append((start, end))
        instruction = by_name[name]
        match = re.search(r'op_name="([^"]*)"', instruction.attributes)
        operation = match[1] if match else instruction.op
        shape = re.sub(r"\{[^}]*\}", "", shape)
        source = frames.source(instruction.attributes)
        buffers.append(Buffer(int(size), shape, operation, source))
        if len(buffers) == n:
            break
    return buffers


def _of_package(path: str) -> str:
    """Return the path of a file of this package as "gpt3jax/...", "" for other packages.

    A folder named gpt3jax may hold a virtual environment with all other packages.
    """
    _, separator, installed = path.rpartition("-packages/")
    if separator:
        return installed if installed.startswith("gpt3jax/") else ""
    _, separator, file = path.rpartition("/gpt3jax/")
    return f"gpt3jax/{file}" if separator else ""


class _Frames:
    """The tables FileNames, FileLocations and StackFrames of an HLO text."""

    def __init__(self, text: str):
        head = text[: text.index("\nENTRY ")]

        def rows(title: str, pattern: str) -> dict[str, tuple[str, ...]]:
            start = head.find(f"\n{title}\n") + len(title) + 2
            table = head[start : head.find("\n\n", start)]
            return {n: rest for n, *rest in re.findall(rf"^(\d+) {pattern}", table, re.M)}

        self._files = rows("FileNames", r'"(.*)"')
        self._locations = rows("FileLocations", r"\{file_name_id=(\d+) .*?\bline=(\d+)")
        self._frames = rows("StackFrames", r"\{file_location_id=(\d+) parent_frame_id=(\d+)")

    def source(self, attributes: str) -> str:
        """Return "file:line" of the innermost frame in this package."""
        match = re.search(r"stack_frame_id=(\d+)", attributes)
        number = match[1] if match else ""
        while number in self._frames:
            location, parent = self._frames[number]
            file, line = self._locations[location]
            path = _of_package(self._files[file][0])
            if path and "/sharding/" not in path:  # other rooms call it
                return f"{path}:{line}"
            number = str(int(parent) - 1)  # 1 means no parent
        return ""
