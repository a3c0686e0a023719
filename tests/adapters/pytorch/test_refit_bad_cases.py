"""What no refit and no branch may touch, and what users' hooks and norms must not be taken for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from timm.layers import FrozenBatchNormAct2d
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from prunus.adapters.pytorch.kernels import find_kernels
from prunus.adapters.pytorch.refit import Refitted, refit
from prunus.adapters.pytorch.refit_layers import watch_layers
from prunus.adapters.pytorch.surgery import remove
from prunus.adapters.pytorch.tracing import trace_model

Mode = Literal["least-squares", "sequential"]
MODES: tuple[Mode, ...] = ("least-squares", "sequential")
TWINS = (2, 7)
"""Units of `first` that do the same: where the second goes, the first can do its work."""


class Net(nn.Module):
    """Two convolutions, the second with a norm; `beside` adds to what that norm takes."""

    def __init__(self, beside: Callable[[Net, Tensor], Tensor] | None = None, bias: bool = True) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1, bias=bias)
        self.norm: nn.Module = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)
        self.beside = beside

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu(self.first(images))
        y = self.second(x)
        if self.beside is not None:
            y = y + self.beside(self, x)
        return self.head(torch.relu(self.norm(y)).mean((2, 3)))


def images_of(count: int) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def refitted(dense: nn.Module, mode: Mode, gone: tuple[int, ...] = (TWINS[1],)) -> tuple[nn.Module, Refitted]:
    """`dense` without the units `gone` of every layer that is called `first`, refitted, and what was done."""
    dense.double().eval()
    images = images_of(96)
    graph = trace_model(dense, images[:2]).graph
    keep = {}
    for name in [n for n in graph.tensors if n.endswith("first.weight")]:
        group = graph.groups[graph.slices_of[name, 0][0][0]]
        keep[group.name] = [unit for unit in range(group.units) if unit not in gone]
    model = copy.deepcopy(dense)
    remove(model, graph, keep)
    return model, refit(model, dense, graph, graph.kept_indices(keep), [images], mode, share=1e-12)


def with_twins(model: Net) -> Net:
    one, other = TWINS
    with torch.no_grad():
        model.first.weight[other], model.first.bias[other] = model.first.weight[one], model.first.bias[one]
    return model


def furthest(model: nn.Module, dense: nn.Module) -> float:
    with torch.no_grad():
        return float((model(images_of(96)) - dense(images_of(96))).abs().max())


def by_function(net: Net, x: Tensor) -> Tensor:
    return F.conv2d(x.abs(), net.second.weight, padding=1)


def by_bias(net: Net, x: Tensor) -> Tensor:
    assert net.second.bias is not None
    return x.mean() * net.second.bias[:, None, None]


def by_dtype(net: Net, x: Tensor) -> Tensor:
    return x.new_ones(1).to(net.second.weight.dtype)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("beside", "what"), [(by_function, "weight"), (by_bias, "bias")])
def test_a_layer_whose_weight_or_bias_is_used_by_a_function_too_is_left_and_named(
    beside: Callable[[Net, Tensor], Tensor], what: str, mode: Mode
) -> None:
    torch.manual_seed(0)
    dense = Net(beside)
    model, done = refitted(dense, mode)
    assert done.skipped == {"second": f"its {what} is used more than once"}
    assert "second" not in done.layers
    assert torch.equal(model.second.weight, dense.second.weight[:, [*range(7)]])


class Tied(nn.Module):
    """Its decoder is the encoder's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.encoder, self.head = nn.Linear(64, 8), nn.Linear(8, 12, bias=False), nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu(self.first(images[:, 0].flatten(1)))
        return self.head(torch.relu(self.encoder(x)) @ self.encoder.weight)


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_whose_weight_decodes_too_is_left_and_named(mode: Mode) -> None:
    torch.manual_seed(0)
    _, done = refitted(Tied(), mode)
    assert done.skipped == {"encoder": "its weight is used more than once"}
    assert done.layers == ["head"]


def test_reading_the_dtype_of_a_weight_is_no_use_of_it() -> None:
    torch.manual_seed(0)
    dense = with_twins(Net(by_dtype))
    model, done = refitted(dense, "sequential")
    assert "second" in done.layers and not done.skipped
    assert furthest(model, dense) < 1e-8


@pytest.mark.parametrize(
    ("beside", "offered", "branches"),
    [(None, True, True), (by_dtype, True, False), (by_function, False, False), (by_bias, False, False)],
)
def test_kernels_and_branches_are_offered_where_nobody_else_needs_the_weight(
    beside: Callable[[Net, Tensor], Tensor] | None, offered: bool, branches: bool
) -> None:
    torch.manual_seed(0)
    model, images = Net(beside).eval(), images_of(2).float()
    kernels = {kernel.name: kernel for kernel in find_kernels(model, trace_model(model, images).graph, (images,))}
    assert kernels["first"].branches
    assert ("second" in kernels) == offered
    assert bool(offered and kernels["second"].branches) == branches


def test_a_layer_is_refitted_to_its_own_output_whatever_hooks_make_of_input_and_output() -> None:
    torch.manual_seed(0)
    dense = with_twins(Net())
    dense.second.register_forward_pre_hook(lambda module, args: (args[0] * 2 + 1,))
    dense.second.register_forward_hook(lambda module, args, output: torch.relu(output - 0.3))
    model, done = refitted(dense, "sequential")
    assert "second" in done.layers
    assert furthest(model, dense) < 1e-8


class Constants(Net):
    """What does not come from images: linear layers on a code, convolutions on a table."""

    def __init__(self, batch: tuple[int, ...]) -> None:
        super().__init__(lambda net, x: net.scales().reshape(1, -1, 1, 1) * x.mean() + net.places())
        self.code, self.table = nn.Parameter(torch.randn(*batch, 24)), nn.Parameter(torch.randn(*batch, 4, 8, 8))
        self.coder = nn.ModuleDict({"first": nn.Linear(24, 12), "last": nn.Linear(12, 8)})
        self.drawer = nn.ModuleDict({"first": nn.Conv2d(4, 12, 3, padding=1), "last": nn.Conv2d(12, 8, 1)})

    def scales(self) -> Tensor:
        return self.coder["last"](torch.relu(self.coder["first"](self.code)))

    def places(self) -> Tensor:
        return self.drawer["last"](torch.relu(self.drawer["first"](self.table)))


@pytest.mark.parametrize("mode", MODES)
def test_layers_without_a_batch_axis_are_left_and_named(mode: Mode) -> None:
    torch.manual_seed(0)
    dense = Constants(())
    model, done = refitted(dense, mode)
    assert done.skipped == dict.fromkeys(["coder.last", "drawer.last"], "its output has no batch axis")
    assert "second" in done.layers and not {"coder.last", "drawer.last"} & {*done.layers}
    assert torch.equal(model.drawer["last"].bias, dense.drawer["last"].bias)
    kernels = find_kernels(dense, trace_model(dense, images_of(2)).graph, (images_of(2),))
    assert {kernel.name: bool(kernel.branches) for kernel in kernels}["drawer.first"] is False


@pytest.mark.parametrize("mode", MODES)
def test_layers_on_a_batch_of_one_are_refitted(mode: Mode) -> None:
    torch.manual_seed(0)
    _, done = refitted(Constants((1,)), mode)
    assert not done.skipped and {"coder.last", "drawer.last"} <= {*done.layers}


class OverChannels(nn.Module):
    """Mixes positions by linear layers, behind maps whose first axis are the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 2, 2)
        self.mixer = nn.ModuleDict({"first": nn.Linear(16, 10), "last": nn.Linear(10, 16)})
        self.head = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(images).flatten(2)
        y = self.mixer["last"](torch.relu(self.mixer["first"](x.transpose(0, 1))))
        return self.head((x + y.transpose(0, 1)).mean(2))


def test_a_layer_with_channels_in_the_place_of_images_is_left_and_named() -> None:
    torch.manual_seed(0)
    _, done = refitted(OverChannels(), "sequential")
    assert done.skipped == {"mixer.last": "it runs over other positions than in the dense model"}
    assert done.layers == ["head"]


class OwnNorm(nn.Module):
    """Written by hand, with an axis for the batch."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(1, channels, 1, 1) + 0.5)
        self.register_buffer("running_mean", torch.randn(1, channels, 1, 1))
        self.register_buffer("running_var", torch.rand(1, channels, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.running_mean) * self.running_var.rsqrt() * self.weight


@pytest.mark.parametrize("mode", MODES)
def test_a_norm_of_ones_own_is_not_shifted(mode: Mode) -> None:
    torch.manual_seed(0)
    dense = with_twins(Net(bias=False))
    dense.norm = OwnNorm(8)
    model, done = refitted(dense, mode)
    assert "second" in done.layers
    assert torch.equal(model.norm.running_mean, dense.norm.running_mean)
    assert furthest(model, dense) < 1e-8


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d, FrozenBatchNormAct2d])
def test_batch_norms_take_a_constant_if_nothing_comes_between(kind: type[nn.Module]) -> None:
    model = Net()
    model.norm = kind(8)
    model.eval()
    assert watch_layers(model, (images_of(2).float(),)).norms == {model.second: model.norm}
    model.second.register_forward_hook(lambda module, args, output: output.mul_(2))
    assert not watch_layers(model, (images_of(2).float(),)).norms
