from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from prunus.core.directives import Evaluate, Evaluated, Note
from prunus.core.testing.graphs import mlp_graph
from prunus.plugins.sensitivity import measure_sensitivity


def sensitivities(loss_without: Callable[[str], float], **options: dict[str, object]) -> dict[str, float]:
    """Answers every trial with the loss of the network whose named group was narrowed."""
    rng = np.random.default_rng(0)
    graph = mlp_graph([4, 10, 10, 10, 3], **options)
    weights = {name: rng.normal(size=shape) for name, shape in graph.tensors.items()}
    moments = {name: np.eye(10) for name in ("fc1.weight", "fc2.weight", "fc3.weight")}
    trial = measure_sensitivity(graph, weights, moments, 1e-3, "sequential", 64)
    directive = next(trial)
    try:
        while True:
            loss = 1.0
            if isinstance(directive, Evaluate) and directive.within:
                graph.check_keep(directive.within)
                loss = loss_without(next(iter(directive.within)))
            directive = trial.send(Evaluated(loss, 0.5, 64))
    except StopIteration as stop:
        return dict(stop.value)


def test_a_group_whose_narrowing_costs_more_loss_weighs_more_within_bounds() -> None:
    found = sensitivities({"h0": 1.1, "h1": 1.2, "h2": 9.0}.__getitem__)
    assert found["h0"] < found["h1"] < found["h2"]
    assert found["h2"] <= 4.0 and found["h0"] >= 0.25
    assert sorted(found.values())[1] == pytest.approx(1.0)


def test_groups_that_shrink_together_are_tried_together() -> None:
    found = sensitivities({"h0": 1.5, "h2": 1.1}.__getitem__, h0={"equal_count": "t"}, h1={"equal_count": "t"})
    assert found["h0"] == found["h1"] != found["h2"]


def test_few_held_out_images_are_not_believed_unless_asked_for() -> None:
    graph = mlp_graph([4, 10, 10, 3])
    weights = {name: np.ones(shape) for name, shape in graph.tensors.items()}
    moments = {name: np.eye(10) for name in ("fc1.weight", "fc2.weight")}
    trial = measure_sensitivity(graph, weights, moments, 1e-3, "sequential", 64, "auto")
    assert next(trial) == Evaluate(images=64)
    assert trial.send(Evaluated(1.0, 0.5, 499)) == Note("sensitivity-skipped", {"images": 499})
    with pytest.raises(StopIteration) as stop:
        next(trial)
    assert stop.value.value == {}
    trial = measure_sensitivity(graph, weights, moments, 1e-3, "sequential", 64, "auto")
    next(trial)
    following = trial.send(Evaluated(1.0, 0.5, 500))
    assert isinstance(following, Evaluate)
    assert following.within


def test_where_no_trial_costs_anything_all_groups_weigh_the_same() -> None:
    assert sensitivities(lambda name: 1.0) == {}
