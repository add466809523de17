"""Elements, tables and bars: what is text is escaped, what is a number aligns."""

import itertools
import pathlib
import re

import numpy as np
import pytest

from gpt3jax.page import bars, document, elements, tables


def test_texts_are_escaped_and_elements_are_not():
    inner = elements.tag("b", '<&">')
    assert inner == "<b>&lt;&amp;&quot;&gt;</b>"
    outer = elements.tag("p", inner, "<i>", class_='"x"', data_low="1", hidden=False, checked=True)
    assert outer == (
        '<p class="&quot;x&quot;" data-low="1" checked><b>&lt;&amp;&quot;&gt;</b>&lt;i&gt;</p>'
    )
    assert elements.join([inner, "<"], ">") == f"{inner}>&lt;"
    assert isinstance(elements.join(["<"]), elements.Html)


def lightness_and_hue(color):
    """Return a colour (#rrggbb) as CIE's L*, a*, b*."""
    parts = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    to_xyz = [[0.4339, 0.3762, 0.1899], [0.2126, 0.7152, 0.0722], [0.0177, 0.1095, 0.8728]]
    x, y, z = np.cbrt(np.array(to_xyz) @ linear)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_the_colours_of_the_palette_can_be_told_apart(theme):
    style = (pathlib.Path(bars.__file__).parent / "style.css").read_text()
    palette = re.findall(r"--c\d: (#\w{6})", style)[10 * theme :][:10]
    pairs = itertools.combinations(map(lightness_and_hue, palette), 2)
    assert min(np.linalg.norm(one - other) for one, other in pairs) > 20


def test_columns_of_numbers_align_right():
    table = tables.table(("name", "count", "mixed"), [("a", "1,234", "5"), ("b", "", "data 5")])
    assert re.findall(r'<td class="n">([^<]*)', table) == ["1,234", ""]
    assert '<th class="n">count</th>' in table and "<th>mixed</th>" in table


def test_an_empty_table_has_its_head():
    assert "<th>name</th>" in tables.table(("name",), [])


def test_a_bar_is_divided_as_its_parts_are():
    sizes = {"<steps>": 6.0, "lost": 1.0, "none": 0.0}
    bar = bars.bar(bars.colored(sizes), "{:g} s".format, free=1.0)
    assert re.findall(r"width:([\d.]+)%", bar) == ["75.000", "12.500"]
    assert "&lt;steps&gt;: 6 s" in bar and "none" not in bar and "free: 1 s" in bar
    assert bars.bar(bars.colored({}), str)  # nothing to divide


@pytest.mark.parametrize("has_charts", [True, False])
def test_a_page_needs_nothing_from_elsewhere(has_charts):
    page = document.document("<t>", [document.section("a", elements.tag("p", "b"))],
                             has_charts=has_charts)  # fmt: skip
    assert page.startswith("<!doctype html>") and "<title>&lt;t&gt;</title>" in page
    assert not re.search(r"https?:|src=|href=|url\(|@import|<link", page)
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page
    assert ("<script>" in page) == has_charts
