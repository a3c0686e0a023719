"""Branches: the sum of them is what the convolution was, and one convolution again; reduced kernels are exact."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from prunus.adapters.pytorch import load
from prunus.adapters.pytorch.artifact import apply_plan
from prunus.adapters.pytorch.branches import KINDS, BranchedConv2d
from prunus.adapters.pytorch.branching import branch_out, branched_convs, merge_branches, settle_norms
from prunus.adapters.pytorch.gating import Gating
from prunus.adapters.pytorch.inputs import InputSpec
from prunus.adapters.pytorch.session import open_session
from prunus.adapters.pytorch.shrinking_model import Origin, ShrinkingModel
from prunus.adapters.pytorch.zoo import ZOO
from prunus.core.cost import IntArray
from prunus.core.directives import Evaluate, Grow, Measure, Merge, Remove, Train
from prunus.core.errors import PlanError, VerificationError
from prunus.core.graph import ChannelGraph
from prunus.core.plan import Branching, ModelSource, PruningPlan
from prunus.core.settings import make_settings
from prunus.core.signals import Signal

SIZE = 32
MODELS: dict[str, Callable[[], nn.Module]] = {
    "prunus/resnet8": lambda: ZOO["resnet8"](in_chans=3),
    "prunus/vgg11_bn_small": lambda: ZOO["vgg11_bn_small"](in_chans=3),
    "timm/resnet10t": lambda: timm.create_model("resnet10t", layers=(2, 1, 1, 1), channels=(8, 8, 16, 16)),
    "torchvision/vgg11": lambda: torchvision.models.vgg11(num_classes=7),  # biases and no norms
}


def _lively(model: nn.Module) -> nn.Module:
    """As of a trained model: no scale is 0 or 1, no statistic that of a fresh norm."""
    for name, tensor in model.state_dict().items():
        if tensor.dim() == 1 and tensor.is_floating_point():
            if name.endswith(("bias", "mean")):
                nn.init.normal_(tensor, 0.0, 0.2)
            else:
                nn.init.uniform_(tensor, 0.5, 1.5)
    return model


def _fresh(name: str) -> nn.Module:
    torch.manual_seed(0)
    return _lively(MODELS[name]())


def _shrinking(name: str) -> ShrinkingModel:
    spec = InputSpec((3, SIZE, SIZE), (0.0,) * 3, (1.0,) * 3)
    return ShrinkingModel(_fresh(name), Origin(ModelSource(name=name), spec, lambda s: _fresh(s.name), {}), "cpu")


def _images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5))


def _answer(model: nn.Module, images: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model.eval()(_images() if images is None else images)


def _difference(got: Tensor, expected: Tensor) -> float:
    return float(((got - expected).abs().max() / expected.abs().max()).detach())


def _branch_all(shrinking: ShrinkingModel) -> None:
    names = tuple(name for name, kernel in shrinking.graph.kernels.items() if kernel.branches)
    assert names
    shrinking.grow(Grow({}, branches=names), 3)


def _some(graph: ChannelGraph, seed: int) -> dict[str, IntArray]:
    rng = np.random.default_rng(seed)
    keep = {}
    for name, group in graph.prunable.items():
        if group.equal_count is None and group.multiple_of == 1:
            keep[name] = np.sort(rng.choice(group.units, max(group.min_kept, group.units // 2), replace=False))
    return graph.check_keep(keep)


def _measured_macs(model: nn.Module) -> float:
    with FlopCounterMode(display=False) as counter:
        _answer(model, _images(1))
    return counter.get_total_flops() / 2


# ---- one convolution ------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_branch_of_every_kind_merges_exactly_at_the_border_too(
    kind: str, stride: int, size: int, bias: bool
) -> None:
    torch.manual_seed(0)
    width = 6 if kind == "identity" else 4
    conv = nn.Conv2d(6, width, size, stride, padding=size // 2, bias=bias)
    branched = _lively(BranchedConv2d.beside(conv, Branching(kinds=[kind], inner=5, norm=None)))
    images = torch.randn(2, 6, 9, 8)
    expected = _answer(branched, images)
    merged, constant = branched.merged()
    got = _answer(merged, images) + constant.to(expected)[:, None, None]
    assert got.shape == expected.shape == conv(images).shape
    assert _difference(got, expected) < 1e-5
    assert merged.kernel_size == ((1, 1) if kind in ("point", "identity") else (size, size))


def test_all_kinds_together_are_what_the_convolution_was() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 6, 3, padding=1, bias=False)
    model = nn.Sequential(conv, nn.BatchNorm2d(6))
    images = torch.randn(4, 6, 9, 8)
    expected = _answer(copy.deepcopy(model), images)
    branch_out(model, {"0": Branching(kinds=list(KINDS), inner=6, norm="1")}, seed=0)
    assert list(branched_convs(model)["0"].branches) == list(KINDS)
    assert _difference(_answer(model, images), expected) < 1e-5
    settle_norms(model, ["0"], [images])
    assert _difference(_answer(model, images), expected) < 1e-5
    merge_branches(model)
    assert _difference(_answer(model, images), expected) < 1e-5
    assert torch.allclose(model[0].weight, conv.weight, atol=1e-6)  # and so every branch was undone


def test_settled_norms_leave_the_function_in_training_nearly_as_it_was() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6))
    images = torch.randn(256, 6, 8, 8)
    expected = copy.deepcopy(model).train()(images)
    branch_out(model, {"0": Branching(kinds=list(KINDS), inner=6, norm="1")}, seed=0)
    unsettled = _difference(copy.deepcopy(model).train()(images), expected)
    settle_norms(model, ["0"], [images])
    assert _difference(model.train()(images), expected) < 1e-3 < unsettled


# ---- whole networks -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_network_branched_trained_pruned_and_merged_is_exact_at_every_step(name: str) -> None:
    shrinking = _shrinking(name)
    images = _images()
    dense, whole = _answer(shrinking.module), shrinking.graph.cost()
    _branch_all(shrinking)
    assert _difference(_answer(shrinking.module), dense) < 1e-5
    assert shrinking.graph.cost() == whole  # costs are those of the merged kernels
    assert shrinking.forward_macs == _measured_macs(shrinking.module) > whole.macs
    optimizer = torch.optim.SGD(shrinking.module.parameters(), 1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        shrinking.module.train()(images).square().mean().backward()
        optimizer.step()
    keep = _some(shrinking.graph, 0)
    gone = [b.name for b in shrinking.graph.blocks.values() if b.of and b.name.endswith(("pool", "squeeze"))]
    first = shrinking.graph.blocks[gone[0]].of
    gone.append(f"{first}.kernel")  # one convolution is left with branches that see one tap
    check = shrinking.remove(keep, gone, verified=True, seed=3)
    assert check.max_error <= 1e-5 * check.scale
    branched = _answer(shrinking.module)
    check = shrinking.merge(4, verified=True)
    assert check.max_error <= 1e-5 * check.scale
    assert _difference(_answer(shrinking.module), branched) < 1e-5
    assert not branched_convs(shrinking.module) and not shrinking.plan.branches
    assert shrinking.module.get_submodule(first).kernel_size == (1, 1)
    cost = shrinking.graph.cost()
    assert cost.macs == shrinking.forward_macs == _measured_macs(shrinking.module)
    assert cost.params == sum(p.numel() for p in shrinking.module.parameters())
    again = _fresh(name)
    apply_plan(again, PruningPlan.model_validate_json(shrinking.plan.model_dump_json(by_alias=True)))
    again.load_state_dict(shrinking.module.state_dict())
    assert torch.equal(_answer(again), _answer(shrinking.module))
    assert type(again.get_submodule(first)) is nn.Conv2d


@pytest.mark.parametrize("name", [*MODELS, "depthwise"])
def test_reduced_kernels_equal_kernels_of_zeros_at_the_cost_foretold(name: str) -> None:
    if name == "depthwise":
        MODELS["depthwise"] = lambda: timm.create_model("mobilenetv3_small_050", num_classes=7)
    shrinking = _shrinking(name)
    names = list(shrinking.graph.kernels)[1::2]
    by_hand = copy.deepcopy(shrinking.module)
    for kernel in names:
        weight = by_hand.get_submodule(kernel).weight
        middle = weight.shape[-1] // 2
        closed = torch.zeros_like(weight)
        closed[:, :, middle, middle] = weight.detach()[:, :, middle, middle]
        weight.data.copy_(closed)
    foretold = shrinking.graph.without_kernels(names).cost()
    check = shrinking.remove(shrinking.graph.check_keep({}), (), names, verified=True, seed=0)
    assert check.max_error <= 1e-5 * check.scale
    assert _difference(_answer(shrinking.module), _answer(by_hand)) < 1e-5
    assert all(shrinking.module.get_submodule(kernel).kernel_size == (1, 1) for kernel in names)
    assert shrinking.graph.cost() == foretold
    assert foretold.macs == _measured_macs(shrinking.module)
    assert foretold.params == sum(p.numel() for p in shrinking.module.parameters())
    rest = list(shrinking.graph.kernels)
    check = shrinking.remove(_some(shrinking.graph, 1), (), rest, verified=True, seed=0)  # and then channels, too
    assert check.max_error <= 1e-5 * check.scale
    again = _fresh(name)
    apply_plan(again, shrinking.plan)
    again.load_state_dict(shrinking.module.state_dict())
    assert torch.equal(_answer(again), _answer(shrinking.module))


def test_a_reduction_that_takes_the_wrong_tap_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    shrinking = _shrinking("prunus/resnet8")
    name = next(iter(shrinking.graph.kernels))
    right = ChannelGraph.kernel_indices

    def wrong(graph: ChannelGraph, names: list[str]) -> dict[tuple[str, int], IntArray]:
        return {axis: index - 1 for axis, index in right(graph, names).items()}

    monkeypatch.setattr(ChannelGraph, "kernel_indices", wrong)
    with pytest.raises(VerificationError):
        shrinking.remove(shrinking.graph.check_keep({}), (), [name], verified=True, seed=0)


def test_a_merge_that_forgets_the_border_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    shrinking = _shrinking("prunus/resnet8")
    _branch_all(shrinking)
    _lively(shrinking.module)
    monkeypatch.setattr("prunus.adapters.pytorch.branches.BranchedConv2d.merged", _forgetting_constants)
    with pytest.raises(VerificationError):
        shrinking.merge(0, verified=True)


_RIGHT = BranchedConv2d.merged


def _forgetting_constants(branched: BranchedConv2d) -> tuple[nn.Conv2d, Tensor]:
    conv, constant = _RIGHT(branched)
    return conv, torch.zeros_like(constant)


def test_convolutions_whose_taps_or_positions_would_move_are_not_offered() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.valid = nn.Conv2d(3, 8, 3)
            self.dilated = nn.Conv2d(8, 8, 3, padding=2, dilation=2)
            self.even = nn.Conv2d(8, 8, 2, padding=1)
            self.mirrored = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
            self.oblong = nn.Conv2d(8, 8, (3, 1), padding=(1, 0))
            self.bare = nn.Conv2d(8, 8, 3, padding=1, bias=False)
            self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
            self.twice = nn.Conv2d(8, 8, 3, padding=1)
            self.head = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.oblong(self.mirrored(self.even(self.dilated(self.valid(x)))))
            x = self.twice(self.twice(self.grouped(self.bare(x).relu())))
            return self.head(x.mean((2, 3)))

    spec = InputSpec((3, SIZE, SIZE), (0.0,) * 3, (1.0,) * 3)
    graph = ShrinkingModel(Odd(), Origin(ModelSource(name="x"), spec, lambda s: Odd(), {}), "cpu").graph
    assert set(graph.kernels) == {"bare", "grouped", "twice"}
    assert not any(
        kernel.branches for kernel in graph.kernels.values()
    )  # no home for a constant, groups, two calls


# ---- the adapter ----------------------------------------------------------------------------------


@pytest.fixture
def session():  # type: ignore[no-untyped-def]
    settings = {"model": "prunus/resnet8", "data": "digits", "train_limit": 200, "batch_size": 40, "threads": 1}
    return open_session(make_settings(settings))


def test_a_branch_gated_to_zero_is_a_branch_removed(session) -> None:  # type: ignore[no-untyped-def]
    adapter = session.adapter
    name = next(name for name, kernel in adapter.graph.kernels.items() if kernel.branches)
    adapter.grow(Grow({}, branches=(name,)))
    adapter.train(Train(epochs=1))
    images = torch.randn(4, *session.describe().input_size)
    with Gating(adapter.model.eval(), adapter.shrinking.wiring, {f"{name}.pool": np.zeros(1)}):
        gated = _answer(adapter.model, images)
    seen = adapter.measure(
        Measure(frozenset({Signal.WEIGHT, Signal.ACTIVATION_MEAN}), gates={f"{name}.pool": np.zeros(1)})
    )
    kernel = seen.read(Signal.WEIGHT, f"{name}.weight")  # signals are those of the merged model
    assert seen.read(Signal.WEIGHT, f"{name}.pool.norm.weight").shape == (kernel.shape[0],)
    changed = adapter.remove(Remove({}, blocks=(f"{name}.pool",)))
    assert f"{name}.pool" not in changed.graph.blocks
    assert _difference(_answer(adapter.model, images), gated) < 1e-5
    merged = adapter.merge(Merge())
    weight = adapter.model.get_submodule(name).weight.detach().double().numpy()
    assert np.allclose(weight, kernel, atol=1e-5 * np.abs(kernel).max())
    assert not merged.plan.branches and merged.graph.kernels


def test_training_through_branches_counts_what_they_take_and_decays_what_is_weak(session) -> None:  # type: ignore[no-untyped-def]
    adapter = session.adapter
    plain = adapter.train(Train(epochs=1)).macs
    names = tuple(name for name, kernel in adapter.graph.kernels.items() if kernel.branches)
    adapter.grow(Grow({}, branches=names))
    assert adapter.train(Train(epochs=1)).macs / plain == pytest.approx(
        adapter.forward_macs / adapter.graph.cost().macs
    )
    branch = f"{names[0]}.squeeze"
    before = float(adapter.model.get_submodule(branch).norm.weight.detach().norm())
    plainly = copy.deepcopy(adapter)
    plainly.train(Train(epochs=1, lr=1e-3))
    assert float(plainly.model.get_submodule(branch).norm.weight.detach().norm()) > 0.8 * before
    adapter.train(Train(epochs=1, lr=1e-3, decay={branch: np.full(1, 500.0)}))
    assert float(adapter.model.get_submodule(branch).norm.weight.detach().norm()) < 0.4 * before


def test_a_run_with_branches_goes_on_from_its_checkpoint(session, tmp_path) -> None:  # type: ignore[no-untyped-def]
    adapter = session.adapter
    names = tuple(name for name, kernel in adapter.graph.kernels.items() if kernel.branches)
    adapter.grow(Grow({}, branches=names))
    adapter.train(Train(epochs=1))
    adapter.remove(Remove({}, blocks=(f"{names[0]}.pool", f"{names[0]}.kernel", f"{names[0]}.squeeze")))
    adapter.checkpoint(tmp_path)
    other = open_session(session.settings).adapter
    other.restore(tmp_path)
    assert other.plan == adapter.plan and other.graph.fingerprint == adapter.graph.fingerprint
    for each in (adapter, other):
        each.train(Train(epochs=1))
        each.merge(Merge())
    images = torch.randn(4, *session.describe().input_size)
    assert torch.equal(_answer(other.model, images), _answer(adapter.model, images))


def test_a_finished_run_with_branches_loads_as_the_original_class(session, tmp_path) -> None:  # type: ignore[no-untyped-def]
    adapter = session.adapter
    names = tuple(name for name, kernel in adapter.graph.kernels.items() if kernel.branches)
    adapter.grow(Grow({}, branches=names))
    adapter.train(Train(epochs=1))
    adapter.merge(Merge())
    kernels = tuple(adapter.graph.kernels)[1:3]
    plan = adapter.remove(Remove({}, kernels=kernels, refit="sequential")).plan
    session.save(tmp_path, plan, {})
    model = load(tmp_path)
    assert [type(m) for m in model.modules()] == [type(m) for m in adapter.model.modules()]
    assert all(model.get_submodule(name).kernel_size == (1, 1) for name in kernels)
    images = torch.randn(4, *session.describe().input_size)
    assert torch.equal(_answer(model, images), _answer(adapter.model, images))


def test_a_refit_makes_up_for_taps_that_are_gone(session) -> None:  # type: ignore[no-untyped-def]
    adapter = session.adapter
    adapter.train(Train(epochs=8))
    losses = {}
    for refit in ("none", "sequential"):
        other = copy.deepcopy(adapter)
        other.remove(Remove({}, kernels=tuple(adapter.graph.kernels)[1:4], refit=refit))
        losses[refit] = other.evaluate(Evaluate(split="calibration")).loss
    assert losses["sequential"] < 0.7 * losses["none"]


def test_a_plan_of_another_model_says_so() -> None:
    plan = PruningPlan(
        model=ModelSource(name="x"), branches={"nowhere": Branching(kinds=["kernel"], inner=0, norm=None)}
    )
    with pytest.raises(PlanError, match="no convolution 'nowhere'"):
        apply_plan(_fresh("prunus/resnet8"), plan)
