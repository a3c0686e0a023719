"""What removed MACs are worth in time: inference of pruned against original models on this machine.

    python benchmarks/latency.py [--model timm/NAME ...] [--target macs=50%] [--threads 2] [--repeats 20]

Untrained models lose the same share of every channel group (whole heads, too) down to the target; which
channels go does not matter for time, how many does. Original and pruned model run in turns, medians, by the clock.
One line of JSON for each model, Markdown at the end: time as a share of the original's, and the share of time
won for each share of MACs removed.
"""

from __future__ import annotations

import argparse
import itertools
import json
from typing import Any

import numpy as np
import torch

from prunus.adapters.pytorch.latency import measure_pair
from prunus.adapters.pytorch.session import open_session
from prunus.core.allocation import uniform_keep
from prunus.core.budget import Budget, Target
from prunus.core.settings import make_settings

MODELS = (
    "timm/resnet50",
    "timm/mobilenetv3_large_100",
    "timm/convnext_atto",
    "timm/deit_tiny_patch16_224",
    "prunus/resnet20",
)
BATCHES = (1, 32)
DTYPES = ("float32", "bfloat16")


def speeds(model: str, target: str, multiple_of: int, threads: int, repeats: int) -> dict[str, Any]:
    """MACs left and, for each type and batch, milliseconds of the original and the share that is left."""
    values = {"model": model, "data": "none", "multiple_of": multiple_of, "seed": 0}
    session = open_session(make_settings(values))
    adapter = session.adapter
    graph, dense = adapter.graph, adapter.model
    budget = Budget.resolve([Target.parse(target)], graph.cost())
    keep = uniform_keep(graph, budget, {name: np.ones(group.units) for name, group in graph.groups.items()})
    pruned = adapter.shrinking.narrowed(keep)
    row: dict[str, Any] = {"model": model, "macs": graph.restrict(keep).cost().macs / graph.cost().macs}
    for dtype, batch in itertools.product(DTYPES, BATCHES):
        images = (torch.randn(batch, *session.describe().input_size),)
        pair = measure_pair(dense, pruned, images, repeats=repeats, threads=threads, dtype=dtype)
        row[f"{dtype}/{batch}"] = {
            "dense_ms": 1e3 * pair.dense.median,
            "share": pair.pruned.median / pair.dense.median,
        }
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: milliseconds of the original, the share that is left, and what a share of MACs is worth."""
    columns = [f"{dtype}/{batch}" for dtype, batch in itertools.product(DTYPES, BATCHES)]
    names = [f"{column.split('/')[0]}, batch {column.split('/')[1]}" for column in columns]
    lines = ["| model | MACs left | " + " | ".join(names) + " |", "|---|---:|" + "---:|" * len(names)]
    for row in rows:
        cells = []
        for column in columns:
            took = row[column]
            worth = (1 - took["share"]) / (1 - row["macs"])
            cells.append(f"{took['dense_ms']:.1f} ms, {took['share']:.0%} left ({worth:.2f})")
        lines.append(f"| `{row['model']}` | {row['macs']:.1%} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", nargs="+", default=MODELS)
    options.add_argument("--target", default="macs=50%")
    options.add_argument("--multiple-of", type=int, default=1, help="channel counts are multiples of this")
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--repeats", type=int, default=20)
    given = options.parse_args()
    rows = []
    for model in given.model:
        rows.append(speeds(model, given.target, given.multiple_of, given.threads, given.repeats))
        print(json.dumps(rows[-1]), flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
