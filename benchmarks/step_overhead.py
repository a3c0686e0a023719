"""What pruning adds to a training step: every unit gated by prunus, or regularised by torch-pruning, against none.

    python -m benchmarks.step_overhead [--models NAME ...] [--size PIXELS] [--batch 128] [--steps 30]

Steps of all kinds take turns in rotating order, so that a machine's moods hit them alike. A row for a Markdown
table: the plain step in milliseconds, then the ratios of medians of processor time, which other processes
disturb less than wall-clock time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import nn

from benchmarks.rivals.depgraph import DepGraphConfig, Method, make_pruner
from benchmarks.turns import medians
from prunus.adapters.pytorch.catalog import build
from prunus.adapters.pytorch.gating import Gating
from prunus.adapters.pytorch.tracing import trace_model

RIVALS: tuple[Method, ...] = ("bn-scale", "group-norm", "growing-reg")
CLASSES = 10


class Stepper:
    """A model with its optimizer and what is done around its backward pass; one per kind of step."""

    def __init__(self, name: str, size: int, kind: str) -> None:
        self.model = build(name, classes=CLASSES, in_chans=3, img_size=size).module
        self.before: Callable[[], None] = lambda: None
        self.after: Callable[[], None] = lambda: None
        example = torch.randn(1, 3, size, size)
        if kind == "gates":
            graph = trace_model(self.model, example).graph
            rng = np.random.default_rng(0)
            gates = {group: rng.uniform(0.2, 1, units) for group, units in graph.units.items()}
            gating = Gating(self.model, graph, gates)
            self.before, self.after = gating.before_forward, gating.after_backward
        elif kind != "plain":
            config = DepGraphConfig(method=kind, scope="global")  # type: ignore[arg-type]
            pruner = make_pruner(self.model, (example,), config, CLASSES)
            pruner.update_regularizer()
            self.after = lambda: pruner.regularize(self.model)
        self.model.train()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9, nesterov=True)

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """Seconds of the processor."""
        started = time.process_time()
        self.before()
        nn.functional.cross_entropy(self.model(images), labels).backward()
        self.after()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.process_time() - started


def measure(name: str, size: int, batch: int, steps: int) -> str:
    kinds = ("plain", "gates", *RIVALS)
    images, labels = torch.randn(batch, 3, size, size), torch.randint(CLASSES, (batch,))
    step = {kind: partial(Stepper(name, size, kind).step, images, labels) for kind in kinds}
    median = medians(step, steps)
    ratios = [f"{median[kind] / median['plain']:.2f}" for kind in kinds[1:]]
    return f"| `{name}` | {size} | {batch} | {1e3 * median['plain']:.0f} | {' | '.join(ratios)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["prunus/resnet14_s2", "prunus/resnet20"])
    parser.add_argument("--size", type=int, default=28, help="side of the images")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    for name in given.models:
        print(measure(name, given.size, given.batch, given.steps), flush=True)


if __name__ == "__main__":
    main()
