"""A run's history as charts: how accuracy, loss and size went, and what the method noted on its way."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape
from typing import Any

from prunus.core.charts import Series, heat_map, line_chart, percent
from prunus.core.display import human
from prunus.core.report import Report

Rows = list[dict[str, Any]]
_COUNTERS = frozenset({"round", "step", "index"})
"""What methods number their notes by: the charts' x axis already."""
_MOST_LINES = 8
"""In one chart."""


def progress_charts(report: Report) -> list[str]:
    """Accuracy, loss and MACs over the run's time."""
    times, unit = _times(report.history)
    whole = (0.0, max(times.values(), default=0.0))
    accuracy = [*_measured(report.history, times, "accuracy"), _tested(report, times)]
    drawn = [
        line_chart("Accuracy", accuracy, unit, percent, whole),
        line_chart("Loss (cross entropy)", _measured(report.history, times, "loss"), unit, x_range=whole),
        line_chart("MACs of one image", _sizes(report, times), unit, human, whole),
    ]
    return [chart for chart in drawn if chart]


def note_sections(history: Rows) -> list[tuple[str, list[str]]]:
    """For every kind of note that came more than once: its name, and its numbers over time as charts."""
    kinds: dict[str, Rows] = {}
    for row in history:
        if row.get("values"):
            kinds.setdefault(str(row["note"]), []).append(row["values"])
    sections = []
    for kind, notes in kinds.items():
        charts = [chart for chart in _of_kind(notes) if chart] if len(notes) > 1 else []
        if charts:
            sections.append((kind, charts))
    return sections


def single_notes(history: Rows) -> list[tuple[str, str]]:
    """(name, figures) of the notes that came once."""
    kinds: dict[str, Rows] = {}
    for row in history:
        if row.get("values"):
            kinds.setdefault(str(row["note"]), []).append(row["values"])
    return [
        (kind, ", ".join(f"{key} {_word(value)}" for key, value in notes[0].items()))
        for kind, notes in kinds.items()
        if len(notes) == 1
    ]


def _word(value: Any) -> str:
    if isinstance(value, list):
        return f"({len(value)} numbers)"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _times(history: Rows) -> tuple[dict[int, float], str]:
    """For every directive the time at its end, and the unit as an axis label."""
    total, ends = 0.0, {}
    for row in history:
        total += row["seconds"] if _number(row.get("seconds")) else 0.0
        ends[int(row["index"])] = total
    scale, unit = next((s, u) for s, u, most in _UNITS if total <= most)
    return {index: end / scale for index, end in ends.items()}, f"time of the run, {unit}"


_UNITS = ((1.0, "seconds", 300.0), (60.0, "minutes", 3 * 3600.0), (3600.0, "hours", math.inf))


def _measured(history: Rows, times: dict[int, float], key: str) -> list[Series]:
    """Training and held-out figures, which are not the same thing; those of teachers are left out."""
    series = []
    for kind, name in (("Evaluate", "held-out"), ("Train", "training")):
        points = [
            (times[int(row["index"])], float(row[key]))
            for row in history
            if row["kind"] == kind and _number(row.get(key)) and row.get("model") is None
        ]
        series.append(Series(name, [x for x, _ in points], [y for _, y in points]))
    return series


def _tested(report: Report, times: dict[int, float]) -> Series:
    """The dense model's test accuracy when it was ready, and the smaller model's at the end."""
    points = []
    ready = [times[int(row["index"])] for row in report.history if row.get("name") == "dense"]
    if ready and report.dense.accuracy is not None:
        points.append((ready[0], report.dense.accuracy))
    if times and report.pruned.accuracy is not None:
        points.append((max(times.values()), report.pruned.accuracy))
    return Series("test", [x for x, _ in points], [y for _, y in points])


def _sizes(report: Report, times: dict[int, float]) -> list[Series]:
    """The model's MACs from the dense model on, and the target where it is one of MACs."""
    points = [(0.0, float(report.dense.macs))]
    for row in report.history:
        if row["kind"] in ("Remove", "Grow", "Merge") and _number(row.get("macs")):
            points.append((times[int(row["index"])], float(row["macs"])))
    if len(points) == 1:
        return []
    end = max(times.values(), default=0.0)
    points.append((end, points[-1][1]))
    series = [Series("model", [x for x, _ in points], [y for _, y in points], "steps")]
    limit = report.limits.get("macs")
    if limit is not None:
        series.append(Series("target", [0.0, end], [limit, limit], "dashed"))
    return series


def _of_kind(notes: Rows) -> Iterable[str]:
    """Numbers of one name are a line; `loss/a`, `loss/b` share a chart; lists are maps or spreads."""
    keys = dict.fromkeys(key for note in notes for key in note if key not in _COUNTERS)
    lines: dict[str, list[Series]] = {}
    maps: dict[str, list[tuple[str, list[float]]]] = {}
    for key in keys:
        title, separator, rest = key.partition("/")
        found = [(float(i + 1), note[key]) for i, note in enumerate(notes) if key in note]
        numbers = [(i, float(v)) for i, v in found if _number(v)]
        lists = [(i, [float(x) for x in v]) for i, v in found if _numbers(v)]
        if numbers:
            line = Series(rest or key, [i for i, _ in numbers], [v for _, v in numbers])
            lines.setdefault(title, []).append(line)
        if lists and separator and all(0 <= x <= 1 for _, values in lists for x in values):
            maps.setdefault(title, []).append((rest, [sum(v) / len(v) for _, v in lists]))
        elif lists:
            lines.setdefault(title, []).extend(_spread(lists, rest))
    for title, series in lines.items():
        if any(len(one.x) > 1 for one in series):
            yield line_chart(title, series if len(series) <= _MOST_LINES else _summed_up(series), "note")
    for title, rows in maps.items():
        yield heat_map(f"{title}, mean of each group", rows, "note")


def _summed_up(series: list[Series]) -> list[Series]:
    """Lines that are too many for one chart, as their spread."""
    values: dict[float, list[float]] = {}
    for one in series:
        for x, y in zip(one.x, one.y, strict=True):
            values.setdefault(x, []).append(y)
    return _spread(sorted(values.items()), f"of {len(series)},")


def _spread(lists: list[tuple[float, list[float]]], name: str) -> list[Series]:
    x = [i for i, _ in lists]
    named = f"{name} " if name else ""
    return [
        Series(f"{named}highest", x, [max(v) for _, v in lists]),
        Series(f"{named}mean", x, [sum(v) / len(v) for _, v in lists]),
        Series(f"{named}lowest", x, [min(v) for _, v in lists]),
    ]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(_number(x) for x in value)


def section(title: str, charts: Iterable[str]) -> str:
    """Charts side by side under a small heading; empty text without any."""
    inner = "".join(charts)
    return f'<h3>{escape(title)}</h3><div class="charts">{inner}</div>' if inner else ""
