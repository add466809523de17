"""Charts of lines as SVG: a band from least to greatest, a mean through it, marks below.

A chart is drawn once for each axis that x can be (steps, tokens, hours), and a switch of HTML shows
one of them. Its labels are HTML over a stretched SVG, so they have one size on any width of screen.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence

import numpy as np

from gpt3jax.page import bars, decimation, elements, scales

Html = elements.Html
tag = elements.tag

_WIDTH, _HEIGHT = 6000, 2000  # of the SVG's own grid: whole numbers are a tenth of a pixel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Axis:
    """What x can be; series and marks have a value for the key of each."""

    key: str
    name: str


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Series:
    """One line, or dots joined by a thin line, of a chart."""

    name: str
    color: int
    xs: Mapping[str, decimation.Array]
    """By axis. Series that share this very object share their x values in the page."""
    values: decimation.Columns
    dots: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mark:
    """An event at a place of each axis."""

    kind: str
    xs: Mapping[str, float]
    text: str
    across: bool = False
    """Draw a line through the charts; else a tick in the lane of its kind, below them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart: its series, and the stretch of each axis that it shows."""

    title: str
    unit: str
    series: Sequence[Series]
    has_key: bool = True
    """Name the series, if there are several."""
    stretch: Mapping[str, tuple[float, float]]
    log: bool = False
    from_zero: bool = False
    """Let the scale begin at 0, so that heights compare."""
    close_up: bool = False
    """Fit the scale to where most values are, and say what is beyond it."""


class Sheet:
    """Charts over the same axes, with the same marks; collects the values that the cursor shows."""

    def __init__(self, axes: Sequence[Axis], marks: Sequence[Mark]) -> None:
        """Know axes and marks; the kinds of marks have lanes in the order of their first mark."""
        self._axes, self._marks = axes, marks
        self._kinds = list(dict.fromkeys(mark.kind for mark in marks))
        self._lanes = list(dict.fromkeys(mark.kind for mark in marks if not mark.across))
        self._tables: list[Mapping[str, decimation.Array]] = []
        self._charts: list[dict[str, object]] = []

    def draw(self, charts: Sequence[Chart]) -> Html:
        """Return the charts with the switch of their axes, the key of the marks, and the data."""
        drawn = [self._figure(chart) for chart in charts]
        return tag(
            "div", *self._switch(), self._key(), tag("div", *drawn, class_="charts"),
            self._data(), class_="sheet",
        )  # fmt: skip

    def _switch(self) -> list[Html]:
        parts: list[Html] = []
        for i, axis in enumerate(self._axes):
            ident = f"axis{i}"
            parts.append(tag("input", type="radio", name="axis", id=ident, checked=i == 0))
            parts.append(tag("label", axis.name, for_=ident))
        return parts if len(self._axes) > 1 else []

    def _key(self) -> Html:
        marks = [tag("span", tag("i", class_=_mark_class(kind)), kind) for kind in self._kinds]
        return tag("p", *marks, class_="key marks")

    def _figure(self, chart: Chart) -> Html:
        number = len(self._charts)
        self._charts.append({"series": [self._values(series) for series in chart.series]})
        named = chart.series if chart.has_key and len(chart.series) > 1 else ()
        keys = [bars.key(series.name, bars.color_class(series.color)) for series in named]
        caption = tag("figcaption", tag("b", chart.title), " ", tag("small", chart.unit), *keys)
        y, beyond = _scale(chart)
        if y is None:
            return tag("figure", caption, tag("p", "no value yet", class_="note"))
        plots = (self._plot(chart, y, i, number) for i in range(len(self._axes)))
        remark = [tag("p", beyond, class_="note")] if beyond else []
        return tag("figure", caption, *plots, *remark)

    def _plot(self, chart: Chart, y: scales.Scale, i: int, number: int) -> Html:
        key = self._axes[i].key
        low, high = chart.stretch[key]
        x = scales.Scale(low=low, high=high if high > low else low + max(1.0, abs(low) / 1e3))
        marks = [mark for mark in self._marks if x.low <= mark.xs[key] <= x.high]
        y_ticks, x_ticks = y.ticks(6), x.ticks(5)
        grid = "".join(f"M0 {_down(y, tick)}h{_WIDTH}" for tick in y_ticks)
        paths = [tag("path", d=grid, class_="grid"), *_lines(marks, x, key)]
        for series in chart.series:
            paths += _drawn(series, x, y, key)
        canvas = tag("div", _svg(_HEIGHT, *paths), tag("i", class_="cursor"), class_="canvas")
        lanes = [_lane([m for m in marks if m.kind == kind], kind, x, key) for kind in self._lanes]
        return tag(
            "div", tag("div", *_labels(y, y_ticks, "bottom"), class_="y"), canvas,
            tag("div", *lanes, class_="lanes"),
            tag("div", *_labels(x, x_ticks, "left"), class_="x"),
            class_=f"plot x{i}", data_chart=number, data_axis=key,
            data_low=f"{x.low:.9g}", data_high=f"{x.high:.9g}",
        )  # fmt: skip

    def _values(self, series: Series) -> dict[str, object]:
        known = [i for i, table in enumerate(self._tables) if table is series.xs]
        if not known:
            self._tables.append(series.xs)
        values = series.values
        spread = not np.array_equal(values.low, values.high, equal_nan=True)
        band = {"low": _rounded(values.low), "high": _rounded(values.high)} if spread else {}
        return {
            "name": series.name, "color": bars.color_class(series.color),
            "table": known[0] if known else len(self._tables) - 1,
            "mean": _rounded(values.mean), **band,
        }  # fmt: skip

    def _data(self) -> Html:
        """Return the values under the cursor as a JSON that no text can break out of."""
        content = {
            "axes": {axis.key: axis.name for axis in self._axes},
            "tables": [{k: _rounded(x, 8) for k, x in t.items()} for t in self._tables],
            "charts": self._charts,
            "marks": [
                {"kind": m.kind, "text": m.text, "class": _mark_class(m.kind)}
                | {key: round(value, 4) for key, value in m.xs.items()}
                for m in self._marks
            ],
        }
        text = json.dumps(content, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
        return tag("script", Html(text), type="application/json", class_="values")


def _scale(chart: Chart) -> tuple[scales.Scale | None, str]:
    """Return the scale of y and a remark on what it leaves out; None without any value."""
    columns = (v for s in chart.series for v in (s.values.low, s.values.high, s.values.mean))
    values = np.concatenate([*columns, np.array([])])
    known = values[np.isfinite(values)]
    if not known.size:
        return None, ""
    low, high = float(known.min()), float(known.max())
    if not chart.close_up:
        return scales.around(min(low, 0.0) if chart.from_zero else low, high, log=chart.log), ""
    middle = np.quantile(known, [0.25, 0.75])
    reach = 4 * float(middle[1] - middle[0]) or high - low
    y = scales.around(max(low, middle[0] - reach), min(high, middle[1] + reach))
    is_whole = y.low <= low and high <= y.high
    return y, "" if is_whole else f"values reach from {low:.4g} to {high:.4g}, beyond this scale"


def _rounded(values: decimation.Array, digits: int = 5) -> list[float | int | None]:
    """Return values with the digits that a reader needs; None for NaN."""
    known = [float(f"{value:.{digits}g}") if math.isfinite(value) else None for value in values]
    return [int(v) if v is not None and v == int(v) and abs(v) < 1e15 else v for v in known]


def _drawn(series: Series, x: scales.Scale, y: scales.Scale, key: str) -> list[Html]:
    """Return the band of a series, if it has one, and its line."""
    color, values, at = bars.color_class(series.color), series.values, series.xs[key]
    inside = np.isfinite(values.mean) & (at >= x.low) & (at <= x.high)
    across = np.array([round(_WIDTH * x.share(value)) for value in at[inside]], int)
    mean, low, high = (
        np.array([_down(y, value) for value in column[inside]], int)
        for column in (values.mean, values.low, values.high)
    )
    ends = _breaks(across, np.flatnonzero(inside))
    pieces = [np.split(column, ends) for column in (across, mean, low, high)]
    line = "".join(map(_path, pieces[0], pieces[1]))
    kind = "dots" if series.dots else "line"
    paths = [tag("path", d=line, class_=f"{kind} {color}")]
    if series.dots:
        dots = "".join(f"M{a} {m}h0" for a, m in zip(across, mean, strict=True))
        paths.append(tag("path", d=dots, class_=f"dot {color}"))
    elif not np.array_equal(low, high):
        band = "".join(
            _path(np.concatenate([a, a[::-1]]), np.concatenate([top, bottom[::-1]])) + "z"
            for a, _, bottom, top in zip(*pieces, strict=True)
        )
        paths.insert(0, tag("path", d=band, class_=f"band {color}"))
    return paths


def _breaks(across: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return where a line breaks: at a value that is not finite, and at a pause of the run."""
    gaps = np.diff(across)
    pause = max(_WIDTH / 100, 10 * float(np.median(gaps))) if len(gaps) else 0.0
    return np.flatnonzero((np.diff(columns) > 1) | (gaps > pause)) + 1


def _path(across: np.ndarray, down: np.ndarray) -> str:
    """Return a path in relative whole numbers, which are short."""
    if not len(across):
        return ""
    steps = zip(np.diff(across).tolist(), np.diff(down).tolist(), strict=True)
    rest = " ".join(f"{dx} {dy}" for dx, dy in steps) or "0 0"
    return f"M{across[0]} {down[0]}l{rest}"


def _down(y: scales.Scale, value: float) -> int:
    return round(_HEIGHT * (1 - min(max(y.share(value), 0.0), 1.0)))


def _lines(marks: Sequence[Mark], x: scales.Scale, key: str) -> list[Html]:
    """Return the marks that go through the whole chart, a path for each kind."""
    paths: dict[str, set[int]] = {}
    for mark in marks:
        if mark.across:
            paths.setdefault(mark.kind, set()).add(_place(x, mark.xs[key]))
    return [
        tag(
            "path",
            d="".join(f"M{at} 0v{_HEIGHT}" for at in sorted(places)),
            class_=f"across {_mark_class(kind)}",
        )
        for kind, places in paths.items()
    ]


def _lane(marks: Sequence[Mark], kind: str, x: scales.Scale, key: str) -> Html:
    """Return the marks of a kind as ticks in a lane below a chart."""
    places = sorted({_place(x, mark.xs[key]) for mark in marks})
    ticks = "".join(f"M{at} 0v10" for at in places)
    return _svg(10, tag("path", d=ticks, class_=f"tick {_mark_class(kind)}"))


def _place(x: scales.Scale, value: float) -> int:
    return round(_WIDTH * x.share(value) / 10) * 10  # whole pixels: marks side by side are one


def _mark_class(kind: str) -> str:
    return "mark-" + kind.replace(" ", "-")


def _svg(height: int, *content: Html) -> Html:
    box = f"0 0 {_WIDTH} {height}"
    return tag("svg", *content, viewBox=box, preserveAspectRatio="none", aria_hidden="true")


def _labels(scale: scales.Scale, ticks: Sequence[float], side: str) -> list[Html]:
    return [
        tag("span", scales.short(tick), style=f"{side}:{scale.share(tick):.2%}") for tick in ticks
    ]
