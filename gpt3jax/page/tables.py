"""Tables, and figures that open a page."""

import re
from collections.abc import Iterable, Sequence

from gpt3jax.page import elements

Html = elements.Html
tag = elements.tag
_NUMBER = re.compile(r"[-+]?[\d.,]+(e[-+]?\d+)? ?(%|[A-Za-z]{0,3})")  # 1,234 or 5.6e-07 or 7 GB
Tile = tuple[str, str, str]
_LONG = 40  # longer cells may break into lines


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> Html:
    """Return a table, which scrolls sideways where it is too wide; columns of numbers align right.

    Without a head, the first column names the rows.
    """
    rows = [tuple(row) for row in body]
    numbers = [_are_numbers(column) for column in zip(*rows, strict=True)]

    def line(kind: str, row: Iterable[str]) -> Html:
        cells = zip(row, numbers or [False] * len(head), strict=True)
        kinds = ((cell, "n" if is_n else len(cell) > _LONG and "long") for cell, is_n in cells)
        return tag("tr", *(tag(kind, cell, class_=class_) for cell, class_ in kinds))

    lines = [line("td", row) for row in rows]
    top = [tag("thead", line("th", head))] if head else []
    kind = "headed" if head else "named"
    whole = tag("table", *top, tag("tbody", elements.join(lines, "\n")), class_=kind)
    return tag("div", whole, class_="scroll")


def _are_numbers(column: Sequence[str]) -> bool:
    cells = [cell for cell in column if cell]
    return bool(cells) and all(map(_NUMBER.fullmatch, cells))


def tiles(figures: Iterable[Tile]) -> Html:
    """Return figures as tiles: (name, value, remark) each."""
    shown = (
        tag("div", tag("p", name), tag("strong", value), tag("small", remark), class_="tile")
        for name, value, remark in figures
    )
    return tag("div", *shown, class_="tiles")
