"""Detections are compared as sets, and layers on the way are compared too."""

from __future__ import annotations

import torch
from torch import nn

from prunus.adapters.pytorch.selected_outputs import ordered, shared, watched


def _detections(order: list[int]) -> dict[str, torch.Tensor]:
    boxes = torch.tensor([[0.0, 1, 2, 3], [4, 5, 6, 7], [1, 1, 2, 2]])
    return {
        "boxes": boxes[order],
        "scores": torch.tensor([0.5, 0.5, 0.9])[order],
        "labels": torch.tensor([1, 2, 3])[order],
    }


def test_the_order_of_equal_scores_does_not_matter() -> None:
    a, b = ordered([_detections([2, 0, 1])]), ordered([_detections([2, 1, 0])])
    assert all(torch.equal(a[0][key], b[0][key]) for key in a[0])
    assert a[0]["scores"][0] == 0.9


def test_rows_stay_together() -> None:
    (result,) = ordered([_detections([1, 2, 0])])
    rows = {int(label): box.tolist() for label, box in zip(result["labels"], result["boxes"], strict=True)}
    assert rows == {1: [0, 1, 2, 3], 2: [4, 5, 6, 7], 3: [1, 1, 2, 2]}


def test_an_image_without_detections_is_left_alone() -> None:
    empty = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0)}
    assert ordered([empty])[0]["boxes"].shape == (0, 4)


def test_other_outputs_pass_through() -> None:
    x = torch.tensor([3, 1, 2])
    assert torch.equal(ordered({"logits": x})["logits"], x)
    assert torch.equal(ordered((x,))[0], x)


def test_every_call_of_every_layer_is_seen_and_the_hooks_go() -> None:
    layer = nn.Linear(3, 2)
    net = nn.Sequential(layer, nn.Linear(2, 3), layer)
    with watched(net) as seen:
        net(torch.zeros(4, 3))
    assert set(seen) == {"0/0", "1/0", "0/1"}
    assert not layer._forward_hooks
    assert len(shared(seen, {"0/0": seen["0/0"], "1/0": torch.zeros(9)})[0]) == 1
