"""Batch norms that take their statistics over the images of all processes, in training.

torch's own SyncBatchNorm runs on accelerators only and needs other modules in the model. Here the function
is intercepted, so that timm's and torchvision's variants are covered, on every device. The moments of the
processes are merged in double precision: a step is that of one process with the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from prunus.adapters.pytorch.interception import Answer, BatchNormCall, Interception


class _Total(torch.autograd.Function):
    """The sum over all processes, of which each takes the gradient of all."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor) -> Tensor:
        total = mine.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


class SharedNorms(Interception):
    """While active, `batch_norm` in training mode with running statistics normalises over all processes.

    A batch norm without running statistics (also one that standardises weights) is left as it is.
    """

    def __init__(self, watched: Callable[[], AbstractContextManager[None]]) -> None:
        """`watched`: around everything that needs the other processes."""
        super().__init__({F.batch_norm: self._batch_norm})
        self._watched = watched

    def _batch_norm(self, *args: Any, **kwargs: Any) -> Answer:
        call = BatchNormCall(*args, **kwargs)
        if not call.training or call.running_mean is None or call.running_var is None:
            return NotImplemented
        input = call.input
        x = input.float() if input.dtype in (torch.bfloat16, torch.float16) else input
        mean, variance, count = self._moments(x)
        with torch.no_grad():
            call.running_mean.lerp_(mean.to(call.running_mean.dtype), call.momentum)
            unbiased = variance * (count / (count - 1))
            call.running_var.lerp_(unbiased.to(call.running_var.dtype), call.momentum)
        scale = torch.rsqrt(variance + call.eps).to(x.dtype)
        if call.weight is not None:
            scale = scale * call.weight
        shape = [1, -1, *([1] * (x.dim() - 2))]
        result = (x - mean.to(x.dtype).view(shape)) * scale.view(shape)
        if call.bias is not None:
            result = result + call.bias.view(shape)
        return result.to(input.dtype)

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor, float]:
        """Mean and biased variance of each channel over all processes, float64, and the number of values."""
        axes = [0, *range(2, x.dim())]
        variance, mean = torch.var_mean(x, axes, correction=0)
        count = x.numel() / x.shape[1]
        mean, variance = mean.double(), variance.double()
        mine = torch.cat([mean * count, (variance + mean.square()) * count, mean.new_tensor([count])])
        with self._watched():
            total: Tensor = _Total.apply(mine)
        count = float(total[-1].detach())
        mean, square = (total[:-1] / count).chunk(2)
        return mean, (square - mean.square()).clamp(min=0), count
