"""What a piece of joint-search's training costs inside extracted sub-networks: counted MACs and processor time.

    python benchmarks/round_cost.py --model prunus/resnet20 --shares 100 70 50 35 25 --epochs 0.5

Every group keeps the same share of its units. One thread, bf16, channels last, as in the protocols.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from prunus.adapters.pytorch.session import open_session
from prunus.core.allocation import global_keep
from prunus.core.budget import Budget, Target
from prunus.core.directives import Remove, Train
from prunus.core.settings import RunSettings
from prunus.plugins.threshold_search import cut_scores, unit_masses


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="prunus/resnet20")
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--shares", type=float, nargs="+", default=[100, 70, 50, 35, 25])
    parser.add_argument("--epochs", type=float, default=0.5)
    parser.add_argument("--multiple-of", type=int, default=1)
    parser.add_argument("--train-limit", type=int, default=16_000)
    options = parser.parse_args()
    settings = RunSettings(
        model=options.model, data=options.data, train_limit=options.train_limit, batch_size=128, lr=0.12, amp=True,
        channels_last=True, threads=1, multiple_of=options.multiple_of,
    )  # fmt: skip
    whole: tuple[float, float] | None = None
    for share in options.shares:
        adapter = open_session(settings).adapter
        if share < 100:
            graph = adapter.original_graph
            budget = Budget.resolve([Target.parse(f"macs={share:g}%")], graph.cost())
            equal = {name: np.ones(group.units) for name, group in graph.prunable.items()}
            adapter.remove(Remove(global_keep(graph, budget, cut_scores(unit_masses(equal, 1.0)))))
        adapter.train(Train(0.02, label="warm"))
        began = time.process_time()
        trained = adapter.train(Train(options.epochs, label="piece"))
        seconds = time.process_time() - began
        whole = whole or (trained.macs, seconds)
        print(
            f"{share:5.0f}%  {trained.macs / 1e9:8.1f} GMACs ({trained.macs / whole[0]:.3f})  "
            f"{seconds:6.1f} s ({seconds / whole[1]:.3f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
