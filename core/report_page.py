"""report.html: one self-contained page, readable without JavaScript, made from the report's data alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from prunus.core.charts import Series, line_chart, width_bars
from prunus.core.display import human, proof
from prunus.core.files import write_atomically
from prunus.core.report import Report

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2937; --paper: #ffffff; --soft: #f3f4f6; --line: #d1d5db;
  --mark: #2563eb }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e5e7eb; --paper: #111827; --soft: #1f2937; --line: #374151; --mark: #60a5fa } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  margin: 2rem auto; max-width: 60rem; padding: 0 1rem }
h1 { font-size: 1.6rem; margin-bottom: .2rem }
h2 { font-size: 1.15rem; margin-top: 2.2rem }
.cards { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0 }
.card { background: var(--soft); border-radius: .6rem; padding: .7rem 1rem; min-width: 9rem }
.card b { display: block; font-size: 1.5rem }
.card small { opacity: .75 }
table { border-collapse: collapse; width: 100% }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right;
  font-variant-numeric: tabular-nums }
th:first-child, td:first-child { text-align: left }
td.text { text-align: left; overflow-wrap: anywhere }
figure { margin: 1rem 0 }
figcaption { font-weight: 600 }
svg { width: 100%; height: auto; max-width: 46rem }
svg text { font: 11px system-ui, sans-serif; fill: var(--ink) }
.plot { fill: var(--soft) }
.grid { stroke: var(--line) }
.before { fill: var(--line) }
.after { fill: var(--mark) }
.legend span { margin-right: 1.2rem; font-size: .85rem }
.legend i { display: inline-block; width: .8em; height: .8em; margin-right: .35em; border-radius: 2px }
pre { background: var(--soft); padding: .8rem; border-radius: .5rem; white-space: pre-wrap;
  overflow-wrap: anywhere }
details { margin: .6rem 0 }
summary { cursor: pointer }
"""


def write_page(report: Report, path: Path) -> None:
    """Write the page atomically."""
    write_atomically(path, render(report))


def render(report: Report) -> str:
    """The page as text."""
    title = f"{report.model} by {report.plugin}"
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(report.data)}, target {escape(', '.join(report.targets))}</p>",
        _cards(report),
        f"<p>{escape(proof(report))}</p>",
        "<h2>Before and after</h2>",
        _sizes(report),
        "<h2>Over the run</h2>",
        *_charts(report.history),
        "<h2>Widths</h2>",
        width_bars([(w.name, w.units, w.kept) for w in report.widths if w.locked is None]),
        _groups(report),
        "<h2>Again</h2>",
        f"<p>This run:</p><pre>{escape(command(report))}</pre>",
        "<details><summary>All settings</summary>" + _facts(report.settings.items()) + "</details>",
        "<details open><summary>Environment</summary>" + _facts(report.versions.items()) + "</details>",
        _notes(report.notes),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + "\n</body></html>\n"
    )


def command(report: Report) -> str:
    """The command that runs the same again."""
    words = ["optimize", "prune", "--config", f"{report.run}/run.toml"]
    return " ".join(words)


def _cards(report: Report) -> str:
    dense, pruned = report.dense, report.pruned
    cards = [
        ("target met" if report.target_met else "target missed", ", ".join(report.targets)),
        (f"{pruned.macs / max(dense.macs, 1):.1%}", "of the MACs"),
        (f"{pruned.params / max(dense.params, 1):.1%}", "of the parameters"),
    ]
    if pruned.accuracy is not None:
        against = "" if dense.accuracy is None else f", dense {dense.accuracy:.2%}"
        cards.append((f"{pruned.accuracy:.2%}", f"test accuracy{against}"))
    cards.append((f"{report.seconds:,.0f} s", "for the whole run"))
    inner = "".join(
        f'<div class="card"><b>{escape(big)}</b><small>{escape(small)}</small></div>' for big, small in cards
    )
    return f'<div class="cards">{inner}</div>'


def _sizes(report: Report) -> str:
    rows = []
    for title, key in (("MACs", "macs"), ("parameters", "params"), ("bytes", "bytes")):
        before, after = getattr(report.dense, key), getattr(report.pruned, key)
        limit = report.limits.get(key)
        target = "" if limit is None else f"{human(limit)}"
        rows.append((title, f"{before:,}", f"{after:,}", f"{after / max(before, 1):.2%}", target))
    return _table(("", "before", "after", "kept", "at most"), rows)


def _charts(history: list[dict[str, Any]]) -> list[str]:
    charts = [
        line_chart("Accuracy", _tracks(history, "accuracy", ("Evaluate", "Train")), "directive", "top-1, 0..1"),
        line_chart("Loss", _tracks(history, "loss", ("Evaluate", "Train")), "directive", "cross entropy"),
        line_chart("MACs", _tracks(history, "macs", ("Remove", "Grow")), "directive", "MACs per image"),
    ]
    notes: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in history:
        for key, value in row.get("values", {}).items():
            if isinstance(value, int | float) and math.isfinite(value):
                points = notes.setdefault(row["note"], {}).setdefault(key, [])
                points.append((float(len(points)), float(value)))
    for kind, keys in notes.items():
        for key, points in keys.items():
            if len(points) > 1:
                x, y = zip(*points, strict=True)
                charts.append(line_chart(f"{kind}: {key}", [Series(key, x, y)], "note", key))
    return [chart for chart in charts if chart]


def _tracks(history: list[dict[str, Any]], key: str, kinds: tuple[str, ...]) -> list[Series]:
    """One series per kind of directive (training and held-out figures are not the same thing)."""
    names = {"Evaluate": "held-out", "Train": "training", "Remove": "after removal", "Grow": "after growth"}
    series = []
    for kind in kinds:
        points = [
            (float(row["index"]), float(row[key]))
            for row in history
            if row["kind"] == kind and isinstance(row.get(key), int | float) and row.get("model") is None
        ]
        series.append(Series(names[kind], [p[0] for p in points], [p[1] for p in points]))
    return series


def _groups(report: Report) -> str:
    rows = [(w.name, str(w.units), str(w.kept), w.locked or "") for w in report.widths]
    return (
        "<details><summary>Every channel group, and what is locked</summary>"
        + _table(("group", "units", "kept", "locked because"), rows)
        + "</details>"
    )


def _facts(facts: Iterable[tuple[str, Any]]) -> str:
    rows = [(key, str(value)) for key, value in facts if value not in (None, {}, [], "")]
    inner = "".join(f'<tr><td>{escape(k)}</td><td class="text">{escape(v)}</td></tr>' for k, v in rows)
    return f"<table>{inner}</table>"


def _notes(notes: list[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>" if notes else ""


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
