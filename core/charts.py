"""Small charts as inline SVG text: no script, no font, no file beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_COLOURS = ("#2563eb", "#db2777", "#059669", "#d97706", "#7c3aed", "#0891b2", "#dc2626", "#4d7c0f")


@dataclass(frozen=True, slots=True)
class Series:
    """One line: y over x, both finite."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


def line_chart(title: str, series: Sequence[Series], x_label: str, y_label: str) -> str:
    """An SVG figure of one or several lines, with its legend; empty text if there is no point to draw."""
    drawn = [s for s in series if len(s.x)]
    if not drawn:
        return ""
    width, height, left, right, top, bottom = 640, 260, 64, 16, 16, 40
    low_x, high_x = _range([v for s in drawn for v in s.x])
    low_y, high_y = _range([v for s in drawn for v in s.y])

    def at(x: float, y: float) -> str:
        across = left + (x - low_x) / (high_x - low_x) * (width - left - right)
        up = height - bottom - (y - low_y) / (high_y - low_y) * (height - top - bottom)
        return f"{across:.1f},{up:.1f}"

    inside = f'width="{width - left - right}" height="{height - top - bottom}"'
    parts = [f'<rect x="{left}" y="{top}" {inside} class="plot"/>']
    for share in (0.0, 0.5, 1.0):
        x, y = low_x + share * (high_x - low_x), low_y + share * (high_y - low_y)
        _, up = at(low_x, y).split(",")
        across, _ = at(x, low_y).split(",")
        parts.append(f'<line x1="{left}" x2="{width - right}" y1="{up}" y2="{up}" class="grid"/>')
        parts.append(f'<text x="{left - 6}" y="{float(up) + 4:.1f}" text-anchor="end">{y:.4g}</text>')
        parts.append(f'<text x="{across}" y="{height - bottom + 16}" text-anchor="middle">{x:.4g}</text>')
    for i, one in enumerate(drawn):
        colour = _COLOURS[i % len(_COLOURS)]
        points = " ".join(at(x, y) for x, y in zip(one.x, one.y, strict=True))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for point in points.split(" ") if len(one.x) <= 40 else ():
            across, up = point.split(",")
            parts.append(f'<circle cx="{across}" cy="{up}" r="2.5" fill="{colour}"/>')
    parts.append(f'<text x="{width / 2}" y="{height - 6}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(f'<text x="{left}" y="11">{escape(y_label)}</text>')
    legend = "".join(
        f'<span><i style="background:{_COLOURS[i % len(_COLOURS)]}"></i>{escape(s.name)}</span>'
        for i, s in enumerate(drawn)
    )
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg><div class="legend">{legend}</div></figure>'
    )


def width_bars(rows: Sequence[tuple[str, int, int]]) -> str:
    """(name, before, after) as pairs of bars on one scale."""
    if not rows:
        return ""
    most, step, left, width = max(before for _, before, _ in rows), 18, 260, 640
    parts = []
    for i, (name, before, after) in enumerate(rows):
        y = i * step
        full = before / most * (width - left - 70)
        kept = after / most * (width - left - 70)
        shown = name if len(name) <= 40 else "…" + name[-39:]
        parts.append(f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{escape(shown)}</text>')
        parts.append(f'<rect x="{left}" y="{y + 3}" width="{full:.1f}" height="12" class="before"/>')
        parts.append(f'<rect x="{left}" y="{y + 3}" width="{kept:.1f}" height="12" class="after"/>')
        parts.append(f'<text x="{left + full + 6:.1f}" y="{y + 13}">{after}/{before}</text>')
    label = "units kept of each channel group"
    return (
        f'<svg viewBox="0 0 {width} {len(rows) * step + 4}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    )


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high - low < 1e-12 * max(abs(low), abs(high), 1e-12):
        return low - 0.5, high + 0.5
    return low, high
