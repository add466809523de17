"""A whole page: head, style and body in one text."""

import pathlib
from collections.abc import Iterable

from gpt3jax.page import elements

Html = elements.Html
tag = elements.tag

_FOLDER = pathlib.Path(__file__).parent


def document(title: str, body: Iterable[Html], *, has_charts: bool = False) -> str:
    """Return a page; with charts, the script that shows values under the cursor comes along."""
    style = Html((_FOLDER / "style.css").read_text(encoding="utf-8"))
    script = Html((_FOLDER / "hover.js").read_text(encoding="utf-8"))
    head = (
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", style),
    )
    parts = [*body, *([tag("script", script)] if has_charts else [])]
    content = tag("head", *head) + "\n" + tag("body", elements.join(parts, "\n"))
    return f'<!doctype html>\n<html lang="en">{content}</html>\n'


def header(title: str, *below: Html) -> Html:
    """Return the head of a page: the project's name, a title, and what comes below it."""
    name = tag("p", "gpt3jax", class_="project")
    return tag("header", name, tag("h1", title), *below)


def section(title: str, *content: Html) -> Html:
    """Return a part of a page under a heading."""
    return tag("section", tag("h2", title), *content)


def note(text: str) -> Html:
    """Return a small remark."""
    return tag("p", text, class_="note")


def warning(text: str) -> Html:
    """Return a remark that must be seen."""
    return tag("p", text, class_="warning")
