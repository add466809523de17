"""The largest temporary arrays of a compiled program, with the source line that makes each.

Reads the report on buffers that XLA dumps (`--xla_dump_to`), and the tables of stack frames that an
HLO text begins with.
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
    """Memory that an instruction's result has; others may use it before and after."""

    n_bytes: int
    shape: str
    operation: str
    """Where it is in the traced function, as "while/body/checkpoint/add"."""
    source: str
    """File and line of this package that asked for it, "" if none did."""


def largest(assignment: str, text: str, n: int = 10) -> list[Buffer]:
    """Return the n largest that do not share memory, from XLA's report and the HLO text."""
    program, frames = hlo.parse(text), _Frames(text)
    by_name = {one.name: one for body in program.computations.values() for one in body}
    match = _TEMPORARIES.search(assignment)
    values = _VALUE.findall(match[1]) if match else []
    found, taken = [], list[tuple[int, int]]()
    for name, size, offset, shape in sorted(values, key=lambda value: -int(value[1])):
        start, end = int(offset), int(offset) + int(size)
        if name not in by_name or any(start < b and a < end for a, b in taken):
            continue
        taken.append((start, end))
        attributes = by_name[name].attributes
        told = re.search(r'op_name="([^"]*)"', attributes)
        operation = told[1] if told else by_name[name].op
        shape = re.sub(r"\{[^}]*\}", "", shape)
        found.append(Buffer(int(size), shape, operation, frames.source(attributes)))
        if len(found) == n:
            break
    return found


def _of_package(path: str) -> str:
    """Return a file of this package as "gpt3jax/...", "" of another one's.

    A folder named gpt3jax may hold an environment with all other packages.
    """
    _, environment, installed = path.rpartition("-packages/")
    if environment:
        return installed if installed.startswith("gpt3jax/") else ""
    _, here, file = path.rpartition("/gpt3jax/")
    return f"gpt3jax/{file}" if here else ""


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
            if path and "/sharding/" not in path:  # which others call
                return f"{path}:{line}"
            number = str(int(parent) - 1)  # 1: it has none
        return ""
