"""Blocks that go as a whole: gated to zero equals removed, at the cost that was foretold, and replayed."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from prunus.adapters.pytorch import load
from prunus.adapters.pytorch.adapter import TRIAL_IMAGES
from prunus.adapters.pytorch.artifact import apply_plan
from prunus.adapters.pytorch.blocks import PassThrough
from prunus.adapters.pytorch.certification import random_keep
from prunus.adapters.pytorch.export import export_onnx
from prunus.adapters.pytorch.gating import Gating, fold
from prunus.adapters.pytorch.inputs import InputSpec
from prunus.adapters.pytorch.refit import refit
from prunus.adapters.pytorch.session import open_session
from prunus.adapters.pytorch.shrinking_model import Origin, ShrinkingModel
from prunus.core.directives import Evaluate, Measure, Refit, Remove, Train
from prunus.core.errors import PlanError
from prunus.core.plan import ModelSource, PruningPlan
from prunus.core.settings import make_settings
from prunus.core.signals import Signal

SIZE = 64
MODELS: dict[str, Callable[[], nn.Module]] = {
    "timm/resnet10t": lambda: timm.create_model("resnet10t", layers=(2, 2, 1, 1), channels=(16, 16, 32, 32)),
    "timm/regnetx_002": lambda: timm.create_model("regnetx_002"),
    "timm/test_convnext": lambda: timm.create_model("test_convnext"),
    "timm/mobilenetv3_small_050": lambda: timm.create_model("mobilenetv3_small_050"),
    "timm/efficientnet_lite0": lambda: timm.create_model("efficientnet_lite0"),
    "timm/test_vit": lambda: timm.create_model("test_vit", img_size=SIZE),
    "torchvision/resnet18": lambda: torchvision.models.resnet18(),
    "torchvision/swin": lambda: torchvision.models.swin_transformer.SwinTransformer(
        [2, 2], 24, [2, 2], [2, 4], [4, 4], num_classes=7
    ),
}


def _fresh(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]()
    for name, tensor in model.state_dict().items():  # as of a trained model: no scale is 0, none 1
        if tensor.dim() == 1 and tensor.is_floating_point():
            if name.endswith(("bias", "mean")):
                nn.init.normal_(tensor, 0.0, 0.2)
            else:
                nn.init.uniform_(tensor, 0.5, 1.5)
    return model


def _shrinking(name: str) -> ShrinkingModel:
    spec = InputSpec((3, SIZE, SIZE), (0.0,) * 3, (1.0,) * 3)
    origin = Origin(ModelSource(name=name), spec, lambda source: _fresh(source.name), {})
    return ShrinkingModel(_fresh(name), origin, "cpu")


def _images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5))


def _answer(model: nn.Module, images: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model.eval()(_images() if images is None else images)


def _close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((got - expected).abs().max() <= tolerance * expected.abs().max())


def _measured_macs(model: nn.Module) -> float:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(_images(1))
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("name", MODELS)
def test_channels_and_blocks_go_in_any_order_and_every_step_is_exact_and_foretold(name: str) -> None:
    shrinking = _shrinking(name)
    images = _images()
    first, *others = shrinking.graph.blocks
    steps: list[tuple[tuple[str, ...], int | None]] = [((first,), None), ((), 0), ((others[-1],), 1)]
    for blocks, seed in steps:
        graph = shrinking.graph
        keep = graph.check_keep(random_keep(graph, seed) if seed is not None else {})
        gates = {block: np.zeros(1) for block in blocks}
        if seed is None:  # channels whole: the gated model computes what will be left
            with Gating(shrinking.module.eval(), graph, gates):
                gated = _answer(shrinking.module, images)
        foretold = graph.restrict(keep).without_blocks(blocks).cost()
        check = shrinking.remove(keep, blocks, verified=True, seed=3)
        assert check.max_error <= 1e-5 * check.scale
        if seed is None:
            assert _close(_answer(shrinking.module, images), gated)
        assert shrinking.graph.cost() == foretold
        assert foretold.params == sum(p.numel() for p in shrinking.module.parameters())
        assert foretold.macs == _measured_macs(shrinking.module)
    again = _fresh(name)
    apply_plan(again, PruningPlan.model_validate_json(shrinking.plan.model_dump_json(by_alias=True)))
    again.load_state_dict(shrinking.module.state_dict())
    assert torch.equal(_answer(again, images), _answer(shrinking.module, images))
    assert sum(p.numel() for p in copy.deepcopy(again).parameters()) == foretold.params
    shrinking.module.train()(images).sum().backward()


def test_a_block_whose_last_norm_is_zeroed_by_hand_equals_the_removed_one() -> None:
    shrinking = _shrinking("torchvision/resnet18")
    by_hand = _fresh("torchvision/resnet18")
    norm = by_hand.get_submodule("layer3.1.bn2")
    nn.init.zeros_(norm.weight), nn.init.zeros_(norm.bias)
    shrinking.remove({}, ("layer3.1",), verified=True, seed=0)
    assert _close(_answer(shrinking.module), _answer(by_hand))
    assert type(shrinking.module.get_submodule("layer3.1")) is nn.Identity


def test_a_block_that_takes_more_than_its_input_is_replaced_by_one_that_takes_it_too() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 16, 16)
            self.blocks = nn.Sequential(Masked(), Masked())  # and yet each is called on its own
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).flatten(2).transpose(1, 2)
            for block in self.blocks:
                x = block(x, x.new_ones(x.shape[1], 1), scale=2.0)
            return self.head(x.mean(1))

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(8, 8)

        def forward(self, x: Tensor, mask: Tensor, scale: float) -> Tensor:
            return x + scale * mask * self.f(x)

    spec = InputSpec((3, SIZE, SIZE), (0.0,) * 3, (1.0,) * 3)
    shrinking = ShrinkingModel(Tokens(), Origin(ModelSource(name="x"), spec, lambda s: Tokens(), {}), "cpu")
    assert list(shrinking.graph.blocks) == ["blocks.0", "blocks.1"]
    shrinking.remove({}, ("blocks.0",), verified=True, seed=0)
    assert type(shrinking.module.get_submodule("blocks.0")) is PassThrough


def test_a_block_of_which_the_python_code_asks_for_more_than_a_call_is_not_offered() -> None:
    class Asking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 16, 16)
            self.blocks = nn.ModuleList([_Adds(1), _Adds(2)])
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for i, block in enumerate(self.blocks):
                x = block(x) if i else block(x) * float(block.number)
            return self.head(x.mean((2, 3)))

    spec = InputSpec((3, SIZE, SIZE), (0.0,) * 3, (1.0,) * 3)
    shrinking = ShrinkingModel(Asking(), Origin(ModelSource(name="x"), spec, lambda s: Asking(), {}), "cpu")
    assert list(shrinking.graph.blocks) == ["blocks.1"]


class _Adds(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.f = number, nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x += self.f(x.clone())
        return x


def test_a_gate_scales_what_a_block_adds_also_where_it_adds_in_place() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block, self.head = nn.Conv2d(3, 8, 16, 16), _Adds(0), nn.Conv2d(8, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.block(self.stem(x))).mean((2, 3))

    torch.manual_seed(0)
    net = Net()
    spec = InputSpec((3, SIZE, SIZE), (0.0,) * 3, (1.0,) * 3)
    graph = ShrinkingModel(net, Origin(ModelSource(name="x"), spec, lambda s: Net(), {}), "cpu").graph
    before = _answer(net)
    by_hand = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in by_hand.block.parameters():
            parameter.mul_(0.3)
    gates = {"block": np.array([0.3])}
    with Gating(net, graph, gates):
        assert _close(_answer(net), _answer(by_hand))
    assert torch.equal(_answer(net), before)
    gating = Gating(net, graph, gates)
    gating.before_forward()
    net(_images()).sum().backward()
    gating.after_backward()
    by_hand(_images()).sum().backward()
    assert _close(net.block.f.weight.grad, 0.3 * by_hand.block.f.weight.grad)
    with pytest.raises(PlanError, match="cannot be folded"):
        fold(net, graph, gates)


def test_a_model_without_some_blocks_is_exported_and_copied(tmp_path: Path) -> None:
    shrinking = _shrinking("timm/test_vit")
    shrinking.remove({}, tuple(shrinking.graph.blocks)[1:3], verified=True, seed=0)
    model = shrinking.module.eval()
    report = export_onnx(model, (_images(),), tmp_path / "short.onnx")
    assert report.max_error <= 1e-4
    assert torch.equal(_answer(copy.deepcopy(model)), _answer(model))


def test_the_optimizer_goes_on_as_if_the_block_had_never_been() -> None:
    shrinking = _shrinking("torchvision/resnet18")
    shrinking.optimizer = torch.optim.SGD(shrinking.module.parameters(), lr=1e-3, momentum=0.9)
    shrinking.module.eval()
    for _ in range(2):
        shrinking.optimizer.zero_grad()
        shrinking.module(_images()).square().mean().backward()
        shrinking.optimizer.step()
    gated, its_optimizer = copy.deepcopy((shrinking.module, shrinking.optimizer))
    gating = Gating(gated, shrinking.graph, {"layer2.1": np.zeros(1)})
    shrinking.remove({}, ("layer2.1",), verified=True, seed=0)
    left = {id(p) for p in shrinking.module.parameters()}
    assert {id(p) for group in shrinking.optimizer.param_groups for p in group["params"]} == left
    assert {id(p) for p in shrinking.optimizer.state} <= left
    gating.before_forward()
    for model, optimizer in ((gated, its_optimizer), (shrinking.module, shrinking.optimizer)):
        optimizer.zero_grad()
        model(_images()).square().mean().backward()
        if model is gated:
            gating.after_backward()
        optimizer.step()
    theirs = dict(gated.named_parameters())
    for name, parameter in shrinking.module.named_parameters():
        torch.testing.assert_close(parameter, theirs[name])


def test_a_refit_brings_what_is_left_nearer_to_the_whole_model() -> None:
    shrinking = _shrinking("timm/test_convnext")
    dense, graph, plan = copy.deepcopy(shrinking.module).eval(), shrinking.graph, shrinking.plan
    images = _images(32)
    wanted = _answer(dense, images)
    shrinking.remove({}, ("stages.1.blocks.1",), verified=True, seed=0)
    before = float((_answer(shrinking.module, images) - wanted).square().mean())
    whole, kept = shrinking.since(plan, shrinking.plan)
    assert whole.units == graph.units
    refit(shrinking.module, dense, whole, whole.kept_indices(kept), [images], "sequential")
    assert float((_answer(shrinking.module, images) - wanted).square().mean()) < 0.5 * before


def _session(**changed: object) -> dict[str, object]:
    common = {"model": "prunus/resnet14", "data": "digits", "train_limit": 200, "threads": 1, "batch_size": 50}
    return {**common, **changed}


def test_change_is_the_energy_that_a_block_adds_and_the_turn_that_it_gives() -> None:
    adapter = open_session(make_settings(_session())).adapter
    name = next(iter(adapter.graph.blocks))
    got = adapter.measure(Measure(frozenset({Signal.BLOCK_CHANGE}), images=20)).read(Signal.BLOCK_CHANGE, name)
    seen: list[tuple[Tensor, Tensor]] = []
    handle = adapter.model.get_submodule(name).register_forward_hook(
        lambda module, args, output: seen.append((args[0].flatten(1).double(), output.flatten(1).double()))
    )
    for images, _ in adapter.data.calibration.part(20):
        _answer(adapter.model, images)
    handle.remove()
    x, y = (torch.cat(parts) for parts in zip(*seen, strict=True))
    energy = ((y - x).norm(dim=1) / y.norm(dim=1)).square().mean()
    cosine = torch.nn.functional.cosine_similarity(x, y, dim=1).mean()
    np.testing.assert_allclose(got, [float(energy), 1 - float(cosine)], rtol=1e-6)


@pytest.mark.parametrize("mode", ["none", "sequential"])
def test_measured_without_layers_is_what_is_measured_once_they_are_removed(mode: Refit) -> None:
    adapter = open_session(make_settings(_session())).adapter
    layers = {"blocks": ("stages.1.1",), "kernels": (next(iter(adapter.graph.kernels)),)}
    seen = frozenset({Signal.WEIGHT, Signal.ACTIVATION_VARIANCE})
    full = adapter.measure(Measure(seen, images=100))
    before = full.read(Signal.ACTIVATION_VARIANCE, "head.weight")
    without = adapter.measure(Measure(seen, images=100, refit=mode, **layers))
    found = {s: without.read(s, "head.weight") for s in seen}
    assert not np.allclose(found[Signal.ACTIVATION_VARIANCE], before, rtol=0.01)
    adapter.remove(Remove({}, refit=mode, images=TRIAL_IMAGES, **layers))
    removed = adapter.measure(Measure(seen, images=100))
    for signal, values in found.items():
        np.testing.assert_allclose(values, removed.read(signal, "head.weight"), rtol=1e-6)


def test_a_checkpoint_after_a_block_is_gone_restores_model_optimizer_and_graph(tmp_path: Path) -> None:
    first, second = (open_session(make_settings(_session())).adapter for _ in range(2))
    first.train(Train(epochs=1.0))
    gates = {"stages.1.1": np.zeros(1)}
    closed = first.evaluate(Evaluate(gates=gates)).loss
    first.remove(Remove({}, blocks=("stages.1.1",)))
    assert first.evaluate(Evaluate()).loss == pytest.approx(closed, rel=1e-5)
    first.remove(Remove(random_keep(first.graph, 0)))
    first.checkpoint(tmp_path)
    second.restore(tmp_path)
    assert second.graph.fingerprint == first.graph.fingerprint and second.plan == first.plan
    for adapter in (first, second):
        adapter.train(Train(epochs=1.0))
    assert first.evaluate(Evaluate()) == second.evaluate(Evaluate())


@pytest.mark.parametrize("model", ["prunus/resnet14_s2", "timm/test_vit3"])
def test_depth_on_the_command_line_ends_in_an_artifact_that_another_process_loads(
    tmp_path: Path, model: str
) -> None:
    run = tmp_path / "run"
    sizes = ["--img-size", "16"] if model.startswith("prunus") else []
    words = ["--plugin", "iterative", "--depth", "--model", model, "--data", "digits", "--train-limit", "200"]
    words += ["--dense-epochs", "1", "--epochs", "1", "--target", "macs=60%", "--threads", "1", *sizes]
    done = subprocess.run(
        [sys.executable, "-m", "prunus.core", "prune", *words, "--output", str(run)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "Blocks removed" in done.stdout
    plan = PruningPlan.model_validate_json((run / "plan.json").read_bytes())
    assert plan.removed_blocks and not plan.axes
    loaded = load(run)
    for name in plan.removed_blocks:
        assert isinstance(loaded.get_submodule(name), nn.Identity)
    checked = subprocess.run(
        [sys.executable, "-m", "prunus.core", "evaluate", str(run)], capture_output=True, text=True, timeout=600
    )
    assert checked.returncode == 0, checked.stderr
