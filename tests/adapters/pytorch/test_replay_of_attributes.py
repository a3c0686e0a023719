"""A plan made of several removals replays on a fresh original: tensors, attributes and handlers."""

from __future__ import annotations

import copy

import timm
import torch

from prunus.adapters.pytorch.artifact import apply_plan
from prunus.adapters.pytorch.certification import random_keep
from prunus.adapters.pytorch.surgery import remove
from prunus.adapters.pytorch.verification import prepare
from prunus.core.plan import ModelSource, PruningPlan


def test_two_removals_replay_as_one_plan_through_json() -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_vit_relpos").eval()
    x = torch.randn(1, 3, 160, 160)
    original = copy.deepcopy(model)
    prepared = prepare(model, x)
    graph = prepared.graph
    plan = PruningPlan.begin(ModelSource(name="timm/test_vit_relpos"), graph, {})
    for seed in range(2):
        keep = random_keep(graph, seed)
        counts = graph.units | {name: len(units) for name, units in keep.items()}
        edits = prepared.bindings.edits(graph.units, counts)
        remove(model, graph, keep, edits)
        plan = plan.after_removal(graph, keep, edits, prepared.handlers)
        graph = graph.restrict(keep)
    apply_plan(original, PruningPlan.model_validate_json(plan.model_dump_json(by_alias=True)))
    with torch.no_grad():
        assert torch.equal(original(x), model(x))
    assert graph.cost().params == sum(p.numel() for p in model.parameters())
