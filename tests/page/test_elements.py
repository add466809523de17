"""Elements, tables and bars: what is text is escaped, what is a number aligns."""

import re

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
