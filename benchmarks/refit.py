"""What refitting gives, without any training: L2-chosen channels of a trained model, test accuracy.

    python benchmarks/refit.py --model prunus/resnet20 --checkpoint dense.safetensors --target macs=50% macs=25%

Channels are ranked by the squared norm of their writing weights over the mean of their group. Every row
keeps the same channels; only what is done with the kept weights differs.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

from torch import nn

from prunus.adapters.pytorch.batches import Batches, DataBundle
from prunus.adapters.pytorch.catalog import build
from prunus.adapters.pytorch.datasets import LoadOptions, load_data, open_data
from prunus.adapters.pytorch.evaluation import evaluate
from prunus.adapters.pytorch.recalibration import recalibrate
from prunus.adapters.pytorch.refit import refit
from prunus.adapters.pytorch.signals import measure
from prunus.adapters.pytorch.surgery import remove
from prunus.adapters.pytorch.tracing import trace_model
from prunus.core.allocation import global_keep, mean_normalised
from prunus.core.budget import Budget, Target
from prunus.core.cost import IntArray
from prunus.core.directives import Refit
from prunus.core.graph import ChannelGraph
from prunus.core.signals import Signal
from prunus.plugins.magnitude import Magnitude, MagnitudeConfig

FLOOR = 0.05
WAYS: tuple[tuple[Refit, bool], ...] = (
    ("none", False),
    ("none", True),
    ("bias", False),
    ("least-squares", False),
    ("least-squares", True),
    ("sequential", False),
    ("sequential", True),
)


def chosen(model: nn.Module, graph: ChannelGraph, target: str) -> dict[str, IntArray]:
    signals = measure(model, graph, (), frozenset({Signal.WEIGHT}))
    norm = Magnitude(MagnitudeConfig())
    scores = mean_normalised({name: norm.score(group, signals) ** 2 for name, group in graph.prunable.items()})
    return global_keep(graph, Budget.resolve([Target.parse(target)], graph.cost()), scores)


def row(
    dense: nn.Module, graph: ChannelGraph, keep: dict[str, IntArray], images: Batches, data: DataBundle
) -> list[str]:
    cells = []
    for mode, recalibrated in WAYS:
        model = copy.deepcopy(dense)
        remove(model, graph, keep)
        start = time.process_time()
        refit(model, dense, graph, graph.kept_indices(keep), images, mode)
        seconds = time.process_time() - start
        if recalibrated:
            recalibrate(model, images)
        accuracy = 100 * evaluate(model, data.test).accuracy
        name = mode + (" + recalibration" if recalibrated else "")
        cells.append(f"{name} {accuracy:.2f} ({seconds:.1f} processor s)")
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="prunus/resnet20")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--target", nargs="+", default=["macs=50%", "macs=25%"])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--train-limit", type=int, default=16000)
    given = parser.parse_args()
    source = open_data(given.data)
    assert source is not None, "a benchmark needs data"
    built = build(
        given.model,
        classes=source.classes,
        in_chans=source.in_chans,
        image=source.image,
        checkpoint=given.checkpoint,
    )
    data = load_data(source, built.input, LoadOptions(batch_size=250, train_limit=given.train_limit))
    dense = built.module.eval()
    graph = trace_model(dense, built.input.example(1)).graph.with_floors(FLOOR)
    print(f"{given.checkpoint.name}: dense {100 * evaluate(dense, data.test).accuracy:.2f}", flush=True)
    for target in given.target:
        keep = chosen(dense, graph, target)
        share = graph.cost({name: len(units) for name, units in keep.items()}).share_of(graph.cost())["macs"]
        cells = row(dense, graph, keep, data.calibration.part(given.images), data)
        print(f"{target} (macs {share:.4f}): " + " | ".join(cells), flush=True)


if __name__ == "__main__":
    main()
