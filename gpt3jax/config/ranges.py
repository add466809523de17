"""Ranges of the numbers in a config or in a command's options, and how counts are read.

A range stands beside its field: `n_layers: Annotated[int, Range(1, 2**16)]`. Its upper bound is
what the code can handle, not what is sensible. Imports no JAX.
"""

import dataclasses
import math
import typing
from collections.abc import Iterator
from typing import Annotated, Literal, TypeAlias

import tyro

INT32 = 2**31 - 1  # numbers of steps, samples and tokens are int32 on the devices


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers from `least` to `most`, both included."""

    least: float
    most: float
    below: str = ""
    """Advice for a message about a number below the range."""
    excluded: float | None = None
    """A number from `least` to `most` that is not allowed."""

    def problem(self, value: object) -> str:
        """Return what is wrong with a value and what to do; "" if it is in the range."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return f"is a {type(value).__name__}: give a number"
        if self.least <= value <= self.most and value != self.excluded:  # NaN never is
            return ""
        fix = self.below if value < self.least or value == self.excluded else ""
        return f"must be {self}: {fix or 'choose a value there'}"

    def __str__(self) -> str:
        """Return the range in words."""
        low = "above" if self.excluded == self.least else "at least"
        high = "below" if self.excluded == self.most else "at most"
        bounds = f"{low} {self.least:.10g} and {high} {self.most:.10g}"
        inside = self.excluded not in (None, self.least, self.most)
        return f"{bounds}, and not {self.excluded:g}" if inside else bounds


def positive(below: str) -> Range:
    """Return the range of positive int32 numbers, with advice for a number below."""
    return Range(1, INT32, below)


_MULTIPLES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def read_count(text: str) -> int:
    """Return a count such as "300000" or "2.4B"; K, M, B, T are 10^3 ... 10^12.

    Raises:
        ValueError: the text is not a count.
    """
    multiple = _MULTIPLES.get(text[-1:].upper())
    try:
        count = float(text) if multiple is None else float(text[:-1]) * multiple  # as Megatron
        if multiple is None and not count.is_integer():
            raise ValueError
        return int(count)
    except (ValueError, OverflowError):  # OverflowError: int of an infinity
        raise ValueError(f"'{text}' is not a count such as 300000, 300K or 2.4B") from None


READS_COUNTS: tyro.constructors.PrimitiveConstructorSpec[int] = (
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT[K|M|B|T]",
        instance_from_str=lambda words: read_count(words[0]),
        is_instance=lambda value: isinstance(value, int),
        str_from_instance=lambda value: [str(value)],
    )
)

# A field of the layout: a number or a switch, or `auto` until the layout is chosen. Whatever
# calculates with it gets a config that was laid out, so for the type checker `auto` is not there.
if typing.TYPE_CHECKING:
    IntOrAuto: TypeAlias = int
    BoolOrAuto: TypeAlias = bool
else:
    IntOrAuto = int | Literal["auto"]
    BoolOrAuto = bool | Literal["auto"]

Count = Annotated[int, Range(0, INT32)]
Positive = Annotated[int, Range(1, INT32)]
Samples = Annotated[int, Range(0, INT32), READS_COUNTS]
Tokens = Annotated[int, Range(0, 10**15), READS_COUNTS]
Seed = Annotated[int, Range(0, 2**32 - 1)]  # of NumPy's RandomState
Probability = Annotated[float, Range(0, 1, excluded=1)]
Axis = Annotated[
    IntOrAuto, Range(-1, 2**20, "give at least 1, or -1 for the rest of the devices", excluded=0)
]


def numbers(tree: object, prefix: str = "") -> Iterator[tuple[str, object, Range]]:
    """Yield (name, value, range) of each number in a tree of dataclasses and their tuples.

    The name is that of the option, `group.field`. Fields that are None or auto are left out.
    """
    for name, hint in typing.get_type_hints(type(tree), include_extras=True).items():
        value = getattr(tree, name)
        if dataclasses.is_dataclass(value):
            is_flat = tyro.conf.OmitArgPrefixes in typing.get_args(hint)
            yield from numbers(value, prefix if is_flat else f"{prefix}{name}.")
            continue
        bounds = range_of(hint)
        for number in value if isinstance(value, tuple) else (value,):
            if bounds is not None and number not in (None, "auto"):
                yield prefix + name, number, bounds


def range_of(hint: object) -> Range | None:
    """Return the range inside a field's type: a number, a tuple of numbers, or a number or None."""
    if isinstance(hint, Range):
        return hint
    parts = (range_of(part) for part in typing.get_args(hint))
    return next((bounds for bounds in parts if bounds is not None), None)


def divisors_of(n: int) -> list[int]:
    """Return the divisors of n in ascending order."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def divisors(n: int) -> str:
    """Return the divisors of n as text for a message, at most 16 of them."""
    texts = [str(d) for d in divisors_of(n)]
    return ", ".join(texts[:16]) + (", ..." if len(texts) > 16 else "")
