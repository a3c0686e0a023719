"""Small charts as inline SVG text: no script, no font, no file beside it. Colours come from the page's style."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

_COLOURS = 8
"""Classes c0..c7 of the page's style."""
_MOST_DOTS = 60

Format = Callable[[float], str]


def plain(value: float) -> str:
    """A tick's number with no more digits than it needs."""
    return f"{value:.6g}"


def percent(value: float) -> str:
    return f"{100 * value:.4g}%"


@dataclass(frozen=True, slots=True)
class Series:
    """One line: y over x, both finite. `steps` holds each value until the next, `dashed` is a limit."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: Literal["line", "steps", "dashed"] = "line"


@dataclass(frozen=True, slots=True)
class _Frame:
    """From values to places in the drawing."""

    x: tuple[float, float]
    y: tuple[float, float]
    width = 380
    height = 220
    left = 58
    right = 14
    top = 12
    bottom = 40

    def across(self, x: float) -> float:
        low, high = self.x
        return self.left + (x - low) / (high - low) * (self.width - self.left - self.right)

    def down(self, y: float) -> float:
        low, high = self.y
        return self.height - self.bottom - (y - low) / (high - low) * (self.height - self.top - self.bottom)


def line_chart(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_format: Format = plain,
    x_range: tuple[float, float] | None = None,
) -> str:
    """An SVG figure of one or several lines, with its legend; empty text if there is no point to draw.

    `x_range` is what the x axis spans at least.
    """
    drawn = [s for s in series if len(s.x)]
    if not drawn:
        return ""
    xs = [*(v for s in drawn for v in s.x), *(x_range or ())]
    ys = [v for s in drawn for v in s.y]
    counted = x_range is None and all(float(x).is_integer() for x in xs)
    x_ticks, y_ticks = ticks(*_range(xs), least=1.0 if counted else 0.0), ticks(*_range(ys))
    frame = _Frame(_range(xs), (y_ticks[0], y_ticks[-1]))
    parts = [*_axes(frame, x_ticks, y_ticks, y_format), *(_line(frame, s, i) for i, s in enumerate(drawn))]
    parts.append(
        f'<text x="{(frame.left + frame.width - frame.right) / 2}" y="{frame.height - 6}" '
        f'text-anchor="middle">{escape(x_label)}</text>'
    )
    legend = "".join(f'<span><i class="c{i % _COLOURS}"></i>{escape(s.name)}</span>' for i, s in enumerate(drawn))
    legend = f'<div class="legend">{legend}</div>' if len(drawn) > 1 else ""
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {frame.width} {frame.height}" '
        f'role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>{legend}</figure>'
    )


def _axes(frame: _Frame, x_ticks: Sequence[float], y_ticks: Sequence[float], y_format: Format) -> list[str]:
    width, height = frame.width - frame.left - frame.right, frame.height - frame.top - frame.bottom
    parts = [f'<rect x="{frame.left}" y="{frame.top}" width="{width}" height="{height}" class="plot"/>']
    for y in y_ticks:
        down = frame.down(y)
        parts.append(
            f'<line x1="{frame.left}" x2="{frame.width - frame.right}" y1="{down:.1f}" y2="{down:.1f}" '
            'class="grid"/>'
        )
        parts.append(f'<text x="{frame.left - 6}" y="{down + 4:.1f}" text-anchor="end">{y_format(y)}</text>')
    for x in x_ticks:
        if frame.x[0] <= x <= frame.x[1]:
            place = f'x="{frame.across(x):.1f}" y="{frame.height - frame.bottom + 16}"'
            parts.append(f'<text {place} text-anchor="middle">{plain(x)}</text>')
    return parts


def _line(frame: _Frame, series: Series, index: int) -> str:
    colour = f"c{index % _COLOURS}"
    at = [(frame.across(x), frame.down(y)) for x, y in zip(series.x, series.y, strict=True)]
    path = at
    if series.style == "steps":
        path = at[:1] + [p for a, b in itertools.pairwise(at) for p in ((b[0], a[1]), b)]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in path)
    dashes = ' stroke-dasharray="6 5"' if series.style == "dashed" else ""
    drawn = f'<polyline points="{points}" class="{colour}"{dashes}/>'
    if series.style == "line" and len(at) <= _MOST_DOTS:
        drawn += "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" class="{colour}"/>' for x, y in at)
    return drawn


def kept_bars(rows: Sequence[tuple[str, int, int | None, str]], label: str) -> str:
    """(name, count before, count after, remark) as pairs of bars on one scale, the first row on top.

    Without a count after, the row went as a whole; a grown row's `after` may exceed its `before`.
    """
    if not rows:
        return ""
    most = max(max(before, after or 0) for _, before, after, _ in rows)
    step, left, width, text = 16, 260, 900, 220
    parts = []
    for i, (name, before, after, remark) in enumerate(rows):
        y = i * step
        full, kept = (n / most * (width - left - text) for n in (before, after or 0))
        shown = name if len(name) <= 40 else "…" + name[-39:]
        parts.append(
            f'<text x="{left - 8}" y="{y + 12}" text-anchor="end"><title>{escape(name)}</title>'
            f"{escape(shown)}</text>"
            f'<rect x="{left}" y="{y + 2}" width="{full:.1f}" height="12" rx="2" '
            f'class="{"gone" if after is None else "before"}"/>'
            f'<rect x="{left}" y="{y + 2}" width="{kept:.1f}" height="12" rx="2" class="after"/>'
            f'<text x="{left + max(full, kept) + 6:.1f}" y="{y + 12}">{escape(remark)}</text>'
        )
    marks = [("after", "kept"), ("before", "before"), ("gone", "gone as a whole")]
    used = marks if any(after is None for _, _, after, _ in rows) else marks[:2]
    legend = "".join(f'<span><i class="{mark}"></i>{said}</span>' for mark, said in used)
    drawing = f'viewBox="0 0 {width} {len(rows) * step + 4}" role="img" aria-label="{escape(label)}"'
    return f'<figure class="wide"><div class="legend">{legend}</div><svg {drawing}>{"".join(parts)}</svg></figure>'


def heat_map(title: str, rows: Sequence[tuple[str, Sequence[float]]], x_label: str) -> str:
    """(name, values in 0..1 from left to right) as rows of cells, the darker the nearer to 1."""
    if not rows or not any(len(values) for _, values in rows):
        return ""
    columns = max(len(values) for _, values in rows)
    left, step, width = 260, 16, 760
    cell = (width - left - 8) / columns
    parts = []
    for i, (name, values) in enumerate(rows):
        shown = name if len(name) <= 40 else "…" + name[-39:]
        parts.append(f'<text x="{left - 8}" y="{i * step + 12}" text-anchor="end">{escape(shown)}</text>')
        for j, value in enumerate(values):
            parts.append(
                f'<rect x="{left + j * cell:.1f}" y="{i * step + 1}" width="{max(cell - 1, 1):.1f}" '
                f'height="{step - 2}" class="after" fill-opacity="{min(max(value, 0.02), 1):.2f}">'
                f"<title>{escape(name)}, {escape(x_label)} {j + 1}: {value:.3f}</title></rect>"
            )
    bottom = len(rows) * step
    parts.append(f'<text x="{left}" y="{bottom + 14}">{escape(x_label)} 1</text>')
    parts.append(f'<text x="{width - 8}" y="{bottom + 14}" text-anchor="end">{columns}</text>')
    return (
        f'<figure class="wide"><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {width} {bottom + 20}" '
        f'role="img" aria-label="{escape(title)}">{"".join(parts)}</svg></figure>'
    )


def ticks(low: float, high: float, about: int = 4, least: float = 0.0) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten, and at least `least`, apart) that span `low`..`high`."""
    rough = max((high - low) / about, least)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, 12 - math.floor(math.log10(step))) for k in range(first, last + 1)]


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The values' range, widened where they are (nearly) all the same."""
    low, high = min(values), max(values)
    if high - low < 1e-6 * max(abs(low), abs(high), 1e-6):
        margin = 0.05 * max(abs(low), abs(high)) or 0.5
        return low - margin, high + margin
    return low, high
