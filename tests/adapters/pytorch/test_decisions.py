"""A pass that decides by value is compared along the decisions of another."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from prunus.adapters.pytorch.comparison import compare, state_of
from prunus.adapters.pytorch.decisions import Decision, decision, following, grounds
from prunus.adapters.pytorch.structural_copy import structural_copy
from prunus.adapters.pytorch.surgery import remove
from prunus.adapters.pytorch.tracing import masked_call, trace_model
from prunus.core.errors import TraceError, VerificationError
from prunus.core.graph import ChannelGraph


class Detector(nn.Module):
    """Scores every pixel, and answers with the best few above a threshold."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 8, 3, padding=1)
        self.score = nn.Conv2d(8, 1, 1)
        self.place = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.body(x).relu()
        scores, places = self.score(features).flatten(), self.place(features).flatten(2)[0].T
        found = torch.where(scores > scores.mean())[0]
        best, order = scores[found].topk(min(4, len(found)))
        return {"scores": best, "places": places[found[order]]}


def _decisions(model: nn.Module, graph: ChannelGraph, x: Tensor) -> tuple[dict[str, Tensor], list[Decision]]:
    taken: list[Decision] = []

    def observe(step: object, arguments: object, result: object) -> None:
        if (found := decision(step, arguments, result)) is not None:  # type: ignore[arg-type]
            taken.append(found)

    return masked_call(model, graph, {n: range(u) for n, u in graph.units.items()}, (x,), observe=observe), taken


def test_a_model_follows_the_decisions_of_another_though_its_own_would_differ() -> None:
    model, x = Detector().eval(), torch.randn(1, 3, 6, 6)
    graph = trace_model(model, x).graph
    expected, taken = _decisions(model, graph, x)
    with torch.no_grad():
        other = structural_copy(model)
        other.score.bias = nn.Parameter(model.score.bias + 5.0)  # the same order, the same answers but for 5.0
        other.score.weight = nn.Parameter(-model.score.weight)  # and now another order
    outputs, pairs = following(other, taken, (x,))
    assert torch.equal(outputs["places"], expected["places"])
    assert not torch.allclose(outputs["scores"], expected["scores"])
    a, b = grounds(pairs)
    assert any(not torch.allclose(p, q) for p, q in zip(a, b, strict=True))


def test_a_model_that_follows_itself_gives_its_own_answers() -> None:
    model, x = Detector().eval(), torch.randn(1, 3, 6, 6)
    expected, taken = _decisions(model, trace_model(model, x).graph, x)
    outputs, pairs = following(model, taken, (x,))
    assert all(torch.equal(outputs[key], expected[key]) for key in expected)
    assert len(pairs) == len(taken) > 0


def test_a_pass_that_takes_more_or_fewer_decisions_raises() -> None:
    model, x = Detector().eval(), torch.randn(1, 3, 6, 6)
    _, taken = _decisions(model, trace_model(model, x).graph, x)
    with pytest.raises(TraceError, match="less often than in the whole model"):
        following(model, [*taken, taken[-1]], (x,))
    again = [one for one in taken for _ in range(2)][: 2 * len(taken) - 1]
    with pytest.raises(TraceError, match="less often"):
        following(model, again, (x,))


class Remembering(Detector):
    """Rounds a number once and remembers it, as detection models do with scales."""

    def __init__(self) -> None:
        super().__init__()
        self.factor: float | None = None

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if self.factor is None:
            self.factor = float(torch.tensor(x.shape[-1] / 5).log2().round())
        return {key: value * 2.0**self.factor for key, value in super().forward(x).items()}


def test_what_one_pass_has_remembered_from_before_is_no_difference() -> None:
    fresh, used = Remembering().eval(), Remembering().eval()
    used.load_state_dict(fresh.state_dict())
    x = torch.randn(1, 3, 6, 6)
    graph = trace_model(fresh, x).graph
    used(x)
    for one, other in ((fresh, used), (used, fresh)):
        expected, taken = _decisions(one, graph, x)
        outputs, pairs = following(other, taken, (x,))
        assert all(torch.equal(outputs[key], expected[key]) for key in expected)
        assert pairs


def test_exact_ties_are_no_difference_and_a_wrong_removal_is_one() -> None:
    model = Detector().eval()
    x = torch.randn(1, 3, 6, 6)[..., :1].expand(-1, -1, -1, 6).contiguous()  # every column scores the same
    trace = trace_model(model, x)
    (name,) = trace.graph.prunable
    keep = {name: [0, 2, 3, 6]}
    whole = dict(state_of(model))
    pruned, wrong = structural_copy(model), structural_copy(model)
    remove(pruned, trace.graph, keep, [])
    assert compare(pruned, trace, whole, keep, (x,), bare=model).max_error < 1e-5
    remove(wrong, trace.graph, {name: [0, 2, 3, 7]}, [])
    with pytest.raises(VerificationError):
        compare(wrong, trace, whole, keep, (x,), bare=model)
