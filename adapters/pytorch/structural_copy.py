"""Copies of a model that share its tensors: cheap, for whoever replaces tensors and never writes into one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prunus.adapters.pytorch.copies import detached


def structural_copy(model: nn.Module) -> nn.Module:
    """Modules and attributes are copies, parameters, buffers and plain tensor attributes are the same objects."""
    shared: dict[int, Any] = {id(p): p for p in model.parameters()}
    shared.update((id(b), b) for b in model.buffers())
    for module in model.modules():
        shared.update((id(v), v) for v in vars(module).values() if isinstance(v, Tensor))
    return copy.deepcopy(model, detached(model, shared))


def separate_copy(model: nn.Module, *, parameters: bool = True) -> nn.Module:
    """A copy that may write into buffers: they are its own, with `parameters` so is every other tensor."""
    own: dict[int, Any] = {id(b): b.detach().clone() for b in model.buffers()}
    for parameter in model.parameters():
        value = nn.Parameter(parameter.detach().clone(), parameter.requires_grad) if parameters else parameter
        own[id(parameter)] = value
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and id(value) not in own:
                own[id(value)] = value.detach().clone() if parameters else value
    return copy.deepcopy(model, detached(model, own))


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


def expressive_copy(model: nn.Module) -> nn.Module:
    """A copy whose output depends on everything: constant parameters and fresh batch statistics become noise.

    Fresh models hide faults behind zeros (classifiers, last norms of residual branches, layer scales).
    Everything else is shared with `model`, which is not changed; the noise is the same each time.
    """
    generator = torch.Generator().manual_seed(0)
    noise: dict[str, Tensor] = {}
    made: dict[int, Tensor] = {}  # tied tensors stay tied
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if _constant(parameter):
            if id(parameter) not in made:
                made[id(parameter)] = _noise(name, parameter.detach(), generator)
            noise[name] = made[id(parameter)]
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")) and _constant(buffer):
            noise[name] = _noise(name, buffer, generator)
    return with_tensors(model, noise)


def _constant(tensor: Tensor) -> bool:
    flat = tensor.detach().flatten()
    if not tensor.is_floating_point() or len(flat) < 2 or flat[0] != flat[-1]:
        return False
    return bool((flat == flat[0]).all())


def _noise(name: str, constant: Tensor, generator: torch.Generator) -> Tensor:
    """A matrix by the number of its inputs, a shift small enough to drown nothing, a scale around one."""
    uniform = torch.rand(constant.shape, generator=generator, dtype=torch.float32) - 0.5
    if constant.dim() > 1 and constant.numel() > max(constant.shape):
        found = uniform * (12 * constant.shape[0] / constant.numel()) ** 0.5
    elif name.endswith(("bias", "mean")):
        found = uniform * 0.1
    else:
        found = 1 + uniform * 0.8
    return found.to(constant)
