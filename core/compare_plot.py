"""Accuracy against MACs, with the spread over seeds; one panel for each teaching and recovery budget."""

from __future__ import annotations

import io
import itertools
from typing import Any

from prunus.core.compare_protocol import Entry, Teaching
from prunus.core.compare_table import Results
from prunus.core.errors import MissingDependencyError

_STYLES = {"method": ("-", 2.0), "reference": (":", 1.2), "rival": ("--", 1.2)}
"""Line and width, by group."""
_COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22",
            "#17becf", "#393b79", "#637939", "#8c6d31", "#843c39", "#7b4173", "#3182bd", "#e6550d")  # fmt: skip
_MARKERS = "os^Dv"
"""Once the colours are used up they come again with the next of these."""


def plot_svg(results: Results) -> str:
    """An SVG, the same for the same results. Raises MissingDependencyError without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise MissingDependencyError("the plot", "pip install 'prunus[report]'") from error
    panels = [
        (teaching, epochs)
        for teaching in sorted(results.protocol.teaching, reverse=True)
        for epochs in sorted(results.protocol.epochs)
        if any(r.outcome and (r.teaching, r.epochs) == (teaching, epochs) for r in results.records)
    ]
    columns = min(3, max(1, len(panels)))
    rows = max(1, -(-len(panels) // columns))
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "prunus", "svg.fonttype": "none", "font.size": 9}):
        figure, axes = pyplot.subplots(rows, columns, figsize=(4.8 * columns, 4.2 * rows + 0.8), squeeze=False)
        for axis, panel in itertools.zip_longest(axes.flat, panels):
            if panel is None:
                axis.set_axis_off()
            else:
                _panel(axis, results, *panel)
        handles = {h.get_label(): h for axis in axes.flat for h in axis.get_legend_handles_labels()[0]}
        if handles:
            names = 2 * columns
            figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=names, frameon=False)
            below = 0.25 * -(-len(handles) // names) / figure.get_figheight()
            figure.tight_layout(rect=(0, below, 1, 1))
        figure.savefig(text, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    return text.getvalue()


def _panel(axis: Any, results: Results, teaching: Teaching, epochs: float) -> None:
    axis.set_title(f"{epochs:g} epochs, {teaching}")
    axis.set_xlabel("MACs, % of dense")
    axis.set_ylabel("accuracy on test, %")
    axis.set_xscale("log")
    shares = _shares(results)
    if shares:
        axis.set_xlim(0.8 * min(shares), 1.25 * max(shares))
        axis.set_xticks(shares, [f"{share:.3g}" for share in shares])
        axis.minorticks_off()
    for number, entry in enumerate(results.protocol.entries):
        again, colour = divmod(number, len(_COLOURS))
        look = {"color": _COLOURS[colour], "marker": _MARKERS[again % len(_MARKERS)]}
        _line(axis, results, entry, look, teaching, epochs)
    axis.grid(alpha=0.3)


def _shares(results: Results) -> list[float]:
    """What is left of the dense MACs at each target, in %, where a cell is done."""
    found = {}
    for record in results.records:
        if record.outcome is not None and record.dense is not None:
            found[record.target] = 100 * record.outcome.macs / record.dense.macs
    return sorted(found.values())


def _line(
    axis: Any, results: Results, entry: Entry, look: dict[str, str], teaching: Teaching, epochs: float
) -> None:
    """The mean, with bars from the worst to the best seed."""
    points = []
    for target in results.targets:
        cells = [
            (record.outcome.macs / record.dense.macs, record.outcome.accuracy)
            for record in results.of(entry.name, target, epochs, teaching)
            if record.outcome is not None and record.dense is not None
        ]
        if cells:
            values = [100 * accuracy for _, accuracy in cells]
            share = sum(100 * share for share, _ in cells) / len(cells)
            points.append((share, sum(values) / len(values), min(values), max(values)))
    if not points:
        return
    x, mean, low, high = zip(*points, strict=True)
    bars = ([m - v for m, v in zip(mean, low, strict=True)], [v - m for m, v in zip(mean, high, strict=True)])
    style, width = _STYLES[entry.side]
    axis.errorbar(
        x, mean, bars, label=entry.name, linestyle=style, linewidth=width, markersize=3, capsize=2, **look,
    )  # fmt: skip
