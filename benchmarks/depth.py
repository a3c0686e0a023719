"""Depth against width at equal MACs: what whole blocks and what channels save and cost.

    python benchmarks/depth.py [--model timm/NAME ...] [--target macs=60%] [--threads 2] [--repeats 20]

Untrained models lose blocks (in random order) down to a target, or channels (the same share of every
group) down to the same MACs. Both are timed in turns with the original as `optimize latency` does it, one image
at a time: by what one thread of the processor worked, and by the clock on two threads. The fastest samples
count: what other processes took on a busy machine is not the model's.
One line of JSON for each model, Markdown at the end.
"""

from __future__ import annotations

import argparse
import copy
import json
from typing import Any

import numpy as np
import torch

from prunus.adapters.pytorch.latency import measure, own_clock
from prunus.adapters.pytorch.session import open_session
from prunus.core.allocation import uniform_keep
from prunus.core.budget import Budget, Target
from prunus.core.directives import Remove
from prunus.core.settings import make_settings

MODELS = (
    "timm/resnet26",
    "timm/regnety_004",
    "timm/convnext_atto",
    "timm/mobilenetv3_large_100",
    "timm/deit_tiny_patch16_224",
)


def latency(model: str, target: str, threads: int, repeats: int, seed: int = 0) -> dict[str, Any]:
    """MACs and times of `model` without blocks, and without channels, as shares of the original's."""
    session = open_session(make_settings({"model": model, "data": "none", "seed": seed}))
    adapter = session.adapter
    graph, dense = adapter.graph, copy.deepcopy(adapter.model)
    budget = Budget.resolve([Target.parse(target)], graph.cost())
    removed: list[str] = []
    for name in np.random.default_rng(seed).permutation(list(graph.blocks)).tolist():
        if not budget.met(graph.without_blocks(removed).cost()):
            removed.append(name)
    same = Budget.resolve([Target.parse(f"macs={graph.without_blocks(removed).cost().macs:.0f}")], graph.cost())
    keep = uniform_keep(graph, same, {name: np.ones(group.units) for name, group in graph.groups.items()})
    narrow = adapter.shrinking.narrowed(keep)
    adapter.remove(Remove({}, blocks=tuple(removed)))
    models = (dense, adapter.model, narrow)
    image = (torch.randn(1, *session.describe().input_size),)
    row: dict[str, Any] = {"model": model, "removed": removed, "of": len(graph.blocks)}
    row["macs"] = [
        adapter.graph.cost().macs / graph.cost().macs,
        graph.restrict(keep).cost().macs / graph.cost().macs,
    ]
    alone = [t.fastest for t in measure(models, image, threads=1, repeats=repeats, clock=own_clock(1, image))]
    row["processor_ms"], row["processor"] = 1e3 * alone[0], [t / alone[0] for t in alone[1:]]
    clock = measure(models, image, threads=threads, repeats=repeats)
    row["clock_ms"] = 1e3 * clock[0].fastest
    row["clock"] = [t.fastest / clock[0].fastest for t in clock[1:]]
    row["median"] = [t.median / clock[0].median for t in clock[1:]]
    return row


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", nargs="+", default=MODELS)
    options.add_argument("--target", default="macs=60%")
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--repeats", type=int, default=20)
    given = options.parse_args()
    rows = []
    for model in given.model:
        rows.append(latency(model, given.target, given.threads, given.repeats))
        print(json.dumps(rows[-1]), flush=True)
    print(_latency_table(rows))


def _latency_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | blocks removed | MACs left | processor time: depth | width | two threads: depth | width |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        times = [f"{t:.1%}" for t in (*row["processor"], *row["clock"])]
        cells = [f"`{row['model']}`", f"{len(row['removed'])} of {row['of']}", f"{row['macs'][0]:.1%}", *times]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
