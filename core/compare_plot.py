"""Accuracy against MACs, with the spread over seeds; one panel for each teaching and recovery budget."""

from __future__ import annotations

import io
from typing import Any

from prunus.core.compare_protocol import Entry, Teaching
from prunus.core.compare_table import Results
from prunus.core.errors import MissingDependencyError

_STYLES = {"method": ("-", 2.0), "reference": (":", 1.2), "rival": ("--", 1.2)}
"""Line and width, by group."""


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
    ]
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "prunus", "svg.fonttype": "none", "font.size": 9}):
        figure, axes = pyplot.subplots(1, len(panels), figsize=(4.6 * len(panels), 4.2), squeeze=False)
        for axis, (teaching, epochs) in zip(axes[0], panels, strict=True):
            _panel(axis, results, teaching, epochs)
        handles = {h.get_label(): h for axis in axes[0] for h in axis.get_legend_handles_labels()[0]}
        if handles:
            figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=4, frameon=False)
        figure.tight_layout(rect=(0, 0.05 * (1 + len(handles) // 4), 1, 1))
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
        _line(axis, results, entry, f"C{number % 10}", teaching, epochs)
    axis.grid(alpha=0.3)


def _shares(results: Results) -> list[float]:
    """What is left of the dense MACs at each target, in %, where a cell is done."""
    found = {}
    for record in results.records:
        if record.outcome is not None and record.dense is not None:
            found[record.target] = 100 * record.outcome.macs / record.dense.macs
    return sorted(found.values())


def _line(axis: Any, results: Results, entry: Entry, colour: str, teaching: Teaching, epochs: float) -> None:
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
        x, mean, bars, label=entry.name, color=colour, linestyle=style, linewidth=width, marker="o", markersize=3,
        capsize=2,
    )  # fmt: skip
