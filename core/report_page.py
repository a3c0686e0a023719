"""report.html: one self-contained page, readable without JavaScript, made from the report's data alone."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path

from prunus.core.charts import kept_bars
from prunus.core.display import duration, human, proof, whole_layers
from prunus.core.files import write_atomically
from prunus.core.finished import repeat, uses
from prunus.core.latency_target import LatencyResult
from prunus.core.report import Layer, Report, Width
from prunus.core.report_charts import note_sections, progress_charts, section, single_notes
from prunus.core.report_style import STYLE
from prunus.core.toml_text import to_toml

_FEW = 40
"""A table of so many rows is shown open."""


def write_page(report: Report, path: Path) -> None:
    """Write the page atomically."""
    write_atomically(path, render(report))


def render(report: Report) -> str:
    """The page as text."""
    title = f"{report.model} by {report.plugin}"
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">{escape(_lead(report))}</p>',
        _cards(report),
        f"<p>{escape(proof(report))}</p>",
        _notes(report.notes),
        "<h2>Before and after</h2>",
        _sizes(report),
        _latency(report.latency),
        *_course(report),
        *_widths(report.widths),
        *_layers(report),
        "<h2>Repeat it</h2>",
        *_again(report),
        "<h2>Environment</h2>",
        _facts({**report.versions, **{f"images: {k}": f"{v:,}" for k, v in report.images.items()}}.items()),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + "\n</body></html>\n"
    )


def _lead(report: Report) -> str:
    size = "×".join(str(n) for n in report.input_size)
    classes = f", {report.classes:,} classes" if report.classes is not None else ""
    return f"data {report.data}{classes}, input {size}, target {', '.join(report.targets)}"


def _cards(report: Report) -> str:
    dense, pruned = report.dense, report.pruned
    verdict = ("good", "target met") if report.target_met else ("bad", "target missed")
    cards = [
        (*verdict, ", ".join(report.targets)),
        ("", f"{pruned.macs / max(dense.macs, 1):.1%}", f"of the MACs: {human(pruned.macs)}"),
        ("", f"{pruned.params / max(dense.params, 1):.1%}", f"of the parameters: {human(pruned.params)}"),
    ]
    if pruned.accuracy is not None:
        against = "" if dense.accuracy is None else f", was {dense.accuracy:.2%}"
        cards.append(("", f"{pruned.accuracy:.2%}", f"test accuracy{against}"))
    if report.latency is not None:
        share = report.latency.pruned / max(report.latency.dense, 1e-12)
        cards.append(("", f"{1e3 * report.latency.pruned:.3g} ms", f"latency, {share:.0%} of the dense model's"))
    cards.append(("", duration(report.seconds), "for the whole run"))
    inner = "".join(
        f'<div class="card {kind}"><b>{escape(big)}</b><small>{escape(small)}</small></div>'
        for kind, big, small in cards
    )
    return f'<div class="cards">{inner}</div>'


def _sizes(report: Report) -> str:
    rows = []
    for title, key in (("MACs", "macs"), ("parameters", "params"), ("bytes", "bytes")):
        before, after = getattr(report.dense, key), getattr(report.pruned, key)
        limit = report.limits.get(key)
        allowed = "" if limit is None else f"{limit:,.0f}"
        rows.append((title, f"{before:,}", f"{after:,}", f"{after / max(before, 1):.2%}", allowed))
    dense, pruned = report.dense.accuracy, report.pruned.accuracy
    if pruned is not None:
        before, change = ("", "") if dense is None else (f"{dense:.2%}", f"{100 * (pruned - dense):+.2f} points")
        rows.append(("test accuracy", before, f"{pruned:.2%}", change, ""))
    return _table(("", "before", "after", "kept", "at most"), rows)


def _latency(latency: LatencyResult | None) -> str:
    if latency is None:
        return ""
    rows = [
        ("dense, measured", f"{1e3 * latency.dense:.3f}"),
        ("pruned, foretold by the table", f"{1e3 * latency.predicted:.3f}"),
        ("pruned, measured", f"{1e3 * latency.pruned:.3f}"),
        ("at most", f"{1e3 * latency.limit:.3f}"),
    ]
    errors = ", ".join(f"{error:+.1%}" for error in latency.check_errors)
    checked = f" The table's errors on whole models that it was not fitted to: {errors}." if errors else ""
    said = f"{latency.message[:1].upper()}{latency.message[1:]}. {latency.threads} thread(s), one image.{checked}"
    return f"<h3>Latency</h3>{_table(('one image', 'ms'), rows)}<p>{escape(said)}</p>"


def _course(report: Report) -> list[str]:
    """How the run went; nothing for a run without a history."""
    parts = [section("Result", progress_charts(report))]
    parts += [section(f"Method: {kind}", charts) for kind, charts in note_sections(report.history)]
    noted = single_notes(report.history)
    if noted:
        parts.append("<h3>Noted once</h3>" + _facts(noted))
    shown = [part for part in parts if part]
    return ["<h2>Over the run</h2>", *shown] if shown else []


def _widths(widths: list[Width]) -> list[str]:
    if not widths:
        return []
    locked = sum(w.locked is not None for w in widths)
    said = f"{len(widths)} channel groups, {locked} of them locked" if locked else f"{len(widths)} channel groups"
    rows = [
        (w.name, f"{w.units:,}", f"{w.kept:,}", f"{w.kept / max(w.units, 1):.0%}", w.locked or "") for w in widths
    ]
    opened = " open" if len(rows) <= _FEW else ""
    return [
        "<h2>Widths</h2>",
        kept_bars(
            [(w.name, w.units, w.kept, f"{w.kept} / {w.units}") for w in widths if w.locked is None], "units kept"
        ),
        f"<details{opened}><summary>{said}: the table</summary>"
        + _table(("group", "units", "kept", "share", "locked because"), rows)
        + "</details>",
    ]


def _layers(report: Report) -> list[str]:
    """The shape of the network that is left, layer by layer, and what went as a whole."""
    rows = [(layer.name, layer.before[layer.axis], *_left(layer)) for layer in report.layers]
    said = [f"<p>{escape(sentence)}</p>" for sentence in whole_layers(report.depth)]
    if not rows and not said:
        return []
    opened = " open" if said or len(rows) <= _FEW else ""
    bars = kept_bars(rows, "outputs kept of each layer")
    drawn = f"<details{opened}><summary>{len(rows)} layers</summary>{bars}</details>" if rows else ""
    return ["<h2>Layers</h2>", *said, drawn]


def _left(layer: Layer) -> tuple[int | None, str]:
    """Outputs that are left, and the shape of the weights before and after."""
    before, after = layer.before, layer.after
    if after is None:
        return None, f"{_shape(before)}, gone"
    return after[layer.axis], _shape(before) if after == before else f"{_shape(before)} → {_shape(after)}"


def _shape(shape: tuple[int, ...]) -> str:
    return " × ".join(str(n) for n in shape)


def _again(report: Report) -> list[str]:
    command = repeat(report) or "the same call of prunus.adapters.pytorch.prune"
    settings = {key: value for key, value in report.settings.items() if value not in ({}, [], None)}
    return [
        f"<p>The same run again:</p><pre>{escape(command)}</pre>",
        f"<p>The model it made:</p><pre>{escape(chr(10).join(uses(report).values()))}</pre>",
        f"<details><summary>All settings (run.toml)</summary><pre>{escape(to_toml(settings))}</pre></details>",
    ]


def _facts(facts: Iterable[tuple[str, str]]) -> str:
    inner = "".join(f'<tr><td>{escape(k)}</td><td class="text">{escape(v)}</td></tr>' for k, v in facts)
    return f'<div class="scroll"><table>{inner}</table></div>' if inner else ""


def _notes(notes: list[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>" if notes else ""


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
