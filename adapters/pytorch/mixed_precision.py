"""Mixed precision: short numbers where they are fast, float32 where they are not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

Amp = Literal["off", "bf16", "fp16"]
FIRST_SCALE = 2.0**13
"""Of losses in float16: large enough for small gradients, and few steps are lost where it is too large."""


def autocast(device: str, amp: Amp) -> AbstractContextManager[Any]:
    """Where the forward pass happens."""
    if amp == "off":
        return nullcontext()
    return torch.autocast(torch.device(device).type, dtype=torch.float16 if amp == "fp16" else torch.bfloat16)


def make_scaler(device: str, amp: Amp) -> torch.amp.GradScaler | None:
    """Keeps small gradients from vanishing in float16; no other format needs it."""
    return torch.amp.GradScaler(torch.device(device).type, init_scale=FIRST_SCALE) if amp == "fp16" else None


@contextmanager
def depthwise_in_float32(model: nn.Module) -> Iterator[None]:
    """Leaves depthwise convolutions of `model` out of autocast, for the block. For trainings on processors.

    There their backward pass takes 2 to 30 times as long in bfloat16 as in float32 where the stride is 2 or the
    kernel 5 and more (torch 2.14), and forward little is won: memory decides, not arithmetic.
    `benchmarks/mixed_precision.py` measures what that makes of whole steps.
    """
    changed: list[tuple[nn.Module, Any]] = []
    try:
        for module in model.modules():
            if isinstance(module, _ConvNd) and 1 < module.groups == module.in_channels:
                changed.append((module, vars(module).get("forward")))
                # of the instance, not a mode of the thread: what is computed again in a backward pass is met too
                module.forward = partial(_outside_autocast, module.forward, next(module.parameters()).dtype)
        yield
    finally:
        for module, own in changed:
            del module.forward
            if own is not None:
                module.forward = own


def _outside_autocast(forward: Callable[..., Tensor], dtype: torch.dtype, *given: Any, **named: Any) -> Tensor:
    """`dtype`: of the weights, which images that come in short numbers have to meet."""

    def met(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) else value

    with torch.autocast("cpu", enabled=False):
        return forward(*map(met, given), **{name: met(value) for name, value in named.items()})
