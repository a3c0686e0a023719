"""What gates cost: a training step with every unit gated against the plain step, interleaved, medians.

    python benchmarks/gates.py [--steps 30] [--batch 128] [--model NAME --size PIXELS]

Plain and gated steps alternate, so that a machine's moods hit both alike; the ratios are those of medians,
of wall-clock time and of processor time (which other processes disturb less).
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from prunus.adapters.pytorch.catalog import build
from prunus.adapters.pytorch.gating import Gating
from prunus.adapters.pytorch.tracing import trace_model

MODELS = (("prunus/resnet20", 28), ("timm/mobilenetv3_small_050", 64))


@dataclass(frozen=True)
class Seconds:
    wall: float
    processor: float


class Bench:
    """One model with its optimizer, a fixed batch and gates on all of its units."""

    def __init__(self, name: str, size: int, batch: int) -> None:
        self.model = build(name, classes=10, in_chans=3, img_size=size).module
        graph = trace_model(self.model, torch.randn(1, 3, size, size)).graph
        rng = np.random.default_rng(0)
        gates = {group: rng.uniform(0.2, 1, units) for group, units in graph.units.items()}
        self.gating = Gating(self.model, graph, gates)
        self.model.train()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9, nesterov=True)
        self.images, self.labels = torch.randn(batch, 3, size, size), torch.randint(10, (batch,))

    def step(self, gated: bool) -> Seconds:
        wall, processor = time.perf_counter(), time.process_time()
        if gated:
            self.gating.before_forward()
        nn.functional.cross_entropy(self.model(self.images), self.labels).backward()
        if gated:
            self.gating.after_backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return Seconds(time.perf_counter() - wall, time.process_time() - processor)


def measure(name: str, size: int, batch: int, steps: int) -> str:
    bench = Bench(name, size, batch)
    taken: dict[bool, list[Seconds]] = {False: [], True: []}
    for i in range(-1, steps):
        for gated in (i % 2 == 0, i % 2 == 1):
            seconds = bench.step(gated)
            if i >= 0:  # the first pair warms up
                taken[gated].append(seconds)
    plain, gated_wall = (statistics.median(s.wall for s in taken[g]) for g in (False, True))
    cpu, gated_cpu = (statistics.median(s.processor for s in taken[g]) for g in (False, True))
    return (
        f"{name} at {size}, batch {batch}: plain {1e3 * plain:.1f} ms, gated {1e3 * gated_wall:.1f} ms; "
        f"ratio {gated_wall / plain:.3f} wall, {gated_cpu / cpu:.3f} processor"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--model", help="one model instead of the usual two")
    parser.add_argument("--size", type=int, default=224, help="side of its images")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    for name, size in ((given.model, given.size),) if given.model else MODELS:
        print(measure(name, size, given.batch, given.steps), flush=True)


if __name__ == "__main__":
    main()
