"""Sparse learning before the removal, at the strength of the authors' recipe however short it is.

The recipe (their reproduce/main.py, CIFAR): 100 epochs of 391 steps at a peak rate of 0.01, regularised by
reg 5e-4 (GroupNorm), 1e-5 (slimming), 1e-4 growing by 1e-5 an epoch (GrowingReg). Here the rate is the same
and the coefficients are multiplied by 39,100 / steps, so that rate x coefficient x steps is theirs.
"""

from __future__ import annotations

import torch_pruning as tp
from torch import nn

from benchmarks.rivals.bench import Bench
from prunus.core.directives import Train

AUTHORS_STEPS = 100 * 391
LR = 0.01
REG = {tp.pruner.GroupNormPruner: 5e-4, tp.pruner.BNScalePruner: 1e-5, tp.pruner.GrowingRegPruner: 1e-4}
DELTA = 1e-5
GROWTHS = 100
"""How often GrowingReg's coefficients grow."""


class SparseLearning:
    """One sparse training of a pruner's model; also the hook that adds the regulariser's gradient."""

    def __init__(self, pruner: tp.pruner.BasePruner, epochs: float, steps_per_epoch: int) -> None:
        self._pruner, self._epochs = pruner, epochs
        self._steps = max(1, round(epochs * steps_per_epoch))
        self._done = 0
        factor = AUTHORS_STEPS / self._steps
        strength = REG[type(pruner)] * factor
        if isinstance(pruner, tp.pruner.GrowingRegPruner):
            pruner.base_reg, pruner.delta_reg = strength, DELTA * factor
        else:
            pruner.reg = strength
        pruner.update_regularizer()

    def run(self, bench: Bench, model: nn.Module) -> float:
        """Returns the training MACs spent."""
        macs = bench.graph.cost().macs
        return bench.train(model, Train(epochs=self._epochs, lr=LR, label="sparse"), macs, make_hook=lambda: self)

    def before_forward(self) -> None:
        """Nothing changes before the forward pass."""

    def after_backward(self) -> None:
        pruner = self._pruner
        pruner.regularize(pruner.model)
        self._done += 1
        grown, before = (done * GROWTHS // self._steps for done in (self._done, self._done - 1))
        if isinstance(pruner, tp.pruner.GrowingRegPruner):
            for _ in range(grown - before):
                pruner.update_reg()
