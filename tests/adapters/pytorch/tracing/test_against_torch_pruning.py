"""torch-pruning as an independent witness, on the families where it is right: what it would cut, we would."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import torch_pruning as tp
import torchvision
from torch import nn

from prunus.adapters.pytorch.tracing import trace_model
from prunus.core.graph import ChannelGraph, ChannelGroup

Entry = tuple[str, int, int]
"""(tensor, axis, index)"""

FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "resnet18": torchvision.models.resnet18,
    "resnet50": torchvision.models.resnet50,
    "mobilenet_v2": torchvision.models.mobilenet_v2,
    "vgg11_bn": lambda: torchvision.models.vgg11_bn(init_weights=False),
    "densenet121": torchvision.models.densenet121,
}

Traced = tuple[nn.Module, ChannelGraph, tp.DependencyGraph]


@pytest.fixture(scope="module", params=FAMILIES)
def traced(request: pytest.FixtureRequest) -> Traced:
    """One model, our graph of it and torch-pruning's."""
    model, images = FAMILIES[request.param]().eval(), torch.zeros(1, 3, 64, 64)
    return model, trace_model(model, images).graph, tp.DependencyGraph().build_dependency(model, images)


def test_a_unit_takes_along_the_entries_that_torch_pruning_takes_along(traced: Traced) -> None:
    model, graph, witness = traced
    modules, compared = dict(model.named_modules()), 0
    for group_name, group in graph.prunable.items():
        tensor, indices = _written(graph, group)
        for unit in (0, group.units - 1):
            (index,) = np.flatnonzero(indices == unit)
            root = modules[tensor.removesuffix(".weight")]
            taken = witness.get_pruning_group(root, _cut(root), idxs=[int(index)])
            assert set(_entries(graph, group_name, unit)) == set(_witnessed(model, taken)), f"{group_name}, {unit}"
            compared += 1
    assert compared == 2 * len(graph.prunable) > 0


def test_every_layer_that_torch_pruning_can_shrink_belongs_to_a_group(traced: Traced) -> None:
    model, graph, witness = traced
    ours = {s.tensor for group in graph.prunable.values() for s in group.slices if s.role == "writes"}
    theirs = set()
    names = {module: path for path, module in model.named_modules()}
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    for taken in witness.get_all_groups(ignored_layers=[last]):
        for item in taken:
            module = item.dep.target.module
            if isinstance(module, nn.Conv2d | nn.Linear) and witness.is_out_channel_pruning_fn(item.dep.handler):
                theirs.add(f"{names[module]}.weight")
    depthwise = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1}
    assert theirs - depthwise == ours - depthwise


def _written(graph: ChannelGraph, group: ChannelGroup) -> tuple[str, np.ndarray]:
    """A weight that makes the units, and which of its rows makes which."""
    for piece in group.slices:
        if piece.role == "writes" and piece.axis == 0 and len(graph.tensors[piece.tensor]) > 1:
            return piece.tensor, piece.unit_of
    raise AssertionError(f"{group.name} is written by nothing")


def _entries(graph: ChannelGraph, name: str, unit: int) -> Iterator[Entry]:
    for piece in graph.groups[name].slices:
        for index in np.flatnonzero(piece.unit_of == unit):
            yield piece.tensor, piece.axis, int(index)


def _cut(module: nn.Module) -> Callable[..., nn.Module]:
    if isinstance(module, nn.Linear):
        cut: Callable[..., nn.Module] = tp.prune_linear_out_channels
    else:
        cut = tp.prune_conv_out_channels
    return cut


def _witnessed(model: nn.Module, taken: tp.Group) -> Iterator[Entry]:
    """What torch-pruning's group says, in the words of tensors."""
    names = {module: path for path, module in model.named_modules()}
    for item in taken:
        module, cut = item.dep.target.module, item.dep.handler
        if module not in names:  # its stand-ins for reshapes, sums and concatenations
            continue
        path, reads = names[module], cut in (tp.prune_conv_in_channels, tp.prune_linear_in_channels)
        if reads and isinstance(module, nn.Conv2d) and module.groups > 1:
            continue  # a depthwise weight has no axis of inputs
        tensors = {"weight": module.weight} if reads else {**module._parameters, **module._buffers}
        for key, tensor in tensors.items():
            if tensor is not None and tensor.dim():
                for index in item.idxs:
                    yield f"{path}.{key}", 1 if reads else 0, int(index)
