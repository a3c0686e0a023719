"""Pictures of what benchmarks/expansion.py found.

    python benchmarks/expansion_plot.py benchmarks/results/expansion.jsonl --output benchmarks/results

`expansion_budget.svg`: accuracy on test against compute, where the file holds several budgets of one network and
target. `expansion_shapes.svg`: the share of its units that each channel group keeps, for all networks and targets.
Both show the mean over seeds, and all of them from the lowest to the highest.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("agg")
from matplotlib import pyplot

Record = dict[str, Any]
Cells = dict[tuple[Any, ...], list[Record]]
COLOURS = {"at once": "#7f7f7f", "none": "#1f77b4", "wide": "#ff7f0e", "branches": "#2ca02c", "layers": "#9467bd"}


def by(records: Iterable[Record], *keys: str) -> Cells:
    """Records that agree in `keys`, in order of appearance."""
    cells: Cells = {}
    for record in records:
        cells.setdefault(tuple(record[key] for key in keys), []).append(record)
    return cells


def budgets(records: list[Record]) -> Any:
    """Accuracy against compute; a panel for each network and target that has more than one budget."""
    panels = {
        key: rows
        for key, rows in by(records, "model", "dense_epochs", "target").items()
        if len({row["asked"] for row in rows}) > 1
    }
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5.2 * len(panels), 3.8), squeeze=False)
    for axis, ((model, dense, target), rows) in zip(axes.flat, panels.items(), strict=True):
        axis.set_title(f"{model}, {target}, {dense:g} dense epochs before")
        axis.set_xscale("log")
        ticks = sorted({row["asked"] for row in rows})
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.set_xlabel("compute, epochs of the dense network")
        axis.set_ylabel("accuracy on test, %")
        for (variant,), mine in by(rows, "variant").items():
            cells = sorted(by(mine, "asked").items())
            seeds = [[100 * row["test"] for row in found] for _, found in cells]
            mean = [float(np.mean(tests)) for tests in seeds]
            spread = [[m - min(t) for m, t in zip(mean, seeds, strict=True)],
                      [max(t) - m for m, t in zip(mean, seeds, strict=True)]]  # fmt: skip
            axis.errorbar(
                [key[0] for key, _ in cells], mean, spread, label=variant, marker="o",
                markersize=3, capsize=2, color=COLOURS.get(variant),
            )  # fmt: skip
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    return figure


def shapes(records: list[Record]) -> Any:
    """Share of its units that every group keeps, in the order the network runs; one panel for each target."""
    panels = by(records, "model", "target", "asked")
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(6.4 * columns, 3.6 * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, ((model, target, asked), found) in zip(axes.flat, panels.items(), strict=False):
        axis.set_title(f"{model}, {target}, compute {asked:g}")
        groups = list(found[0]["widths"])[:-1]  # all but the classifier's outputs
        for (variant,), mine in by(found, "variant").items():
            kept = 100 * np.array([[r["widths"][g][1] / r["widths"][g][0] for g in groups] for r in mine])
            colour = COLOURS.get(variant)
            axis.plot(kept.mean(0), label=f"{variant} ({len(mine)})", marker="o", markersize=3, color=colour)
            axis.fill_between(range(len(groups)), kept.min(0), kept.max(0), alpha=0.15, color=colour, linewidth=0)
        axis.set_xticks(range(len(groups)), [short(name) for name in groups], rotation=90, fontsize=6)
        axis.set_ylim(0, None)
        axis.set_ylabel("units kept, %")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=7)
    return figure


def short(name: str) -> str:
    """A group's name without what all have in common."""
    return name.removesuffix(".weight").removesuffix(".0").removeprefix("stages.").removeprefix("features.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="folder")
    chosen = parser.parse_args()
    records = [json.loads(line) for line in chosen.input.read_text("utf-8").splitlines()]
    drawn: dict[str, Callable[[list[Record]], Any]] = {"budget": budgets, "shapes": shapes}
    for name, draw in drawn.items():
        with matplotlib.rc_context({"svg.hashsalt": "prunus", "svg.fonttype": "none", "font.size": 9}):
            figure = draw(records)
            figure.tight_layout()
            figure.savefig(chosen.output / f"expansion_{name}.svg", metadata={"Date": None})
            pyplot.close(figure)


if __name__ == "__main__":
    main()
