"""Pictures of a comparison: accuracy against MACs and against the recovery budget, with the spread over seeds."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from prunus.core.budget import Target
from prunus.core.compare_protocol import Entry, Teaching
from prunus.core.compare_record import CellRecord
from prunus.core.compare_table import Results
from prunus.core.errors import MissingDependencyError

_STYLES = {"method": ("-", 2.0), "reference": (":", 1.2), "rival": ("--", 1.2)}
"""Line and width, by group."""
_COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22",
            "#17becf", "#393b79", "#637939", "#8c6d31", "#843c39", "#7b4173", "#3182bd", "#e6550d",
            "#000000", "#e7298a", "#66a61e", "#1b9e77", "#5254a3", "#ad494a", "#c5b0d5")  # fmt: skip
_MARKERS = "os^Dv"
"""Once the colours are used up they come again with the next of these."""


@dataclass(frozen=True, slots=True)
class _Panel:
    """One pair of axes: what its points have in common, and what they are drawn along."""

    title: str
    along: str
    teaching: Teaching
    points: tuple[tuple[str, float], ...]
    """Target and recovery budget of each point of a line."""
    where: Callable[[CellRecord], float]
    """A cell's place on the x axis."""
    tick: Callable[[CellRecord], float]
    """The place of the mark below it: what was asked for."""

    def cells(self, results: Results, entry: Entry) -> list[list[CellRecord]]:
        """The finished cells of each point, without points that have none."""
        found = [results.of(entry.name, target, epochs, self.teaching) for target, epochs in self.points]
        return [cells for cells in found if cells]

    def ticks(self, results: Results) -> list[float]:
        """One for each point that any entry has."""
        groups = [cells for entry in results.protocol.entries for cells in self.cells(results, entry)]
        return sorted({(cells[0].target, cells[0].epochs): self.tick(cells[0]) for cells in groups}.values())


def macs_svg(results: Results) -> str:
    """Accuracy against MACs, a panel per teaching and budget. Raises MissingDependencyError without matplotlib."""
    return _svg(
        results,
        [
            _Panel(
                f"{epochs:g} epochs, {teaching}",
                "MACs, % of dense",
                teaching,
                tuple((target, epochs) for target in results.targets),
                _share,
                _asked,
            )
            for teaching in sorted(results.protocol.teaching, reverse=True)
            for epochs in sorted(results.protocol.epochs)
        ],
    )


def budgets_svg(results: Results) -> str:
    """Accuracy against recovery epochs, from the first that trains on; a panel per teaching and target.

    Raises MissingDependencyError without matplotlib.
    """
    return _svg(
        results,
        [
            _Panel(
                f"{target}, {teaching}",
                "recovery, epochs",
                teaching,
                tuple((target, epochs) for epochs in sorted(results.protocol.epochs) if epochs > 0),
                _epochs,
                _epochs,
            )
            for teaching in sorted(results.protocol.teaching, reverse=True)
            for target in results.targets
        ],
    )


def _share(record: CellRecord) -> float:
    """What is left of the dense MACs, in %."""
    assert record.outcome is not None and record.dense is not None
    return 100 * record.outcome.macs / record.dense.macs


def _asked(record: CellRecord) -> float:
    share = Target.parse(record.target).share
    return _share(record) if share is None else 100 * share


def _epochs(record: CellRecord) -> float:
    return record.epochs


def _svg(results: Results, panels: Sequence[_Panel]) -> str:
    """The panels that have points; the same for the same results."""
    try:
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise MissingDependencyError("the plots", "pip install 'prunus[report]'") from error
    panels = [panel for panel in panels if panel.ticks(results)]
    columns = min(3, max(1, len(panels)))
    rows = max(1, -(-len(panels) // columns))
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "prunus", "svg.fonttype": "none", "font.size": 9}):
        figure, axes = pyplot.subplots(rows, columns, figsize=(4.8 * columns, 4.2 * rows + 0.8), squeeze=False)
        for axis, panel in itertools.zip_longest(axes.flat, panels):
            if panel is None:
                axis.set_axis_off()
            else:
                _draw(axis, results, panel)
        handles = {h.get_label(): h for axis in axes.flat for h in axis.get_legend_handles_labels()[0]}
        if handles:
            names = 2 * columns
            figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=names, frameon=False)
            below = 0.25 * -(-len(handles) // names) / figure.get_figheight()
            figure.tight_layout(rect=(0, below, 1, 1))
        figure.savefig(text, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    return text.getvalue()


def _draw(axis: Any, results: Results, panel: _Panel) -> None:
    axis.set_title(panel.title)
    axis.set_xlabel(panel.along)
    axis.set_ylabel("accuracy on test, %")
    ticks = panel.ticks(results)
    axis.set_xscale("log")
    axis.set_xlim(0.8 * ticks[0], 1.25 * ticks[-1])
    axis.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    axis.minorticks_off()
    for number, entry in enumerate(results.protocol.entries):
        again, colour = divmod(number, len(_COLOURS))
        look = {"color": _COLOURS[colour], "marker": _MARKERS[again % len(_MARKERS)]}
        _line(axis, panel, entry, panel.cells(results, entry), look)
    axis.grid(alpha=0.3)


def _line(axis: Any, panel: _Panel, entry: Entry, points: list[list[CellRecord]], look: dict[str, str]) -> None:
    """The mean, with bars from the worst to the best seed."""
    if not points:
        return
    x = [fmean(map(panel.where, cells)) for cells in points]
    values = [[100 * record.outcome.accuracy for record in cells if record.outcome] for cells in points]
    mean = [fmean(accuracies) for accuracies in values]
    bars = (
        [m - min(accuracies) for m, accuracies in zip(mean, values, strict=True)],
        [max(accuracies) - m for m, accuracies in zip(mean, values, strict=True)],
    )
    style, width = _STYLES[entry.side]
    axis.errorbar(
        x, mean, bars, label=entry.name, linestyle=style, linewidth=width, markersize=3, capsize=2, **look,
    )  # fmt: skip
