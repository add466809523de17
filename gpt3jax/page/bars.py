"""A whole as a bar of its parts, with a key."""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from gpt3jax.page import elements

Html = elements.Html
tag = elements.tag


class Part(NamedTuple):
    """A part of a whole."""

    name: str
    size: float
    color: str
    """One of `color_class`."""


def colored(sizes: Mapping[str, float]) -> list[Part]:
    """Return parts in the order given, with the colours of the palette in turn."""
    return [Part(name, size, color_class(i)) for i, (name, size) in enumerate(sizes.items())]


def bar(parts: Iterable[Part], shown: Callable[[float], str], free: float = 0.0) -> Html:
    """Return a bar of parts in the order given, and what is free; `shown` writes a size."""
    drawn = [part for part in parts if part.size > 0]
    whole = sum(part.size for part in drawn) + max(free, 0.0)
    labels = [f"{part.name}: {shown(part.size)}" for part in drawn]
    blocks = [
        tag("i", class_=part.color, title=label, style=f"width:{part.size / whole:.3%}")
        for part, label in zip(drawn, labels, strict=True)
    ]
    keys = [key(label, part.color) for part, label in zip(drawn, labels, strict=True)]
    if free > 0:
        keys.append(key(f"free: {shown(free)}", "free"))
    return tag("div", tag("div", *blocks, class_="bar"), tag("p", *keys, class_="key"))


def key(label: str, color: str) -> Html:
    """Return an entry of a key: a patch of colour and its name."""
    return tag("span", tag("i", class_=color), label)


def color_class(number: int) -> str:
    """Return the class of a colour of the palette, which has ten and begins again."""
    return f"c{number % 10}"
