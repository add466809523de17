"""The charts of runs: what is drawn over steps, tokens or hours, from the metrics of each."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from gpt3jax.page import bars, charts, decimation, document, elements
from gpt3jax.report import marks, positions, run_folder

_N_COLUMNS = 600  # of one run's charts: about a column for each pixel
_N_COLUMNS_OF_ALL = 1000  # of several runs together, so that the page stays small

_UNTIMED = (
    "Entries of an earlier version have no time: on the axis of time they are where the times of "
    "their steps put them, without pauses."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Curve:
    """A chart of one field of the entries of steps."""

    title: str
    field: str
    unit: str = ""
    log_from: float = np.inf
    """The scale is logarithmic where the greatest value is so many times the least."""
    factor: float = 1.0
    from_zero: bool = False
    close_up: bool = False
    only_if_changing: bool = False


_LOSS = _Curve(title="Loss", field="interval_loss", unit="nats a token", log_from=3.0)
_CURVES = (
    _Curve(title="Learning rate", field="learning_rate"),
    _Curve(title="Gradient norm", field="grad_norm", unit="of a logged step", log_from=20.0),
    _Curve(title="Throughput", field="tokens_per_second", unit="tokens/s", from_zero=True),
    _Curve(title="MFU", field="mfu", unit="% of the peak", factor=100.0, from_zero=True),
    _Curve(title="TFLOP/s", field="tflops_per_device", unit="of a device", from_zero=True),
    _Curve(title="Step time", field="step_time", unit="s", log_from=20.0),
    _Curve(title="Loss scale", field="loss_scale", log_from=1.0, only_if_changing=True),
    _Curve(title="Batch size", field="batch_size", unit="sequences", only_if_changing=True),
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Cut:
    """Some rows of a table as columns of a chart."""

    rows: np.ndarray
    bins: decimation.Bins
    xs: dict[str, decimation.Array]


class _Drawn:
    """A run on its way into charts."""

    def __init__(self, run: run_folder.Run, label: str, number: int, n_columns: int) -> None:
        """Know a run; the label of one alone is empty."""
        self.run, self.label, self.number = run, label, number
        self.places = positions.Positions(run)
        tables = (run.metrics.steps, run.metrics.evaluations)
        self.last_step = max((float(t["step"][-1]) for t in tables if len(t)), default=0.0)
        self._n_columns = n_columns
        self._cuts: dict[float, _Cut] = {}

    def cut_of_entries(self, since: float) -> _Cut:
        """Return the entries from a step on, cut into columns; the same object at each call."""
        if since not in self._cuts:
            step = self.run.metrics.steps["step"]
            self._cuts[since] = self.cut(step, step >= since)
        return self._cuts[since]

    def cut(self, step: decimation.Array, rows: np.ndarray) -> _Cut:
        """Return some rows of a table, whose steps these are, cut into columns."""
        bins = decimation.Bins(step[rows], self._n_columns)
        places = self.places.at(step[rows])
        # The place of a column is that of its last entry: it is never between two starts.
        xs = {key: bins.of(place).high for key, place in places.items()}
        return _Cut(rows=rows, bins=bins, xs=xs)

    def has(self, field: str) -> bool:
        """Return whether any entry has a value of a field."""
        return len(self.run.metrics.steps.known(field)) > 0

    def changes(self, field: str) -> bool:
        """Return whether a field has several values."""
        known = self.run.metrics.steps.known(field)
        return bool((known != known[0]).any())


def draw(runs: Sequence[run_folder.Run], labels: Sequence[str]) -> elements.Html:
    """Return the charts of runs, or a remark where there is no entry yet."""
    several = len(runs) > 1
    n_columns = min(_N_COLUMNS, max(100, _N_COLUMNS_OF_ALL // len(runs)))
    drawn = [
        _Drawn(run, label if several else "", i, n_columns)
        for i, (run, label) in enumerate(zip(runs, labels, strict=True))
    ]
    with_entries = [d for d in drawn if len(d.run.metrics.steps)]
    if not with_entries:
        return elements.tag("p", "No step is logged yet.", class_="note")
    shared = positions.common_axes([d.places for d in with_entries])
    axes = [charts.Axis(key=key, name=name) for key, name in shared]
    events = [
        mark
        for d in with_entries
        for mark in marks.of(d.run, d.places, f"{d.label}: " if several else "")
    ]
    drawn_charts = _charts(with_entries, [axis.key for axis in axes])
    keys_of_runs = [bars.key(d.label, bars.color_class(d.number)) for d in with_entries if several]
    key = [elements.tag("p", *keys_of_runs, class_="key")] if several else []
    untimed = not all(np.isfinite(d.run.metrics.steps["time"]).all() for d in with_entries)
    note = [document.note(_UNTIMED)] if untimed else []
    return elements.join([*key, charts.Sheet(axes, events).draw(drawn_charts), *note])


def _charts(drawn: Sequence[_Drawn], keys: Sequence[str]) -> list[charts.Chart]:
    whole = _stretch(drawn, keys, 0.0)
    found = [_loss_chart(drawn, whole, since=0.0, title=_LOSS.title)]
    last_step = max(d.last_step for d in drawn)
    if sum(len(d.run.metrics.steps) for d in drawn) >= 20:
        half = _stretch(drawn, keys, last_step / 2)
        found.append(_loss_chart(drawn, half, since=last_step / 2, title="Loss, last half"))
    for curve in _CURVES:
        if curve.field == "tflops_per_device" and any(d.has("mfu") for d in drawn):
            continue  # the MFU says the same
        shown = [d for d in drawn if d.has(curve.field)]
        if shown and (not curve.only_if_changing or any(d.changes(curve.field) for d in shown)):
            series = [_series(d, curve, 0.0) for d in shown]
            found.append(_chart(curve, series, whole, curve.title))
    return found


def _stretch(
    drawn: Sequence[_Drawn], keys: Sequence[str], since: float
) -> dict[str, tuple[float, float]]:
    """Return the stretch of each axis that holds all runs from a step on."""
    stretch = {}
    for key in keys:
        lows, highs = [], []
        for d in drawn:
            if d.last_step >= since:
                place = d.places.at(np.array([since, d.last_step]))[key]
                lows.append(place[0] if since else 0.0)
                highs.append(place[1])
        stretch[key] = float(min(lows)), float(max(highs))
    return stretch


def _loss_chart(
    drawn: Sequence[_Drawn], stretch: dict[str, tuple[float, float]], since: float, title: str
) -> charts.Chart:
    series: list[charts.Series] = []
    for d in drawn:
        field = _LOSS.field if d.has(_LOSS.field) else "loss"
        series.append(_series(d, dataclasses.replace(_LOSS, field=field, title="training"), since))
        series += _evaluations(d, since)
    curve = _LOSS if not since else dataclasses.replace(_LOSS, log_from=np.inf, close_up=True)
    chart = _chart(curve, series, stretch, title)
    if any(d.label for d in drawn) and any(s.dots for s in series):
        return dataclasses.replace(chart, unit=f"{chart.unit}; dots: validation, test")
    return dataclasses.replace(chart, has_key=not any(d.label for d in drawn))


def _chart(
    curve: _Curve,
    series: list[charts.Series],
    stretch: dict[str, tuple[float, float]],
    title: str,
) -> charts.Chart:
    ends = np.concatenate([v for s in series for v in (s.values.low, s.values.high)])
    known = ends[np.isfinite(ends)]
    log = bool(known.size) and known.min() > 0 and known.max() / known.min() > curve.log_from
    unit = f"{curve.unit}, log scale".lstrip(", ") if log else curve.unit
    return charts.Chart(
        title=title,
        unit=unit,
        series=series,
        has_key=False,
        stretch=stretch,
        log=log,
        from_zero=curve.from_zero,
        close_up=curve.close_up,
    )


def _series(drawn: _Drawn, curve: _Curve, since: float) -> charts.Series:
    cut = drawn.cut_of_entries(since)
    return charts.Series(
        name=drawn.label or curve.title,
        color=drawn.number,
        xs=cut.xs,
        values=cut.bins.of(drawn.run.metrics.steps[curve.field][cut.rows] * curve.factor),
    )


def _evaluations(drawn: _Drawn, since: float) -> list[charts.Series]:
    table, found = drawn.run.metrics.evaluations, []
    for i, split in enumerate(("validation", "test")):
        losses = table[f"{split}_loss"]
        cut = drawn.cut(table["step"], np.isfinite(losses) & (table["step"] >= since))
        if cut.rows.any():
            found.append(
                charts.Series(
                    name=f"{drawn.label}, {split}" if drawn.label else split,
                    color=drawn.number if drawn.label else 1 + i,
                    xs=cut.xs,
                    values=cut.bins.of(losses[cut.rows]),
                    dots=True,
                )
            )
    return found
