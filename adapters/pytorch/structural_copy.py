"""Copies of a model that share its tensors: cheap, for whoever replaces tensors and never writes into one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def structural_copy(model: nn.Module) -> nn.Module:
    """Modules and attributes are copies, parameters, buffers and plain tensor attributes are the same objects."""
    shared: dict[int, Any] = {id(p): p for p in model.parameters()}
    shared.update((id(b), b) for b in model.buffers())
    for module in model.modules():
        shared.update((id(v), v) for v in vars(module).values() if isinstance(v, Tensor))
    return copy.deepcopy(model, shared)


def skeleton(model: nn.Module) -> nn.Module:
    """A copy whose parameters have shapes but no memory; `with_tensors` gives it weights."""
    bare = structural_copy(model)
    empty: dict[int, nn.Parameter] = {}
    for module in bare.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                hollow = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
                module._parameters[name] = empty.setdefault(id(parameter), hollow)
        for name, buffer in module._buffers.items():
            if buffer is not None:  # buffers outside the state dict come from nowhere else
                module._buffers[name] = buffer.detach().clone()
    return bare


def with_tensors(bare: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of `bare` that holds `tensors` (by name, parameters and buffers) and shares all others with it."""
    model = structural_copy(bare)
    held: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and prefix + name in tensors:
                value = tensors[prefix + name].detach()
                module._parameters[name] = held.setdefault(id(parameter), nn.Parameter(value, False))
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and prefix + name in tensors:
                module._buffers[name] = tensors[prefix + name].detach()
    return model
