"""Charts: no peak gets lost, lines break where nothing is known, text stays text."""

import json
import re

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt3jax.page import charts, decimation, scales

values = st.floats(allow_nan=True, allow_infinity=True)


@settings(max_examples=100, deadline=None)
@given(st.lists(values, min_size=1, max_size=300), st.integers(1, 50), st.randoms())
def test_columns_keep_the_least_and_the_greatest(numbers, n_columns, random):
    x = np.cumsum([random.choice((1, 1, 1, 40)) for _ in numbers]).astype(float)
    points = np.array(numbers)
    bins = decimation.Bins(x, n_columns)
    columns, places = bins.of(points), bins.of(x)
    assert len(columns.mean) <= max(n_columns, 1)
    known = points[np.isfinite(points)]
    if len(known):
        assert np.nanmin(columns.low) == known.min() and np.nanmax(columns.high) == known.max()
    for i in range(len(columns.mean)):
        inside = points[(x >= places.low[i]) & (x <= places.high[i])]
        inside = inside[np.isfinite(inside)]
        assert np.isnan(columns.mean[i]) == (len(inside) == 0)
        if len(inside):
            assert (columns.low[i], columns.high[i]) == (inside.min(), inside.max())
            assert columns.low[i] <= columns.mean[i] <= columns.high[i]


def chart_of(xs, numbers, n_columns=600, marks=(), **fields):
    bins = decimation.Bins(xs, n_columns)
    series = charts.Series(
        name="<b>", color=0, xs={"step": bins.of(xs).high}, values=bins.of(numbers)
    )
    chart = charts.Chart(
        title="<i>", unit="", series=[series], stretch={"step": (0.0, float(xs[-1]))}, **fields
    )
    return charts.Sheet([charts.Axis(key="step", name="steps")], marks).draw([chart])


def path(page, kind):
    """Return the points of the paths of a kind, a list for each piece of the line."""
    (drawn,) = re.findall(rf'<path d="([^"]*)" class="{kind} c0">', page)
    pieces = []
    for piece in re.findall(r"M(-?\d+) (-?\d+)l([-\d ]*)", drawn):
        steps = np.array(piece[2].split(), int).reshape(-1, 2)
        pieces.append(np.cumsum([[int(piece[0]), int(piece[1])], *steps.tolist()], axis=0))
    return pieces


def test_a_spike_of_one_step_in_100_000_is_in_the_picture():
    x = np.arange(1.0, 100_001)
    losses = np.full(100_000, 2.0)
    losses[61_234] = 9.0
    page = chart_of(x, losses)
    (band,) = path(page, "band")
    (line,) = path(page, "line")
    assert len(line) == 600
    top = band[band[:, 1].argmin()]
    assert top[1] < 100 and abs(top[0] / 6000 - 0.612) < 0.003  # y counts from the top
    assert line[:, 1].min() > 1700  # the mean of its column hardly rises
    assert len(page) < 60_000


def test_a_line_breaks_where_a_value_is_not_finite_and_at_a_pause():
    x = np.arange(1.0, 41)
    losses = np.where(x == 10, np.nan, 5 - x / 20)
    assert [len(piece) for piece in path(chart_of(x, losses), "line")] == [9, 30]
    later = np.where(x > 20, x + 500, x)
    assert [len(piece) for piece in path(chart_of(later, losses), "line")] == [9, 10, 20]


def test_no_text_gets_out_of_its_place():
    mark = charts.Mark(kind="restart", xs={"step": 2.0}, text="</script><script>alert(1)")
    page = chart_of(np.arange(1.0, 4), np.ones(3), marks=[mark])
    assert "<b>" not in page.replace("<b>&lt;i&gt;</b>", "") and "<i>" not in page
    (data,) = re.findall(r"<script[^>]*>(.*?)</script>", page)
    content = json.loads(data)
    assert content["marks"][0]["text"] == mark.text
    assert content["charts"][0]["series"][0]["name"] == "<b>"


def test_values_under_the_cursor_are_those_of_the_columns():
    x = np.array([1.0, 2.0, 3.0])
    page = chart_of(x, np.array([1.23456789, np.nan, 3e-9]))
    content = json.loads(re.search(r"<script[^>]*>(.*?)</script>", page)[1])
    assert content["tables"] == [{"step": [1, 2, 3]}]
    (series,) = content["charts"][0]["series"]
    assert series["mean"] == [1.2346, None, 3e-9] and "low" not in series


def test_a_close_up_says_what_is_beyond_its_scale():
    losses = 2 + 0.01 * np.sin(np.arange(200.0))
    losses[100] = 50
    page = chart_of(np.arange(200.0), losses, close_up=True)
    assert "values reach from 1.99 to 50, beyond this scale" in page
    assert "beyond" not in chart_of(np.arange(200.0), losses)


def test_a_chart_without_a_value_says_so():
    assert "no value yet" in chart_of(np.arange(3.0), np.full(3, np.nan))


numbers = st.floats(-1e12, 1e12).filter(lambda x: x == 0 or abs(x) > 1e-12)


@settings(max_examples=200, deadline=None)
@given(numbers, numbers, st.booleans(), st.integers(3, 8))
def test_ticks_are_few_in_order_and_inside(one, other, log, at_most):
    scale = scales.around(min(one, other), max(one, other), log=log)
    ticks = scale.ticks(at_most)
    assert 1 <= len(ticks) <= at_most + 2
    assert ticks == sorted(set(ticks))
    assert all(-0.001 <= scale.share(tick) <= 1.001 for tick in ticks)
    assert 0 <= scale.share(one) <= 1


def test_ticks_are_round():
    assert scales.Scale(low=0.0, high=100_000.0).ticks(5) == [0, 20e3, 40e3, 60e3, 80e3, 100e3]
    assert scales.Scale(low=2.1, high=11.0, log=True).ticks(6) == [3, 5, 10]
    assert [scales.short(x) for x in (0, 0.002, 1e-5, 100_000, 2.5e9, -3)] == [
        "0", "0.002", "1e-05", "100K", "2.5B", "-3",
    ]  # fmt: skip


def test_moments_have_round_names():
    midnight = 1_760_054_400  # 2025-10-10 00:00 UTC
    assert scales.time_ticks(midnight, midnight + 3 * 3600, 4) == [
        (midnight + 3600 * i, f"0{i}:00") for i in range(4)
    ]
    names = [name for _, name in scales.time_ticks(midnight, midnight + 40 * 86_400, 5)]
    assert len(names) <= 5 and names[0].endswith(" Oct")
