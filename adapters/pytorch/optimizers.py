"""What training is done with: optimizer, precision, memory layout."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn

from prunus.adapters.pytorch.mixed_precision import Amp
from prunus.adapters.pytorch.mixing import Mixing
from prunus.adapters.pytorch.optimizer_state import carry_state
from prunus.adapters.pytorch.random_state import seeded
from prunus.adapters.pytorch.schedule import Schedule
from prunus.adapters.pytorch.surgery import reindex
from prunus.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """The run's choices, the same for all its trainings."""

    lr: float = 0.1
    """Peak learning rate where a directive names none."""
    optimizer: str = "sgd"
    """sgd, adamw, or any name that timm knows; see `check_optimizer`."""
    momentum: float = 0.9
    weight_decay: float = 5e-4
    """Of weights with two axes or more; norms and biases do not decay."""
    clip: float | None = None
    """Largest norm of all gradients together."""
    device: str = "cpu"
    amp: Amp = "off"
    """Mixed precision in bfloat16, or in float16 with scaled losses."""
    channels_last: bool = True
    accumulate: int = 1
    """Parts in which a batch is computed, one after the other, to save memory."""
    compile: bool = False
    """Compile the model for training, where that can be done."""
    average: float | None = None
    """Decay of a moving average of the weights; see `settled_average`."""
    mixing: Mixing = field(default_factory=Mixing)
    schedule: Schedule = field(default_factory=Schedule)

    def clipped(self, norm: float | None) -> TrainingSettings:
        """These, with gradients no longer than `norm` either."""
        limits = [limit for limit in (self.clip, norm) if limit is not None]
        return replace(self, clip=min(limits, default=None))

    def make_optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        """SGD with Nesterov's momentum, AdamW, or one of timm's, over the parameters that train."""
        trained = [p for p in module.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        if not groups:
            raise ConfigError("the model has no parameter that trains")
        if self.optimizer == "adamw":
            return torch.optim.AdamW(groups, lr=self.lr)
        if self.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.momentum > 0)
        return create_optimizer_v2(groups, self.optimizer, lr=self.lr, momentum=self.momentum)

    def check_optimizer(self) -> None:
        """Raises ConfigError if there is no such optimizer, or none whose state can follow removals."""
        if self.optimizer not in list_optimizers():
            near = difflib.get_close_matches(self.optimizer, list_optimizers(), n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "it knows sgd, adamw, lamb, nadamw, lion, ..."
            raise ConfigError(f"timm knows no optimizer {self.optimizer!r}; {hint}", key="opt")
        try:
            with seeded(0):  # a trial must not draw from the run's random numbers
                self._try_a_removal()
        except Exception as error:  # each optimizer fails in a way of its own
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            raise ConfigError(
                f"--opt {self.optimizer} cannot be used here: its trial with a removal failed ({reason}); "
                "take sgd, adamw, lamb, nadamw, lion, ...",
                key="opt",
            ) from None

    def _try_a_removal(self) -> None:
        """Two steps with a removal between, down to sizes for which Adafactor and its kin no longer factor."""
        trial = nn.ModuleDict({"conv": nn.Conv2d(36, 40, 3), "square": nn.Linear(36, 36)})
        optimizer = self.make_optimizer(trial)
        self._step(optimizer)
        kept = np.arange(0, 36, 3)
        carry_state(optimizer, reindex(trial, {("conv.weight", 0): kept, ("square.weight", 1): kept}))
        self._step(optimizer)

    @staticmethod
    def _step(optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.randn_like(parameter)
        optimizer.step()


@contextmanager
def channels_last(module: nn.Module, wanted: bool) -> Iterator[None]:
    """Weights of convolutions in the layout that is fastest to train, in the usual one afterwards.

    Saved weights are in the usual layout, and kernels of another layout round differently: a model must
    answer the same before it is saved and after it is loaded. Weights of four axes alone have that layout.
    """
    if wanted:
        _lay_out(module, torch.channels_last)
    try:
        yield
    finally:
        if wanted:
            _lay_out(module, torch.contiguous_format)


def _lay_out(module: nn.Module, layout: torch.memory_format) -> None:
    module._apply(lambda tensor: tensor.to(memory_format=layout) if tensor.dim() == 4 else tensor)
