"""Refits that need the dense model's channel statistics only: one map from kept to removed channels.

A removed channel is predicted by a linear map A of the kept ones (`least-squares`), the same for every
tap of a kernel, or by its mean (`bias`, A = 0). Its weights move onto the kept channels by that map.
Border effects of padding and errors of earlier layers are not seen; `sequential` sees both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prunus.adapters.pytorch.covariance import Moments
from prunus.adapters.pytorch.patches import layer_input, weight_rows
from prunus.adapters.pytorch.refit_layers import Layer
from prunus.adapters.pytorch.regression import RIDGE, bounded_share, ridge
from prunus.core.errors import TrainingError

BUDGET = 1 << 30
"""Bytes of covariances held at a time; a single layer may exceed it."""
WIDEST = 6000
"""Inputs of a layer up to which its covariance is collected; beyond it only means are, as for `bias`."""


def refit_by_channels(
    dense: nn.Module,
    layers: list[Layer],
    images: Tensor,
    mode: Literal["bias", "least-squares"],
    share: float | None,
    growth: float,
) -> list[str]:
    """Refits every layer that lost inputs, in place; returns their names.

    `share` of the mean diagonal is the strength of the ridge; None is `RIDGE`, or what keeps to `growth`.
    """
    concerned = [layer for layer in layers if layer.kept_inputs is not None]
    changed = []
    for chunk in _chunks(concerned, mode):
        for layer, moments in _collect(dense, chunk, images, mode):
            try:
                _compensate(layer, moments, share, growth)
            except FloatingPointError as error:
                raise TrainingError(f"what reaches {layer.name} is not finite: check data and weights") from error
            changed.append(layer.name)
    return changed


def _squared(layer: Layer, mode: str) -> bool:
    return mode == "least-squares" and layer.dense.weight.shape[1] <= WIDEST


def _chunks(layers: list[Layer], mode: str) -> list[list[Layer]]:
    chunks: list[list[Layer]] = []
    used = 0
    for layer in layers:
        slots, width = layer.slots_of_dense, layer.dense.weight.shape[1]
        size = 8 * slots * width * (width if _squared(layer, mode) else 1)
        if not chunks or used + size > BUDGET:
            chunks.append([])
            used = 0
        chunks[-1].append(layer)
        used += size
    return chunks


def _collect(dense: nn.Module, layers: list[Layer], images: Tensor, mode: str) -> list[tuple[Layer, Moments]]:
    found = []
    handles = []
    for layer in layers:
        width = layer.dense.weight.shape[1]
        moments = Moments(width, layer.slots_of_dense, full=_squared(layer, mode))
        handles.append(layer.dense.register_forward_pre_hook(_observer(layer, moments), with_kwargs=True))
        found.append((layer, moments))
    try:
        dense(images)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _observer(layer: Layer, moments: Moments) -> Callable[..., None]:
    shape = (-1, layer.slots_of_dense, layer.dense.weight.shape[1])

    def observe(module: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Any]) -> None:
        for part in layer_input(args, kwargs).split(32):
            channels_last = part if isinstance(module, nn.Linear) else part.flatten(2).transpose(1, 2)
            moments.add(channels_last.reshape(shape))

    return observe


def _compensate(layer: Layer, moments: Moments, share: float | None, growth: float) -> None:
    """W_K += W_R A at every tap, and the constant W_R (mu_R - A mu_K)."""
    assert layer.kept_inputs is not None
    slots = layer.kept_slots
    kept = layer.kept_inputs
    width = layer.dense.weight.shape[1]
    gone = torch.tensor(sorted(set(range(width)) - set(kept.tolist())), dtype=torch.int64)
    mean = moments.mean[slots]
    dense_rows = weight_rows(layer.dense, layer.dense.weight).to("cpu", torch.float64)
    removed = layer.of_kept_rows(dense_rows).unflatten(2, (width, -1))[:, :, gone]  # (slots, out, gone, taps)
    if moments.covariance.dim() == 3:
        second = moments.covariance[slots]
        if not layer.shiftable:  # no constant can be added: second moments about zero
            second = second + mean.unsqueeze(2) * mean.unsqueeze(1)
        among, between = second[:, kept][:, :, kept], second[:, gone][:, :, kept]
        odds = None if layer.odds is None else layer.odds.expand(len(slots), -1)
        nothing = torch.zeros(len(slots), len(gone), len(kept), dtype=torch.float64)

        def moved(onto_kept: Tensor) -> Tensor:
            both = torch.einsum("sogt,sgk->sokt", removed, onto_kept)
            return layer.pruned.weight + both.reshape(layer.pruned.weight.shape).to(layer.pruned.weight)

        if share is None:
            largest = layer.largest_norm(growth)
            share = bounded_share(
                lambda s: float(moved(ridge(among, between, nothing, odds, s)).norm()), RIDGE, largest
            )
        onto_kept = ridge(among, between, nothing, odds, share)  # A: (slots, gone, kept)
        layer.pruned.weight.data.copy_(moved(onto_kept))
        rest = mean[:, gone] - (onto_kept @ mean[:, kept].unsqueeze(2)).squeeze(2)
    else:
        rest = mean[:, gone]
    if layer.shiftable:
        layer.shift(torch.einsum("sogt,sg->so", removed, rest).flatten())
