"""Models whose Python code does more than compute: it is locked, refused or told, and never corrupted."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunus.adapters.pytorch import prune, trace
from prunus.adapters.pytorch.comparison import copied_state, evaluating
from prunus.adapters.pytorch.tracing import trace_model
from prunus.adapters.pytorch.tracing.modes import asks_for_mode
from prunus.adapters.pytorch.verification import prepare, refuse_opaque, state_of
from prunus.core.errors import TraceError


def _images(batch: int = 2, size: int = 8) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


class Between(nn.Module):
    """Something `between` two convolutions."""

    def __init__(self, between: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.between, self.head = between or nn.Identity(), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.between(self.first(x).relu())
        return self.head(self.second(x).relu().mean((2, 3)))


def _locks(model: nn.Module, x: Tensor | None = None) -> dict[str, str | None]:
    return {name: group.locked for name, group in trace(model, _images() if x is None else x).groups.items()}


# ---- modes ------------------------------------------------------------------------------------------


class Merging(nn.Linear):
    """As loralib does it: merged in eval mode, taken apart in training."""

    def __init__(self) -> None:
        super().__init__(12, 12)
        self.a, self.b = nn.Parameter(torch.randn(2, 12)), nn.Parameter(torch.randn(12, 2))
        self.merged = False

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        if self.merged == mode:
            self.weight.data += (-1 if mode else 1) * self.b @ self.a
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(x, self.weight, self.bias)
        return y if self.merged else y + x @ self.a.t() @ self.b.t()


class Replacing(nn.Linear):
    """Puts another tensor in the place of its weight, once."""

    ready = False

    def train(self, mode: bool = True) -> Any:
        if not (mode or self.ready):
            self.weight, self.ready = nn.Parameter(self.weight.detach() * 2), True
        return super().train(mode)


def _chain(layer: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), layer, nn.ReLU(), nn.Linear(12, 3))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["merging", "replacing"])
def test_weights_that_follow_the_mode_are_refused_and_left_as_they_are(kind: str, training: bool) -> None:
    torch.manual_seed(0)
    model = _chain(Merging() if kind == "merging" else Replacing(12, 12))
    if kind == "merging":
        model.train(training)
    else:
        model.training = training
    before, held, flags = copied_state(model), state_of(model), dict(vars(model[2]))
    for call in (refuse_opaque, lambda m: prepare(m, torch.randn(2, 6)), lambda m: prune(m, torch.randn(2, 6))):
        with pytest.raises(TraceError, match=r"2 \((Merging|Replacing)\) changes 2.weight.*merge or freeze"):
            call(model)
    after = state_of(model)
    assert all(after[name] is held[name] and torch.equal(after[name], before[name]) for name in before)
    assert dict(vars(model[2])) == flags and model.training == training


def test_a_look_leaves_weights_that_follow_the_mode_bit_for_bit() -> None:
    torch.manual_seed(0)
    model = _chain(Merging()).train()
    before = copied_state(model)
    trace_model(model, torch.randn(2, 6))
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(model).items())


def test_evaluation_lets_code_of_the_model_run_on_the_way_out() -> None:
    torch.manual_seed(0)
    model = _chain(Merging()).train()
    x = torch.randn(2, 6)
    with torch.no_grad():
        expected = model(x)
        with evaluating(model):
            assert model[2].merged
        assert model.training and not model[2].merged
        assert torch.allclose(model(x), expected, atol=1e-5)


class NormsAsleep(Between):
    """Keeps its norms in eval mode and a layer frozen; as often, `train` returns nothing."""

    def __init__(self) -> None:
        super().__init__(nn.BatchNorm2d(16))

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self.between.train(False)
        self.head.weight.requires_grad_(not mode)


def test_norms_kept_in_eval_mode_are_no_obstacle() -> None:
    model = NormsAsleep()
    model.eval()
    assert len(prepare(model, _images()).graph.prunable) == 2
    assert not model.training and model.head.weight.requires_grad
    model.train()
    prepare(model, _images())
    assert model.training and not model.between.training and not model.head.weight.requires_grad


# ---- what a pass keeps --------------------------------------------------------------------------------


class Keeping(nn.Module):
    """Makes a mask at its first call."""

    def __init__(self, guarded: bool) -> None:
        super().__init__()
        self.mask: Tensor | None = None
        self.guarded = guarded

    def forward(self, x: Tensor) -> Tensor:
        if self.mask is None or (self.guarded and self.mask.shape[1] != x.shape[1]):
            self.mask = torch.ones(1, x.shape[1], 1, 1) * 0.5
        return x * self.mask


@pytest.mark.parametrize("guarded", [False, True])
def test_a_tensor_kept_from_the_first_pass_locks_what_it_was_made_for(guarded: bool) -> None:
    model = Between(Keeping(guarded))
    locks = _locks(model)
    assert locks["second.weight"] is None
    assert (locks["first.weight"] is None) if guarded else "size of tensor" in str(locks["first.weight"])
    prepare(model, _images())
    assert model.between.mask is None


class Derived(nn.Module):
    """Keeps a tensor derived from its parameter, in evaluation alone, and gives it up in training."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(16))
        self.scale_cache: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> Any:
        if mode:
            self.scale_cache.clear()
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return x * self.scale[:, None, None]
        if "" not in self.scale_cache:
            self.scale_cache[""] = self.scale[:, None, None].exp()
        return x * self.scale_cache[""]


def test_a_cache_of_a_derived_tensor_locks_nothing() -> None:
    assert _locks(Between(Derived()))["first.weight"] is None


class Remembering(nn.Module):
    """Averages what it sees in eval mode as well; with `used`, it is added."""

    def __init__(self, used: bool) -> None:
        super().__init__()
        self.used = used
        self.register_buffer("mean", torch.zeros(16))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.mean.mul_(0.9).add_(x.detach().mean((0, 2, 3)) * 0.1)
        return x - self.mean.view(1, -1, 1, 1) if self.used else x


def test_an_answer_that_changes_at_every_pass_is_refused() -> None:
    with pytest.raises(TraceError, match=r"between.mean.*change at every pass in eval mode.*if self.training"):
        trace(Between(Remembering(used=True)), _images())


def test_calls_are_not_counted_by_a_look() -> None:
    model = Between(Remembering(used=False)).eval()
    assert len(prepare(model, _images()).graph.prunable) == 2
    assert not model.between.calls and not model.between.mean.any()


# ---- training -----------------------------------------------------------------------------------------


class DroppingChannels(nn.Module):
    """Knows the number of channels in training alone."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand(len(x), self.channels, 1, 1) > 0.1) if self.training else x


def test_a_size_that_training_alone_asks_for_is_locked() -> None:
    model = Between(nn.Sequential(DroppingChannels(16), nn.BatchNorm2d(16)))
    before, state = copied_state(model), torch.get_rng_state()
    locks = _locks(model)
    assert "fails in train mode" in str(locks["first.weight"])
    assert locks["second.weight"] is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(model).items())
    assert torch.equal(torch.get_rng_state(), state)


class NeedsTargets(Between):
    def forward(self, x: Tensor, targets: Tensor | None = None) -> Any:
        if self.training and targets is None:
            raise ValueError("targets are needed for training")
        return super().forward(x)


def test_training_that_needs_more_than_the_inputs_locks_nothing() -> None:
    assert len(trace(NeedsTargets(), _images()).prunable) == 2


class Wrapped(nn.Module):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return next(y * 2 if self.training else y for y in [x])


def test_code_that_asks_for_the_mode_is_found_within_functions() -> None:
    assert asks_for_mode(Between(Wrapped()))
    assert not asks_for_mode(Between(nn.Sequential(nn.Dropout(), nn.BatchNorm2d(16))))


# ---- unused, batches, quantization ----------------------------------------------------------------------


class Tasks(Between):
    def __init__(self) -> None:
        super().__init__()
        self.large, self.other = nn.Conv2d(16, 16, 1), nn.Linear(16, 3)
        self.dummy = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, task: str = "main") -> Tensor:
        x = self.first(x).relu()
        x = self.large(x) if x.shape[-1] > 20 else x
        x = self.second(x).relu().mean((2, 3))
        return self.head(x) if task == "main" else self.other(x)


def test_layers_that_no_mode_uses_are_named() -> None:
    (notice,) = trace_model(Tasks(), _images()).notices
    assert notice.startswith("large, other: not used on the example inputs") and "keep their sizes" in notice
    assert not trace_model(Between(), _images()).notices


class Folded(Between):
    """Takes four frames at a time from its batch."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        clips = x.view(len(x) // 4, 4, *x.shape[1:])
        x = (clips + clips.roll(1, 1)).view(x.shape)
        return self.head(self.second(x).relu().mean((2, 3))).view(-1, 4, 5).mean(1)


class Halves(Between):
    def forward(self, x: Tensor) -> Tensor:
        a, b = self.second(self.first(x).relu()).mean((2, 3)).chunk(2, 0)
        return self.head(a - b)


@pytest.mark.parametrize("kind", [Folded, Halves])
def test_a_model_that_takes_no_single_sample_is_looked_at_on_all(kind: type[Between]) -> None:
    prepared = prepare(kind(), _images(8))
    assert len(prepared.graph.prunable) == 2
    (notice,) = prepared.trace.notices
    assert "whole batch of 8" in notice
    single = prepare(Between(), _images(8))
    assert single.trace.program.batch == 1 and not single.trace.notices
    assert prepared.graph.cost().macs > 7 * single.graph.cost().macs


def test_a_model_that_takes_no_single_sample_is_pruned(tmp_path: Any) -> None:
    out, x = tmp_path / "run", _images(8)
    pruned = prune(Folded(), x, plugin="one-shot", importance="magnitude", target="macs=60%", output=out)
    assert pruned.model(x).shape == (2, 5)
    assert any("one sample alone does not run" in note for note in pruned.report.notes)


def test_sums_that_can_be_quantized_later_are_no_obstacle() -> None:
    class Sum(nn.Module):
        def __init__(self, adding: nn.Module) -> None:
            super().__init__()
            self.adding = adding

        def forward(self, x: Tensor) -> Any:
            return self.adding.add(x, x)  # type: ignore[operator]

    quantized = torch.ao.nn.quantized
    for adding in (quantized.FloatFunctional(), quantized.FXFloatFunctional()):
        assert len(trace(Between(Sum(adding)), _images()).prunable) == 2
    with pytest.raises(TraceError, match="is quantized"):
        refuse_opaque(copy.deepcopy(Between(Sum(quantized.QFunctional()))))
