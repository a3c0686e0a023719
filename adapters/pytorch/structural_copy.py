"""Copies of a model that share its tensors: cheap, for whoever replaces tensors and never writes into one."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn


def structural_copy(model: nn.Module) -> nn.Module:
    """Modules and attributes are copies, parameters, buffers and plain tensor attributes are the same objects."""
    shared: dict[int, Any] = {id(p): p for p in model.parameters()}
    shared.update((id(b), b) for b in model.buffers())
    for module in model.modules():
        shared.update((id(v), v) for v in vars(module).values() if isinstance(v, Tensor))
    return copy.deepcopy(model, shared)
