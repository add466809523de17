"""Blocks over real time, a row for each thing that took it."""

from collections.abc import Sequence

from gpt3jax.page import elements

Html = elements.Html
tag = elements.tag


def timeline(rows: Sequence[tuple[str, Html]], ticks: Sequence[tuple[float, str]]) -> Html:
    """Return rows (name, blocks) over one axis; ticks are (share of the width, name).

    Blocks are elements `i` with a class of colour, placed by `left` and `width` in percent.
    """
    names = [tag("span", name, style=f"left:{share:.2%}") for share, name in ticks]
    lines = [_row(name, tag("div", blocks, class_="track")) for name, blocks in rows]
    axis = _row("", tag("div", *names, class_="x"))
    kind = "timeline" if any(name for name, _ in rows) else "timeline nameless"
    return tag("div", *lines, axis, class_=kind)


def _row(name: str, content: Html) -> Html:
    return tag("div", tag("span", name, class_="row-name"), content, class_="row")
