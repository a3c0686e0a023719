from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from prunus.core.directives import Evaluate, Remove, Snapshot, Train
from prunus.core.errors import ConfigError, UnreachableTargetError
from prunus.core.testing.simulation import SimulatedAdapter
from prunus.core.testing.transcript import Transcript, drive
from prunus.plugins.joint_search import JointSearch, JointSearchConfig


def scratch(seed: int = 0, **options: Any) -> SimulatedAdapter:
    return SimulatedAdapter((8, 32, 24, 4), seed=seed, dense_epochs=0, **options)


def run(
    target: str = "macs=30%", *, epochs: float = 16.0, adapter: SimulatedAdapter | None = None, **config: Any
) -> Transcript:
    config = {"evaluations": 24, "reward_images": 32, "images": 64, "lr": 0.05, **config}
    model = adapter or scratch()
    return drive(JointSearch(JointSearchConfig(**config)), model.task(target, epochs=epochs), model)


def numbers(transcript: Transcript, kind: str, key: str) -> list[Any]:
    return [n.values[key] for n in transcript.notes if n.kind == kind]


@pytest.mark.parametrize("target", ["macs=50%", "macs=25%", "params=30%"])
def test_it_meets_the_budget_from_random_weights(target: str) -> None:
    adapter = scratch()
    before = adapter.evaluate(Evaluate()).accuracy
    task = adapter.task(target)
    plan = run(target, adapter=adapter, epochs=16.0).plan
    assert 0.95 < task.budget.load(task.graph.cost(plan.kept_counts)) <= 1.0
    assert adapter.evaluate(Evaluate()).accuracy > before + 0.3


def test_rules_of_the_groups_are_respected() -> None:
    adapter = SimulatedAdapter(
        (8, 32, 32, 30, 4),
        dense_epochs=0,
        h0={"equal_count": "t"},
        h1={"equal_count": "t"},
        h2={"multiple_of": 4},
    )
    counts = run("macs=40%", adapter=adapter).plan.kept_counts
    assert counts["h0"] == counts["h1"]
    assert counts["h2"] % 4 == 0


def test_budgets_fall_round_by_round_and_every_sub_network_becomes_the_target() -> None:
    transcript = run("macs=25%", rounds=4)
    extractions = [r for r in transcript.of(Remove) if r.keep]
    assert len(extractions) == 4
    kept = [sum(len(units) for units in r.keep.values()) for r in extractions]
    assert kept == sorted(kept, reverse=True)


def test_the_compute_allowance_is_used_up_and_not_exceeded() -> None:
    for teachers in ("never", "auto"):
        transcript = run("macs=25%", epochs=20.0, teachers=teachers, evaluations=8)
        summary = next(n.values for n in transcript.notes if n.kind == "compute")
        used = float(summary["trained_epochs"]) + float(summary["searched_epochs"])  # type: ignore[arg-type]
        assert 0.9 * 20.0 < used < 1.1 * 20.0


def test_images_that_there_are_not_are_not_charged_for() -> None:
    few = scratch().images
    assert max(few.values()) < 600
    a, b = (run("macs=25%", epochs=8.0, images=images) for images in (600, 60_000))
    assert a.plan.keep == b.plan.keep
    assert numbers(a, "compute", "searched_epochs") == numbers(b, "compute", "searched_epochs")
    assert numbers(a, "compute", "trained_epochs") == numbers(b, "compute", "trained_epochs")


def test_pieces_share_one_cycle_that_falls_only_at_the_end() -> None:
    trains = run("macs=30%").of(Train)
    final = [t for t in trains if t.schedule == "cosine"]
    assert [t.schedule for t in trains] == ["constant"] * (len(trains) - len(final)) + ["cosine"] * len(final)
    assert [(t.start, t.stop) for t in final] == [(0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1)]
    assert all(t.warmup == 0 for t in trains[4:])


def test_gradients_are_limited_in_every_training_unless_the_user_says_none() -> None:
    assert {t.clip for t in run("macs=30%", epochs=6.0).of(Train)} == {2.0}
    assert {t.clip for t in run("macs=30%", epochs=6.0, clip=0).of(Train)} == {None}


def test_a_teacher_that_does_not_beat_the_student_is_silent() -> None:
    transcript = run("macs=30%", epochs=30.0, teachers="auto")
    judged = [n.values for n in transcript.notes if n.kind == "teachers"]
    assert judged and transcript.of(Snapshot)
    for values in judged:
        for name in ("larger", "ema"):
            if name in values:
                beats = float(values[name]) > float(values["student"])  # type: ignore[arg-type]
                assert (name in str(values["teaching"])) == beats
    assert not any(t.distil for t in run("macs=30%", teachers="never").of(Train))


def test_a_named_teacher_is_judged_once_teaches_while_it_leads_and_is_paid_for() -> None:
    adapter = scratch()
    adapter.answer(Train(12.0, lr=0.05))
    adapter.answer(Snapshot("user-0"))
    task = replace(adapter.task("macs=30%", epochs=20.0), teachers=("user-0",))
    transcript = drive(JointSearch(JointSearchConfig(images=64, lr=0.05)), task, adapter)
    assert [e.model for e in transcript.of(Evaluate)].count("user-0") == 1
    judged = [n.values for n in transcript.notes if n.kind == "teachers"]
    taught = [bool(t.distil) for t in transcript.of(Train) if t.label == "train"]
    leads = [float(v["user-0"]) > float(v["student"]) for v in judged]  # type: ignore[arg-type]
    assert [v["teaching"] == "user-0" for v in judged] == leads
    assert taught == leads[-len(taught) :]
    summary = next(n.values for n in transcript.notes if n.kind == "compute")
    used = float(summary["trained_epochs"]) + float(summary["searched_epochs"])  # type: ignore[arg-type]
    assert 0.9 * 20.0 < used < 1.1 * 20.0


def test_the_smallest_target_that_can_be_reached_is_met_by_every_proposal() -> None:
    with pytest.raises(UnreachableTargetError) as caught:
        run("macs=0.1%")
    adapter = scratch()
    task = adapter.task(caught.value.smallest)
    plan = run(caught.value.smallest, adapter=adapter).plan
    assert task.budget.met(task.graph.cost(plan.kept_counts))


def test_teachers_that_nobody_named_cost_nothing() -> None:
    transcript = run("macs=30%", epochs=30.0, evaluations=0)
    assert not transcript.of(Evaluate) and not transcript.of(Snapshot)
    assert not any(t.distil or t.ema for t in transcript.of(Train))


def test_a_proposal_is_taken_only_if_it_beats_equal_thresholds() -> None:
    transcript = run("macs=30%")
    for values in [n.values for n in transcript.notes if n.kind == "threshold-search"]:
        losses = {key: value for key, value in values.items() if key.startswith("loss/")}
        best = losses[f"loss/{values['accepted']}"]
        assert best == min(losses.values())  # type: ignore[type-var]


def test_without_threshnet_nothing_is_evaluated_for_it() -> None:
    transcript = run("macs=30%", evaluations=0, teachers="never")
    assert not transcript.of(Evaluate)
    assert not [n for n in transcript.notes if n.kind == "threshold-search"]


def test_unit_weights_are_learned_and_folded_in() -> None:
    transcript = run("macs=30%")
    folds = [r for r in transcript.of(Remove) if not r.keep]
    assert folds and all(r.gates for r in folds)
    gates = folds[0].gates
    assert gates is not None
    assert all(a.min() >= 0 and a.max() <= 2 and a.std() > 0 for a in gates.values())
    assert not [r for r in run("macs=30%", unit_weights="random").of(Remove) if not r.keep]


def test_kept_sets_of_the_rounds_are_compared() -> None:
    overlaps = numbers(run("macs=25%", rounds=4), "overlap", "jaccard")
    assert len(overlaps) == 3 and all(0 <= o <= 1 for o in overlaps)


def test_the_same_observations_give_the_same_directives() -> None:
    first, second = run(), run()
    assert first.plan == second.plan
    assert [n.values for n in first.notes] == [n.values for n in second.notes]


def test_bad_cases_end_in_clear_errors() -> None:
    adapter = scratch()
    policy = JointSearch()
    with pytest.raises(ConfigError, match="labelled images"):
        drive(policy, adapter.task("macs=30%", epochs=4, has_data=False, has_labels=False), adapter)
    with pytest.raises(ConfigError, match="needs epochs"):
        drive(policy, adapter.task("macs=30%", epochs=0), adapter)
    with pytest.raises(UnreachableTargetError, match="smallest reachable"):
        drive(policy, adapter.task("macs=0.1%", epochs=4), adapter)
    with pytest.raises(ConfigError, match="1 class"):
        drive(policy, replace(adapter.task("macs=30%", epochs=4), classes=1), adapter)


def test_learned_thresholds_and_weights_do_no_harm_on_the_hold_out() -> None:
    losses: dict[str, list[float]] = {"full": [], "plain": []}
    for seed in range(3):
        for name, config in (("full", {}), ("plain", {"evaluations": 0, "unit_weights": "random"})):
            adapter = scratch(seed)
            run("macs=20%", epochs=24.0, adapter=adapter, **config)
            losses[name].append(adapter.evaluate(Evaluate()).loss)
    assert np.mean(losses["full"]) < np.mean(losses["plain"]) + 0.05
