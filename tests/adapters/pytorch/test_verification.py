"""Verification sees faults, accepts rounding, and leaves the model as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from prunus.adapters.pytorch.certification import random_keep
from prunus.adapters.pytorch.comparison import copied_state, distance
from prunus.adapters.pytorch.inputs import InputSpec
from prunus.adapters.pytorch.structural_copy import skeleton, with_tensors
from prunus.adapters.pytorch.surgery import remove
from prunus.adapters.pytorch.verification import Prepared, prepare, state_of, verify
from prunus.core.errors import VerificationError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.body(x).relu()
        return self.head(x.mean((2, 3)))


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def net(images: Tensor) -> Net:
    torch.manual_seed(0)
    net = Net()
    net.train()(images * 3 + 1)
    return net


def _pruned(net: Net, prepared: Prepared) -> tuple[Net, dict[str, list[int]]]:
    keep = random_keep(prepared.graph, 3)
    pruned = copy.deepcopy(net)
    remove(pruned, prepared.graph, keep)
    return pruned, keep


def test_a_right_removal_is_exact(net: Net, images: Tensor) -> None:
    prepared = prepare(net, images)
    pruned, keep = _pruned(net, prepared)
    verdict = verify(pruned, prepared, state_of(net), keep, images)
    assert verdict.kind == "exact"
    assert verdict.max_error <= 1e-5 * verdict.scale


def test_random_inputs_of_a_kind_do_as_well(net: Net, images: Tensor) -> None:
    prepared = prepare(net, images)
    pruned, keep = _pruned(net, prepared)
    spec = InputSpec((3, 6, 6), (0.5,) * 3, (0.5,) * 3)
    assert verify(pruned, prepared, state_of(net), keep, spec).scale > 0


@pytest.mark.parametrize("fault", ["wrong units", "stale statistics", "not finite", "small"])
def test_a_wrong_removal_is_refused_with_its_figures(net: Net, images: Tensor, fault: str) -> None:
    prepared = prepare(net, images)
    pruned, keep = _pruned(net, prepared)
    with torch.no_grad():
        if fault == "wrong units":
            pruned.stem.weight.copy_(pruned.stem.weight.flip(0))
        elif fault == "stale statistics":
            pruned.norm.running_mean.copy_(pruned.norm.running_mean.roll(1))
        elif fault == "not finite":
            pruned.head.bias[0] = float("nan")
        else:
            pruned.head.bias.add_(0.01)
    with pytest.raises(VerificationError) as caught:
        verify(pruned, prepared, state_of(net), keep, images)
    assert caught.value.max_error > 1e-4 * caught.value.scale
    assert caught.value.exit_code == 5


def test_rounding_of_float32_is_told_from_a_fault_in_float64(net: Net, images: Tensor) -> None:
    prepared = prepare(net, images)
    pruned, keep = _pruned(net, prepared)
    assert verify(pruned, prepared, state_of(net), keep, images, tolerance=1e-12).max_error < 1e-12


def test_modes_stay_as_they_were(net: Net, images: Tensor) -> None:
    prepared = prepare(net, images)
    assert net.training
    pruned, keep = _pruned(net, prepared)
    pruned.norm.eval()
    verify(pruned, prepared, state_of(net), keep, images)
    assert pruned.training and not pruned.norm.training


def test_the_function_and_the_tensors_of_a_prepared_model_stay(net: Net, images: Tensor) -> None:
    before = copied_state(net)
    with torch.no_grad():
        expected = copy.deepcopy(net).eval()(images)
    prepare(net, images)
    assert all(torch.equal(before[name], tensor) for name, tensor in state_of(net).items())
    with torch.no_grad():
        assert torch.equal(net.eval()(images), expected)


def test_random_keeps_obey_the_graph(net: Net, images: Tensor) -> None:
    graph = prepare(net, images).graph
    shares = set()
    for seed in range(20):
        keep = random_keep(graph, seed)
        graph.check_keep(keep)
        shares.update(len(units) / graph.groups[name].units for name, units in keep.items())
    assert min(shares) < 0.4 and max(shares) > 0.8


def test_distance_is_infinite_where_outputs_cannot_be_compared() -> None:
    a = torch.ones(2, 3)
    assert distance({"a": a}, {"a": a}) == (0.0, 1.0)
    assert distance([a, a], [a]) == (float("inf"), 0.0)
    assert distance(a[:1], a) == (float("inf"), 0.0)
    assert distance(a * float("nan"), a)[0] == float("inf")


class Selecting(nn.Module):
    """Asks for values, as detection models do: what was captured for one input is not true for another."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(self.stem(x).relu())
        kept = torch.nonzero(x[0, 0].flatten() > 0)[:, 0]
        return x.flatten(2)[:, :, kept.tolist()]


def test_a_model_that_selects_by_value_is_compared_through_its_python_code(images: Tensor) -> None:
    torch.manual_seed(0)
    model = Selecting().eval()
    prepared = prepare(model, images)
    assert prepared.trace.program.concrete
    keep = {"stem.weight": [0, 3, 4, 6]}
    pruned = copy.deepcopy(model)
    remove(pruned, prepared.graph, keep)
    assert verify(pruned, prepared, copied_state(model), keep, images).scale > 0
    with torch.no_grad():
        pruned.stem.weight.copy_(pruned.stem.weight.flip(0))
    with pytest.raises(VerificationError):
        verify(pruned, prepared, copied_state(model), keep, images)


class Coupled(Net):
    """To every image the same is added: what the body makes of the mean image of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.body(x.mean(0, keepdim=True)).relu()
        return self.head(x.mean((2, 3)))


def test_images_that_depend_on_each_other_are_compared_in_the_same_batch(images: Tensor) -> None:
    torch.manual_seed(0)
    net = Coupled().eval()
    prepared = prepare(net, images[:2])
    pruned, keep = _pruned(net, prepared)
    assert verify(pruned, prepared, state_of(net), keep, images[:2]).kind == "exact"
    with torch.no_grad():
        pruned.body.weight.mul_(1.01)
    with pytest.raises(VerificationError, match="is not the masked one"):
        verify(pruned, prepared, state_of(net), keep, images[:2])


def test_a_skeleton_takes_no_memory_and_becomes_the_model_again(net: Net, images: Tensor) -> None:
    bare = skeleton(net.eval())
    assert all(parameter.is_meta for parameter in bare.parameters())
    with torch.no_grad():
        assert torch.equal(with_tensors(bare, state_of(net))(images), net(images))
    assert all(parameter.is_meta for parameter in bare.parameters())
