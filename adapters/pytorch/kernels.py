"""Convolutions of a PyTorch model whose kernels can be reduced to one tap, or run as branches."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prunus.adapters.pytorch.branches import KINDS
from prunus.adapters.pytorch.comparison import evaluating
from prunus.adapters.pytorch.refit_layers import watch_layers
from prunus.core.graph import ChannelGraph
from prunus.core.kernels import Kernel


@torch.no_grad()
def find_kernels(model: nn.Module, graph: ChannelGraph, args: tuple[Any, ...]) -> dict[Kernel, str | None]:
    """Kernel -> the batch norm that takes the convolution's output as it is, or None; in the model's order.

    Offered are plain convolutions with a square odd kernel, zeros as padding and positions that stay where they
    are, whose weight and bias have no other use; branches beside those that run once, on batches, are not grouped,
    have somewhere for a constant to go, a bias or that norm, and of whose weight and bias nothing is read from
    outside: branches have others, and no hooks. Runs the model once on `args`.
    """
    able = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Conv2d
        and _centred(module)
        and f"{name}.weight" in graph.tensors
        and any(term.source == name and term.quantity == "macs" for term in graph.terms)
    }
    if not able:
        return {}
    with evaluating(model):
        seen = watch_layers(model, args)
    paths = {module: name for name, module in model.named_modules()}
    found = {}
    for name, module in able.items():
        if module not in seen.calls or module in seen.shared:
            continue
        norm = seen.norms.get(module)
        alone = seen.calls[module] == 1 and module not in seen.looked_at and module not in seen.unbatched
        alone = alone and not (module._forward_hooks or module._forward_pre_hooks)  # branches would be without
        branches = _branches(module) if alone and (module.bias is not None or norm) else ()
        found[Kernel(name, f"{name}.weight", module.kernel_size[0], branches)] = paths[norm] if norm else None
    return found


def _centred(conv: nn.Conv2d) -> bool:
    height, width = conv.kernel_size
    return (
        height == width
        and height > 1
        and height % 2 == 1
        and conv.padding == (height // 2, width // 2)
        and conv.padding_mode == "zeros"
        and conv.dilation == (1, 1)
    )


def _branches(conv: nn.Conv2d) -> tuple[str, ...]:
    if conv.groups != 1:
        return ()
    passes = conv.stride == (1, 1) and conv.in_channels == conv.out_channels
    return tuple(kind for kind in KINDS if kind != "identity" or passes)


def close_taps(tensors: Mapping[str, Tensor], graph: ChannelGraph, names: Collection[str]) -> None:
    """Puts zeros, in place, where the kernels `names` of `graph` lose their taps: the reference of a reduction."""
    for name in names:
        kernel = graph.kernel(name)
        weight = tensors[kernel.tensor]
        centre = weight[:, :, kernel.centre, kernel.centre].clone()
        weight.zero_()
        weight[:, :, kernel.centre, kernel.centre] = centre
