"""The table of a comparison: Markdown to read, JSON and CSV to compute with."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from prunus.core.budget import Target
from prunus.core.compare_protocol import Entry, Protocol, Teaching
from prunus.core.compare_record import SOURCE, CellRecord

ENOUGH = 3
"""Seeds that an entry needs to be the best of several, where any has so many."""
_HEADINGS = {"plain": "Without distillation", "distilled": "The dense model may teach, on both sides"}


@dataclass(frozen=True, slots=True)
class Results:
    """A protocol and the records of its cells, as far as they are there."""

    protocol: Protocol
    records: tuple[CellRecord, ...]
    again: str
    """The command that runs one cell again, with CELL for its name."""

    def of(self, entry: str, target: str, epochs: float, teaching: Teaching) -> list[CellRecord]:
        """Finished cells that differ in nothing but the seed, by seed."""
        place = (entry, target, epochs, teaching)
        found = [r for r in self.records if (r.entry, r.target, r.epochs, r.teaching) == place and r.outcome]
        return sorted(found, key=lambda record: record.seed)

    @property
    def targets(self) -> list[str]:
        """From the mildest to the hardest."""
        return sorted(self.protocol.targets, key=_severity)

    @property
    def failures(self) -> list[CellRecord]:
        return [record for record in self.records if record.status == "failed"]


def markdown(results: Results) -> str:
    """Accuracy on test, its margins and its price; one section for each teaching and recovery budget."""
    protocol = results.protocol
    done = sum(record.status == "done" for record in results.records)
    lines = [
        f"# {protocol.title}",
        "",
        *_described(results),
        "",
        f"{done} of {len(protocol.cells)} cells done.",
        "",
    ]
    for teaching in sorted(protocol.teaching, reverse=True):
        for epochs in sorted(protocol.epochs):
            lines += _section(results, teaching, epochs)
    if results.failures:
        lines += ["## Failed", ""]
        lines += [f"- `{record.cell}`: {record.error}" for record in results.failures]
        lines += [""]
    lines += ["## Any cell again", "", f"    {results.again}", ""]
    lines += ["CELL is entry/target/epochs/teaching/seed, as table.csv names it.", ""]
    return "\n".join(lines)


def _described(results: Results) -> list[str]:
    protocol = results.protocol
    images = f", {protocol.train_limit:,} training images" if protocol.train_limit else ""
    text = (
        f"`{protocol.model}` on {protocol.data}{images} of which {protocol.holdout:.0%} are held out. Dense: "
        f"{protocol.dense.epochs:g} epochs, once per seed. Accuracy on test in %: the mean over seeds, then every "
        "seed in order. All choices are made on held-out images. *total* is the whole training, the dense model's "
        "included, in units of the dense training's MACs; *time* is the cell's processor time, the dense training "
        "left out."
    )
    networks = {(r.seed, r.dense.accuracy, r.dense.holdout) for r in results.records if r.dense is not None}
    of_seed: dict[int, list[str]] = {}
    for seed, accuracy, _ in sorted(networks):
        of_seed.setdefault(seed, []).append(_percent(accuracy))
    values = " ".join("/".join(figures) for figures in of_seed.values())
    lines = [text, "", f"Dense accuracy: {values or 'not trained yet'}."]
    if len(networks) > len(of_seed):
        lines += [
            "Seeds with several figures were trained on processors of several kinds, which round differently: "
            "their cells start from several networks. Margins compare cells of one network, or of methods that "
            "train from scratch."
        ]
    sources = {record.versions.get(SOURCE, "unknown") for record in results.records if record.outcome is not None}
    if len(sources) > 1:
        lines += ["", f"These cells come from {len(sources)} states of the source; --rerun makes them one."]
    return lines


def _section(results: Results, teaching: Teaching, epochs: float) -> list[str]:
    rows = [entry for entry in results.protocol.entries if _any(results, entry, epochs, teaching)]
    if not rows:
        return []
    lines = [f"## {_HEADINGS[teaching]}, {epochs:g} epochs", ""]
    lines += [_row(["", *results.targets]), _row(["---"] * (len(results.targets) + 1))]
    best = {t: _best_mean(results, rows, t, epochs, teaching) for t in results.targets}
    for entry in rows:
        cells = [_accuracies(results.of(entry.name, t, epochs, teaching), best[t]) for t in results.targets]
        lines.append(_row([entry.name, *cells]))
    margins = [_margin(results, t, epochs, teaching) for t in results.targets]
    if any(margins):
        lines.append(_row(["*best method - best rival*", *(m.text if m else "" for m in margins)]))
    lines += ["", _row(["total / time", *results.targets]), _row(["---"] * (len(results.targets) + 1))]
    for entry in rows:
        cells = [_price(results.of(entry.name, t, epochs, teaching)) for t in results.targets]
        lines.append(_row([entry.name, *cells]))
    return [*lines, ""]


def _any(results: Results, entry: Entry, epochs: float, teaching: Teaching) -> bool:
    return any(results.of(entry.name, target, epochs, teaching) for target in results.targets)


def _best_mean(
    results: Results, rows: Iterable[Entry], target: str, epochs: float, teaching: Teaching
) -> float | None:
    groups = [results.of(entry.name, target, epochs, teaching) for entry in rows]
    return max(map(_mean, with_enough_seeds(groups)), default=None)


def _accuracies(records: Sequence[CellRecord], best: float | None) -> str:
    if not records:
        return "·"
    mean = _mean(records)
    text = f"**{_percent(mean)}**" if mean == best else _percent(mean)
    return text if len(records) == 1 else f"{text} ({' '.join(_percent(_accuracy(r)) for r in records)})"


def _price(records: Sequence[CellRecord]) -> str:
    if not records:
        return "·"
    totals = [r.total_macs / r.dense.training_macs for r in records if r.dense is not None]
    return f"{fmean(totals):.2f} / {fmean(record.cpu_seconds for record in records):.0f} s"


@dataclass(frozen=True, slots=True)
class Margin:
    """The best method against the best rival; both are chosen by their mean on the held-out part."""

    method: str
    rival: str
    differences: tuple[float, ...]
    """Accuracy on test, method minus rival, seed by seed."""

    @property
    def text(self) -> str:
        points = [100 * difference for difference in self.differences]
        values = f" ({' '.join(f'{p:+.1f}' for p in points)})" if len(points) > 1 else ""
        return f"{fmean(points):+.2f}{values}: {self.method} - {self.rival}"


def _margin(results: Results, target: str, epochs: float, teaching: Teaching) -> Margin | None:
    ours, theirs = (
        [
            results.of(entry.name, target, epochs, teaching)
            for entry in results.protocol.entries
            if entry.side == side
        ]
        for side in ("method", "rival")
    )
    method = best_held_out(ours)
    mine = {record.seed: record for record in method}
    rival = best_held_out([[r for r in group if r.seed in mine and alike(r, mine[r.seed])] for group in theirs])
    if not rival:
        return None
    return Margin(
        method[0].entry,
        rival[0].entry,
        tuple(_accuracy(mine[record.seed]) - _accuracy(record) for record in rival),
    )


def with_enough_seeds(groups: Sequence[list[CellRecord]]) -> list[list[CellRecord]]:
    """Those of `ENOUGH` seeds, or of as many as the largest has: one lucky seed is not the best of anything."""
    enough = min(ENOUGH, max(map(len, groups), default=0))
    return [group for group in groups if group and len(group) >= enough]


def best_held_out(groups: Sequence[list[CellRecord]]) -> list[CellRecord]:
    """The records of the entry whose held-out accuracy is best; [] for none.

    Judged, among those with enough seeds, on the seeds that all of them have: more seeds are no merit.
    """
    groups = with_enough_seeds(groups)
    shared = set.intersection(*({record.seed for record in group} for group in groups)) if groups else set()

    def held_out(group: list[CellRecord]) -> float:
        return fmean(r.outcome.holdout for r in group if r.outcome and (r.seed in shared or not shared))

    return max(groups, key=held_out, default=[])


def alike(one: CellRecord, other: CellRecord) -> bool:
    """Whether two cells of a seed can be compared: they start from the same dense network, or one from none."""
    starts = [
        (record.dense.accuracy, record.dense.holdout)
        for record in (one, other)
        if record.dense is not None and record.outcome is not None and record.outcome.uses_dense
    ]
    return len(set(starts)) <= 1


def as_json(results: Results) -> str:
    """Everything: the protocol, the margins, and each record."""
    data = {
        "schema": 1,
        "protocol": results.protocol.model_dump(mode="json"),
        "again": results.again,
        "margins": _margins(results),
        "cells": [record.model_dump(mode="json") for record in results.records],
    }
    return json.dumps(data, indent=1) + "\n"


def _margins(results: Results) -> list[dict[str, Any]]:
    rows = []
    for teaching in results.protocol.teaching:
        for epochs in sorted(results.protocol.epochs):
            for target in results.targets:
                margin = _margin(results, target, epochs, teaching)
                if margin is not None:
                    rows.append(
                        {
                            "target": target,
                            "epochs": epochs,
                            "teaching": teaching,
                            "method": margin.method,
                            "rival": margin.rival,
                            "differences": list(margin.differences),
                        }
                    )
    return rows


_COLUMNS = ("cell", "entry", "group", "target", "epochs", "teaching", "seed", "status", "accuracy", "holdout",
            "dense_accuracy", "macs", "share", "params", "training_macs", "total_macs", "seconds", "cpu_seconds",
            "peak_memory", "notes", "error", "key")  # fmt: skip


def as_csv(results: Results) -> str:
    """One line per record; empty where a failed cell has no figure."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    for record in results.records:
        writer.writerow({name: value for name, value in _flat(record).items() if name in _COLUMNS})
    return text.getvalue()


def _flat(record: CellRecord) -> dict[str, object]:
    row = record.model_dump(mode="json", exclude={"dense", "outcome", "versions"})
    if record.outcome is not None and record.dense is not None:
        row |= record.outcome.model_dump(mode="json")
        row["notes"] = "; ".join(record.outcome.notes)
        row["dense_accuracy"] = record.dense.accuracy
        row["share"] = round(record.outcome.macs / record.dense.macs, 5)
        row["total_macs"] = record.total_macs
    return row


def _severity(text: str) -> tuple[bool, float]:
    target = Target.parse(text)
    return target.share is None, -(target.share or target.amount or 0.0)


def _accuracy(record: CellRecord) -> float:
    assert record.outcome is not None
    return record.outcome.accuracy


def _mean(records: Sequence[CellRecord]) -> float:
    return fmean(map(_accuracy, records))


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
