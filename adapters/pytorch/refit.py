"""Refitting what is left of a model to the function that the dense model computes (methods, section 0).

`sequential` walks the layers in forward order in one pass of the pruned model over all images: each layer
is regressed, before it runs, on the inputs that reach it through the layers already refitted, towards the
dense model's outputs at the same positions. `least-squares` and `bias` need the dense model's channel
statistics only (`channel_refit`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from prunus.adapters.pytorch.channel_refit import refit_by_channels
from prunus.adapters.pytorch.covariance import Moments
from prunus.adapters.pytorch.patches import Sample, layer_input, outputs, rows, runs_over, sample, weight_rows
from prunus.adapters.pytorch.progress import Progress
from prunus.adapters.pytorch.refit_layers import Layer, find_layers
from prunus.adapters.pytorch.regression import GROWTH
from prunus.adapters.pytorch.regression_data import UNCHANGED, MomentData, RegressionData, RowData
from prunus.adapters.pytorch.signals import Batch, images_of, measuring
from prunus.core.cost import FloatArray, IntArray
from prunus.core.directives import Refit
from prunus.core.errors import TrainingError
from prunus.core.graph import Axis, ChannelGraph

POSITIONS = 64
"""Output positions of an image that a regression looks at, at most."""
ROWS = 1 << 15
"""Rows of a regression, at most, if that leaves one for each image."""
WIDEST = 6000
"""Inputs of a row up to which the covariance is solved; beyond it `NARROW` rows are, by the dual system."""
NARROW = 2048
MEMORY = 5 << 29
"""Bytes for activations of all images at once; fewer images are used where they do not fit. With what else a run
holds, ResNet-50 stays below 6 GiB (benchmarks/results/memory.md)."""
TARGET_MEMORY = 5 << 28
"""Bytes for the dense model's sampled outputs; fewer positions are used where they do not fit."""
FOLDS = 2
"""Parts of the images, each of which judges what is fitted to the others."""


@dataclass(slots=True)
class Refitted:
    """What a refit did."""

    layers: list[str] = field(default_factory=list)
    """Refitted, in forward order."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Layers with removed inputs that keep their copied weights, with the reason."""
    images: int = 0
    """How many images were used."""

    @property
    def left_out(self) -> str:
        """What was skipped, in words for the user."""
        name, reason = next(iter(self.skipped.items()))
        return f"{len(self.skipped)} layers were not refitted, {name} among them: {reason}"


@torch.no_grad()
def refit(
    pruned: nn.Module,
    dense: nn.Module,
    graph: ChannelGraph,
    kept_indices: Mapping[Axis, IntArray],
    batches: Iterable[Batch],
    mode: Refit,
    survival: Mapping[str, FloatArray] | None = None,
    places: Mapping[str, Sequence[IntArray | None]] | None = None,
    *,
    share: float | None = None,
    trains: bool = True,
    progress: Callable[[Progress], None] | None = None,
) -> Refitted:
    """Refits `pruned`, in place, to the function of `dense`; module names must agree, blocks may be missing.

    `graph` and `kept_indices` (axis -> indices that stay) are those of the dense model. `survival`:
    group -> (units of `graph`,), the probability that a unit goes next. `places`: weight of a linear layer that
    runs over channels -> for every axis of its output between images and features, the entries that stay, None
    for all. The weights that `pruned` has are
    what the ridge pulls towards; its strength is `share` of the mean diagonal, or, if None, the one that
    predicts held-out images best (`sequential`) and, if the model `trains` afterwards, keeps the norm of a
    layer's weights within `GROWTH`: larger ones predict better and fall apart in training. Where nothing was
    removed, or nothing has to be compensated, nothing changes, bit for bit. Layers whose weight or bias is used
    more than once in a forward pass, or which do more with their weight than multiply, or run on something else
    than images, are left; `Refitted.skipped` names them. A layer is refitted to what it makes of its input itself,
    before any forward hook of the user. `progress` is told after every layer of a `sequential` refit, and may
    raise to stop.
    Raises TrainingError if what reaches a layer is not finite.
    """
    smaller = _size(pruned) < _size(dense)
    if mode == "none" or not (smaller or survival):
        return Refitted()
    images, growth = _images(pruned, dense, batches), GROWTH if trains else inf
    with measuring(pruned, dense):
        layers, skipped = find_layers(pruned, dense, graph, kept_indices, survival or {}, images[:2], places or {})
        if mode == "sequential":
            changed = _sequential(pruned, dense, layers, images, share, growth, progress, skipped)
        else:
            changed = refit_by_channels(dense, layers, images, mode, share, growth)
    return Refitted(changed, skipped, len(images))


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _images(pruned: nn.Module, dense: nn.Module, batches: Iterable[Batch]) -> Tensor:
    """As many images of the batches as fit into memory, all at once."""
    collected: list[Tensor] = []
    count, room = 0, 0
    for batch in batches:
        images = images_of(batch, pruned)
        if not collected:
            with measuring(dense):
                room = max(MEMORY // _bytes_of_one(dense, images[:1]), 2)
        collected.append(images[: room - count])
        count += len(collected[-1])
        if count >= room:
            break
    if not count:
        raise TrainingError("there are no calibration images to refit with")
    return torch.cat(collected)


def _bytes_of_one(model: nn.Module, image: Tensor) -> int:
    """What one image takes on its way: four maps of the largest size are alive at a time."""
    largest = image.numel() * image.element_size()

    def look(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal largest
        if isinstance(output, Tensor):
            largest = max(largest, output.numel() * output.element_size())

    handles = [module.register_forward_hook(look) for module in model.modules()]
    try:
        model(image)
    finally:
        for handle in handles:
            handle.remove()
    return 4 * largest


def _sequential(
    pruned: nn.Module,
    dense: nn.Module,
    layers: list[Layer],
    images: Tensor,
    share: float | None,
    growth: float,
    progress: Callable[[Progress], None] | None,
    skipped: dict[str, str],
) -> list[str]:
    """The names of the layers that changed; those that turn out to run over other positions go into `skipped`."""
    targets = _dense_outputs(dense, layers, images)
    total = len(targets)
    changed: list[str] = []

    def before(layer: Layer) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Any]) -> None:
            target = targets.pop(layer.name)
            input = layer_input(args, kwargs)
            if runs_over(layer.pruned, input) != target.over:
                if layer.shrunk:
                    skipped[layer.name] = "it runs over other positions than in the dense model"
            elif _regress(layer, input, target.where, target.wanted, share, growth):
                changed.append(layer.name)
            if progress is not None:
                progress(Progress("refit", total - len(targets), total))

        return hook

    ahead = [layer for layer in layers if layer.name in targets]
    # not prepended: the user's pre-hooks may change what the layer is called with
    handles = [layer.pruned.register_forward_pre_hook(before(layer), with_kwargs=True) for layer in ahead]
    try:
        pruned(images)
    finally:
        for handle in handles:
            handle.remove()
    return changed


@dataclass(frozen=True, slots=True, eq=False)
class _Target:
    """What a layer is regressed towards."""

    where: Sample
    wanted: Tensor
    """(rows, kept outputs): the dense outputs there."""
    over: tuple[int, ...]
    """`runs_over` of what the layer must be called with."""


def _dense_outputs(dense: nn.Module, layers: list[Layer], images: Tensor) -> dict[str, _Target]:
    """For each layer: the sampled positions, and the dense outputs there."""
    widths = [layer.pruned.weight.shape[0] for layer in layers]
    room = TARGET_MEMORY // max(images.element_size() * sum(widths), 1)
    limit = min(POSITIONS * len(images), max(min(room, ROWS), len(images)))
    targets: dict[str, _Target] = {}

    def after(layer: Layer, seed: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Any], output: Tensor) -> None:
            wide = layer.pruned.weight[0].numel() > WIDEST
            output = layer.of_kept_places(output)
            over = runs_over(layer.dense, output if layer.kept_places else layer_input(args, kwargs))
            where = sample(layer.dense, output, min(limit, NARROW) if wide else limit, seed)
            parts = outputs(layer.dense, output, where)
            wanted = torch.cat([layer.of_kept_outputs(part) for part in parts])
            targets[layer.name] = _Target(where, wanted, over)

        return hook

    handles = [
        layer.dense.register_forward_hook(after(layer, i), with_kwargs=True, prepend=True)  # before the user's
        for i, layer in enumerate(layers)
    ]
    try:
        dense(images)
    finally:
        for handle in handles:
            handle.remove()
    return targets


def _regress(
    layer: Layer, input: Tensor, where: Sample, wanted: Tensor, share: float | None, growth: float
) -> bool:
    """Regresses `wanted` on what reaches the layer; False if its weights give that already."""
    prior = weight_rows(layer.pruned, layer.pruned.weight).to("cpu", torch.float64)
    targets = wanted.reshape(len(wanted), *prior.shape[:2])
    gather = _rows if prior.shape[2] > min(len(where), WIDEST) else _moments
    data = gather(layer, input, where, targets)
    try:
        weights = data.fit(prior, layer.odds_of(prior), share, layer.largest_norm(growth))
    except FloatingPointError as error:
        raise TrainingError(f"what reaches {layer.name} is not finite: check data and weights") from error
    constant = data.target_mean - (weights @ data.mean.unsqueeze(2)).squeeze(2)
    if layer.pruned.bias is not None:
        constant = constant - layer.pruned.bias.detach().to("cpu", torch.float64).view_as(constant)
    if weights is prior and (not layer.shiftable or _negligible(constant, targets)):
        return False
    layer.pruned.weight.data.copy_(weights.reshape(layer.pruned.weight.shape))
    layer.shift(constant.flatten())
    return True


def _moments(layer: Layer, input: Tensor, where: Sample, targets: Tensor) -> RegressionData:
    slots, outputs, inputs = *targets.shape[1:], layer.pruned.weight[0].numel()
    folds = [Moments(inputs, slots, targets=outputs) for _ in range(FOLDS)]
    at = 0
    for part, images in zip(rows(layer.pruned, input, where), where.image_of_rows(), strict=True):
        wanted = targets[at : at + len(part)]
        for k, fold in enumerate(folds):
            mine = images % FOLDS == k
            fold.add(part[mine], wanted[mine])
        at += len(part)
    return MomentData(folds, layer.shiftable)


def _rows(layer: Layer, input: Tensor, where: Sample, targets: Tensor) -> RegressionData:
    x = torch.cat(list(rows(layer.pruned, input, where))).to("cpu", torch.float64).transpose(0, 1)
    y = targets.to("cpu", torch.float64).transpose(0, 1)
    return RowData(x, y, torch.cat(list(where.image_of_rows())) % FOLDS, layer.shiftable)


def _negligible(constant: Tensor, targets: Tensor) -> bool:
    return bool(constant.norm() <= UNCHANGED * targets.double().std(0, correction=0).norm())
