"""HTML as a value of its own, so that no text gets into a page without being escaped."""

import html
from collections.abc import Iterable

_EMPTY = ("input", "meta")  # elements that have no end


class Html(str):
    """HTML; any other `str` is text, and is escaped where it becomes part of a page."""

    __slots__ = ()


def tag(name: str, /, *children: str, **attributes: str | int | bool) -> Html:
    """Return an element. `class_` stands for `class`, `data_axis` for `data-axis`.

    An attribute that is False is left out; one that is True has no value.
    """
    marks = "".join(
        f" {key.rstrip('_').replace('_', '-')}"
        + ("" if value is True else f'="{html.escape(str(value))}"')
        for key, value in attributes.items()
        if value is not False
    )
    end = "" if name in _EMPTY else f"</{name}>"
    return Html(f"<{name}{marks}>{join(children)}{end}")


def join(children: Iterable[str], between: str = "") -> Html:
    """Return elements and texts one after the other."""
    return Html(between.join(map(_escaped, children)))


def _escaped(child: str) -> str:
    return child if isinstance(child, Html) else html.escape(child)
