"""Refitting against brute force on small networks with every kind of layer it passes."""

from __future__ import annotations

import copy
from typing import Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from prunus.adapters.pytorch import refit as refit_module
from prunus.adapters.pytorch.refit import Refitted, refit
from prunus.adapters.pytorch.refit_layers import Layer
from prunus.adapters.pytorch.regression import GROWTH, RIDGE
from prunus.adapters.pytorch.surgery import remove
from prunus.core.errors import TrainingError
from prunus.core.graph import ChannelGraph, ChannelGroup, Role, Slice

MODES: tuple[Literal["bias", "least-squares", "sequential"], ...] = ("bias", "least-squares", "sequential")


def piece(tensor: str, axis: int, role: Role, units: int, run: int = 1) -> Slice:
    return Slice(tensor, axis, role, np.repeat(np.arange(units), run))


class Net(nn.Module):
    """conv (no bias) + norm, depthwise + norm, conv with bias, grouped conv, flatten, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 6, 3, stride=2, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(6)
        self.third = nn.Conv2d(6, 4, 3, padding=1, groups=2)
        self.head = nn.Linear(4 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first_norm(self.first(x)))
        x = torch.relu(self.depthwise_norm(self.depthwise(x)))
        x = torch.relu(self.second_norm(self.second(x)))
        return self.head(torch.relu(self.third(x)).flatten(1))


def norm(module: str, units: np.ndarray) -> list[Slice]:
    return [Slice(f"{module}.{n}", 0, "scales", units) for n in ("weight", "bias", "running_mean", "running_var")]


def graph_of(model: Net) -> ChannelGraph:
    eight, within = np.arange(8), np.arange(6) % 3
    first = [piece("first.weight", 0, "writes", 8), *norm("first_norm", eight), *norm("depthwise_norm", eight)]
    first += [piece("depthwise.weight", 0, "scales", 8), piece("second.weight", 1, "reads", 8)]
    second = [Slice("second.weight", 0, "writes", within), *norm("second_norm", within)]
    second += [piece("third.weight", 1, "reads", 3)]
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items() if t.dim()}
    groups = [
        ChannelGroup("first.weight", 8, tuple(first)),
        ChannelGroup("second.weight", 3, tuple(second)),
    ]
    return ChannelGraph(groups, [], shapes)


@pytest.fixture
def dense() -> Net:
    generator = torch.Generator().manual_seed(0)
    model = Net().double().eval()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.4
            tensor.copy_(values.abs() + 0.5 if "running_var" in name else values)
    return model


@pytest.fixture
def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randn(192, 3, 4, 4, generator=generator, dtype=torch.float64)
    return list(F.interpolate(coarse, size=8, mode="bilinear").split(50))


def pruned_of(dense: Net, keep: dict[str, list[int]]) -> tuple[Net, ChannelGraph, dict]:
    model, graph = copy.deepcopy(dense), graph_of(dense)
    remove(model, graph, keep)
    return model, graph, graph.kept_indices(keep)


def error(model: nn.Module, dense: nn.Module, batches: list[Tensor]) -> float:
    x = torch.cat(batches)
    with torch.no_grad():
        return float((model(x) - dense(x)).square().mean())


WRITER: tuple[tuple[str, Role], ...] = (("weight", "writes"), ("bias", "scales"))
KEEP = {"first.weight": [0, 2, 3, 5, 6], "second.weight": [0, 2]}


def test_each_mode_is_nearer_to_the_dense_function_than_the_one_before(dense: Net, batches: list[Tensor]) -> None:
    errors = []
    for mode in ("none", *MODES):
        model, graph, kept = pruned_of(dense, KEEP)
        refit(model, dense, graph, kept, batches, mode)
        errors.append(error(model, dense, batches))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[1]


def test_sequential_is_least_squares_on_the_unfolded_patches_of_the_pruned_model(
    dense: Net, batches: list[Tensor]
) -> None:
    model, graph, kept = pruned_of(dense, {"first.weight": KEEP["first.weight"]})
    copied = copy.deepcopy(model)
    x = torch.cat(batches)
    done = refit(model, dense, graph, kept, batches, "sequential", share=1e-12)
    assert done.layers == ["second", "third", "head"]
    assert done.images == 192
    with torch.no_grad():
        before = torch.relu(
            copied.depthwise_norm(copied.depthwise(torch.relu(copied.first_norm(copied.first(x)))))
        )
        patches = F.unfold(before, 3, padding=1, stride=2).transpose(1, 2).flatten(0, 1)
        full = torch.relu(dense.depthwise_norm(dense.depthwise(torch.relu(dense.first_norm(dense.first(x))))))
        wanted = dense.second(full).flatten(2).transpose(1, 2).flatten(0, 1)
    with_one = torch.cat([patches, torch.ones(len(patches), 1, dtype=torch.float64)], 1)
    solution = torch.linalg.lstsq(with_one, wanted).solution
    with torch.no_grad():
        constant = copied.second_norm.running_mean - model.second_norm.running_mean
        found = patches @ model.second.weight.flatten(1).T + constant
    torch.testing.assert_close(found, with_one @ solution, rtol=1e-3, atol=1e-4)


def test_channels_that_are_combinations_of_kept_ones_are_recovered_exactly(batches: list[Tensor]) -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3), nn.Conv2d(4, 2, 1)).double().eval()
    with torch.no_grad():
        dense[0].weight[5] = dense[0].weight[0] - 2 * dense[0].weight[2]
    slices = (piece("0.weight", 0, "writes", 6), piece("0.bias", 0, "scales", 6), piece("1.weight", 1, "reads", 6))
    shapes = {name: tuple(t.shape) for name, t in dense.state_dict().items()}
    graph = ChannelGraph([ChannelGroup("0.weight", 6, slices)], [], shapes)
    keep = {"0.weight": [0, 1, 2, 3, 4]}
    for mode, share in (("least-squares", 1e-10), ("sequential", 1e-10)):
        model = copy.deepcopy(dense)
        remove(model, graph, keep)
        assert error(model, dense, batches) > 1e-3
        refit(model, dense, graph, graph.kept_indices(keep), batches, mode, share=share)  # type: ignore[arg-type]
        # padding: the removed bias at a border is no combination, so the interior is compared
        assert error(model, dense, [b[:, :, 1:-1, 1:-1] for b in batches]) < 1e-3
        inside = torch.cat(batches)
        with torch.no_grad():
            torch.testing.assert_close(model(inside), dense(inside), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES[1:])
def test_weights_that_are_trained_next_do_not_grow_to_tell_apart_what_is_nearly_the_same(
    mode: Literal["least-squares", "sequential"], batches: list[Tensor]
) -> None:
    """The removed channel is ten times the difference of the kept ones: it is given up rather than amplified."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 2, 1)).double().eval()
    with torch.no_grad():
        dense[0].weight[1] = dense[0].weight[0] + 0.1 * dense[0].weight[2]
    slices = (piece("0.weight", 0, "writes", 3), piece("0.bias", 0, "scales", 3), piece("1.weight", 1, "reads", 3))
    shapes = {name: tuple(t.shape) for name, t in dense.state_dict().items()}
    graph = ChannelGraph([ChannelGroup("0.weight", 3, slices)], [], shapes)
    keep = {"0.weight": [0, 1]}

    def grown(share: float | None = None, trains: bool = True) -> float:
        model = copy.deepcopy(dense)
        remove(model, graph, keep)
        refit(model, dense, graph, graph.kept_indices(keep), batches, mode, share=share, trains=trains)
        return float((model[1].weight.norm() / dense[1].weight.norm()).detach()) / (3 / 2) ** 0.5

    assert 1 < grown() <= GROWTH
    assert grown(trains=False) == grown(share=RIDGE) > 1.5 * GROWTH


def test_without_a_limit_weights_of_zero_have_none_either() -> None:
    dense = nn.Linear(3, 2, bias=False)
    nn.init.zeros_(dense.weight)
    layer = Layer("", nn.Linear(2, 2, bias=False), dense, None, None, None)
    assert (layer.largest_norm(torch.inf), layer.largest_norm(2.0)) == (torch.inf, 0.0)


class Stream(nn.Module):
    """A residual stream with two writers and three readers: convolutions of two sizes, and the head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.back = nn.Conv2d(3, 6, 1), nn.Conv2d(5, 6, 1)
        self.into, self.aside = nn.Conv2d(6, 5, 3, padding=1, bias=False), nn.Conv2d(6, 4, 3, bias=False)
        self.into_norm, self.head = nn.BatchNorm2d(5), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        stream = self.stem(x)
        stream = stream + self.back(torch.relu(self.into_norm(self.into(stream))))
        return self.head(stream.mean((2, 3))) + self.aside(stream).mean((2, 3))


def test_every_reader_of_a_residual_stream_makes_up_for_the_channel_that_left_it(batches: list[Tensor]) -> None:
    torch.manual_seed(0)
    dense = Stream().double().eval()
    with torch.no_grad():  # a combination of others in all that writes it, so in the stream itself
        for writer in (dense.stem, dense.back):
            for tensor in (writer.weight, writer.bias):
                tensor[5] = tensor[0] - 2 * tensor[2]
        dense.stem.bias.zero_()  # the border of `into` is padded with zeros
    written = [piece(f"{name}.{t}", 0, role, 6) for name in ("stem", "back") for t, role in WRITER]
    readers = [piece(f"{name}.weight", 1, "reads", 6) for name in ("into", "aside", "head")]
    shapes = {name: tuple(t.shape) for name, t in dense.state_dict().items() if t.dim()}
    graph = ChannelGraph([ChannelGroup("stem.weight", 6, (*written, *readers))], [], shapes)
    keep = {"stem.weight": [0, 1, 2, 3, 4]}
    for mode in ("least-squares", "sequential"):
        model = copy.deepcopy(dense)
        remove(model, graph, keep)
        assert error(model, dense, batches) > 1e-3
        done = refit(model, dense, graph, graph.kept_indices(keep), batches, mode, share=1e-10)
        assert {"into", "aside", "head"} <= set(done.layers)
        assert error(model, dense, batches) < 1e-10


def test_least_squares_moves_weights_by_the_regression_of_removed_on_kept_channels(
    dense: Net, batches: list[Tensor]
) -> None:
    model, graph, kept = pruned_of(dense, {"first.weight": KEEP["first.weight"]})
    refit(model, dense, graph, kept, batches, "least-squares", share=1e-12)
    x = torch.cat(batches)
    with torch.no_grad():
        seen = torch.relu(dense.depthwise_norm(dense.depthwise(torch.relu(dense.first_norm(dense.first(x))))))
    flat = seen.transpose(0, 1).flatten(1).T
    stay, gone = KEEP["first.weight"], [1, 4, 7]
    with_one = torch.cat([flat[:, stay], torch.ones(len(flat), 1, dtype=torch.float64)], 1)
    solution = torch.linalg.lstsq(with_one, flat[:, gone]).solution
    weight = dense.second.weight.detach()
    expected = weight[:, stay] + torch.einsum("ogyx,kg->okyx", weight[:, gone], solution[:-1])
    torch.testing.assert_close(model.second.weight.detach(), expected, rtol=1e-4, atol=1e-5)
    constant = torch.einsum("ogyx,g->o", weight[:, gone], solution[-1])
    moved = dense.second_norm.running_mean - model.second_norm.running_mean
    torch.testing.assert_close(moved, constant, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_removed_changes_nothing(
    dense: Net, batches: list[Tensor], mode: Literal["bias", "least-squares", "sequential"]
) -> None:
    for keep in ({}, {"first.weight": list(range(8))}):
        model, graph, kept = pruned_of(dense, keep)
        assert refit(model, dense, graph, kept, batches, mode) == Refitted()
        before = dense.state_dict()
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("mode", MODES)
def test_removing_what_nobody_hears_changes_nothing_else(
    dense: Net, batches: list[Tensor], mode: Literal["bias", "least-squares", "sequential"]
) -> None:
    with torch.no_grad():
        dense.second.weight[:, [1, 4]] = 0
    model, graph, kept = pruned_of(dense, {"first.weight": [0, 2, 3, 5, 6, 7]})
    before = copy.deepcopy(model.state_dict())
    refit(model, dense, graph, kept, batches, mode)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("mode", MODES)
def test_layers_before_the_first_removal_are_left_bit_for_bit(
    dense: Net, batches: list[Tensor], mode: Literal["bias", "least-squares", "sequential"]
) -> None:
    model, graph, kept = pruned_of(dense, {"second.weight": [0, 2]})
    refit(model, dense, graph, kept, batches, mode)
    for name in ("first.weight", "depthwise.weight", "first_norm.running_mean", "depthwise_norm.running_mean"):
        assert torch.equal(model.state_dict()[name], dense.state_dict()[name])
    assert not torch.equal(model.third.bias, dense.third.bias)


def test_depthwise_layers_are_made_up_for_by_the_next_layer_that_mixes_channels(
    dense: Net, batches: list[Tensor]
) -> None:
    model, graph, kept = pruned_of(dense, KEEP)
    model.first.weight.data.mul_(1.5)  # so that the depthwise layer sees something else than in the dense model
    before = copy.deepcopy(model)
    done = refit(model, dense, graph, kept, batches, "sequential")
    assert done.layers == ["first", "second", "third", "head"]
    assert torch.equal(model.depthwise.weight, before.depthwise.weight)
    assert error(model, dense, batches) < 0.5 * error(before, dense, batches)


def test_fewer_images_than_inputs_go_by_the_smaller_system(
    dense: Net, batches: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = []
    for widest in (6000, 8):
        monkeypatch.setattr(refit_module, "WIDEST", widest)
        monkeypatch.setattr(refit_module, "NARROW", 100_000)
        model, graph, kept = pruned_of(dense, KEEP)
        refit(model, dense, graph, kept, [torch.cat(batches)[:24]], "sequential")
        outcomes.append(model.state_dict())
    for name, tensor in outcomes[0].items():
        torch.testing.assert_close(tensor, outcomes[1][name], rtol=1e-4, atol=1e-5)


def test_the_survival_term_moves_weight_to_the_twin_of_a_unit_that_goes_next(
    dense: Net, batches: list[Tensor]
) -> None:
    first, second = KEEP["first.weight"][:2]
    for name, tensor in dense.state_dict().items():
        if name.startswith(("first", "depthwise")) and tensor.dim():
            tensor[second] = tensor[first]
    sizes = []
    for p in (0.0, 0.5, 0.9):
        model, graph, kept = pruned_of(dense, {"first.weight": KEEP["first.weight"]})
        survival = {"first.weight": np.where(np.arange(8) == second, p, 0.0)}
        refit(model, dense, graph, kept, batches, "sequential", survival)
        sizes.append(float(model.second.weight[:, 1].detach().square().sum()))
        assert model.second.weight.isfinite().all()
    assert sizes[0] > 5 * sizes[1] > 5 * sizes[2]


def test_a_network_whose_units_may_all_vanish_still_computes_what_it_did(
    dense: Net, batches: list[Tensor]
) -> None:
    """Without a bound on the survival term outputs fade out, layer by layer."""
    images = torch.cat(batches)
    found = []
    for p in (0.0, 0.9):
        model, graph, kept = pruned_of(dense, KEEP)
        survival = {name: np.full(group.units, p) for name, group in graph.groups.items()}
        refit(model, dense, graph, kept, batches, "sequential", survival)
        with torch.no_grad():
            found.append(model(images))
    assert (found[1] - found[0]).norm() < 0.1 * (found[0] - found[0].mean(0)).norm()


def test_a_reader_that_cannot_take_a_constant_is_fitted_without_one(batches: list[Tensor]) -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1, bias=False)).double().eval()
    slices = (piece("0.weight", 0, "writes", 6), piece("0.bias", 0, "scales", 6), piece("2.weight", 1, "reads", 6))
    shapes = {name: tuple(t.shape) for name, t in dense.state_dict().items()}
    graph, keep = ChannelGraph([ChannelGroup("0.weight", 6, slices)], [], shapes), {"0.weight": [0, 1, 4]}
    model = copy.deepcopy(dense)
    remove(model, graph, keep)
    refit(model, dense, graph, graph.kept_indices(keep), batches, "sequential", share=1e-12)
    with torch.no_grad():
        seen = dense[1](dense[0](torch.cat(batches)))
        flat = seen.transpose(0, 1).flatten(1).T
        solution = torch.linalg.lstsq(flat[:, [0, 1, 4]], flat @ dense[2].weight.flatten(1).T).solution
    torch.testing.assert_close(model[2].weight.flatten(1), solution.T, rtol=1e-5, atol=1e-6)


def test_images_are_limited_by_memory(dense: Net, batches: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refit_module, "MEMORY", 60 * 4 * 8 * 8 * 8 * 8)
    model, graph, kept = pruned_of(dense, KEEP)
    assert refit(model, dense, graph, kept, batches, "sequential").images == 60


def trained_on_digits() -> tuple[nn.Sequential, Tensor, Tensor, Tensor]:
    """A small batch-norm network after a few epochs; training images, test images, test labels."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 8 - 1
    labels = torch.from_numpy(digits.target)
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in ((1, 16), (16, 24), (24, 24)):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(96, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    for _ in range(8):
        for chosen in torch.randperm(1400).split(100):
            optimizer.zero_grad()
            F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()
    return model.eval(), images[:1400], images[1400:], labels[1400:]


def test_a_trained_network_keeps_its_accuracy_through_the_sequential_refit() -> None:
    dense, train, test, labels = trained_on_digits()
    groups = []
    for at, reads, units, run in (("0", "3", 16, 1), ("3", "6", 24, 1), ("6", "11", 24, 4)):
        slices = [piece(f"{at}.weight", 0, "writes", units), *norm(str(int(at) + 1), np.arange(units))]
        groups.append(
            ChannelGroup(f"{at}.weight", units, (*slices, piece(f"{reads}.weight", 1, "reads", units, run)))
        )
    graph = ChannelGraph(groups, [], {n: tuple(t.shape) for n, t in dense.state_dict().items() if t.dim()})
    rng = np.random.default_rng(0)
    keep = {name: np.sort(rng.permutation(n)[: n // 2]).tolist() for name, n in graph.units.items()}
    accuracy = {"dense": float((dense(test).argmax(1) == labels).float().mean())}
    for mode in ("none", "bias", "least-squares", "sequential"):
        model = copy.deepcopy(dense)
        remove(model, graph, keep)
        refit(model, dense, graph, graph.kept_indices(keep), [train], mode)  # type: ignore[arg-type]
        accuracy[mode] = float((model(test).argmax(1) == labels).float().mean())
    assert accuracy["sequential"] > accuracy["dense"] - 0.05
    assert accuracy["sequential"] > accuracy["none"] + 0.2
    assert accuracy["sequential"] >= max(accuracy["bias"], accuracy["least-squares"])


class Shared(nn.Module):
    """One linear layer used twice: no single regression fits both uses."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(3, 6)
        self.shared = nn.Linear(6, 6)
        self.leave = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.shared(torch.relu(self.shared(torch.relu(self.enter(x))))))


def test_a_layer_that_runs_twice_is_left_and_named() -> None:
    torch.manual_seed(0)
    dense = Shared().double()
    slices = [piece(f"{n}.weight", 0, "writes", 6) for n in ("enter", "shared")]
    slices += [piece(f"{n}.bias", 0, "scales", 6) for n in ("enter", "shared")]
    slices += [piece(f"{n}.weight", 1, "reads", 6) for n in ("shared", "leave")]
    shapes = {name: tuple(t.shape) for name, t in dense.state_dict().items()}
    graph, keep = ChannelGraph([ChannelGroup("g", 6, tuple(slices))], [], shapes), {"g": [0, 2, 3, 5]}
    model = copy.deepcopy(dense)
    remove(model, graph, keep)
    before = model.shared.weight.detach().clone()
    done = refit(
        model, dense, graph, graph.kept_indices(keep), [torch.randn(64, 3, dtype=torch.float64)], "sequential"
    )
    assert torch.equal(model.shared.weight, before)
    assert done.layers == ["leave"]
    assert "more than once" in done.skipped["shared"]


def test_modes_hooks_and_training_flags_are_as_before(dense: Net, batches: list[Tensor]) -> None:
    model, graph, kept = pruned_of(dense, KEEP)
    model.train()
    model.second_norm.eval()
    refit(model, dense, graph, kept, batches, "sequential")
    assert model.training and not model.second_norm.training and not dense.training
    for net in (model, dense):
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in net.modules())


@pytest.mark.parametrize("mode", ["least-squares", "sequential"])
def test_images_that_are_not_finite_are_reported(
    dense: Net, batches: list[Tensor], mode: Literal["least-squares", "sequential"]
) -> None:
    batches[0][0, 0, 0, 0] = float("inf")
    model, graph, kept = pruned_of(dense, KEEP)
    with pytest.raises(TrainingError, match="not finite"):
        refit(model, dense, graph, kept, batches, mode)
