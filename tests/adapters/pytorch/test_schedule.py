"""Steps, epochs and learning rates."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunus.adapters.pytorch.schedule import epoch_seed, epochs_of, learning_rate, total_steps
from prunus.core.directives import Train


@given(st.integers(0, 500), st.integers(1, 60))
def test_epochs_cover_every_step_once(total: int, steps: int) -> None:
    epochs = epochs_of(total, steps)
    covered = [s for e in epochs for s in range(e.first, e.first + e.steps)]
    assert covered == list(range(total))
    assert [e.number for e in epochs] == list(range(len(epochs)))
    assert all(e.steps == steps for e in epochs[:-1])


@pytest.mark.parametrize(("epochs", "steps"), [(0, 0), (0.001, 1), (0.5, 5), (1.24, 12), (3, 30)])
def test_fractional_epochs_are_whole_steps(epochs: float, steps: int) -> None:
    assert total_steps(epochs, 10) == steps


def test_the_rate_rises_to_its_peak_then_falls_to_nothing() -> None:
    rates = [learning_rate(Train(epochs=1, warmup=0.2), 0.5, step, 100) for step in range(100)]
    top = rates.index(max(rates))
    assert 19 <= top <= 20
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert max(rates) == pytest.approx(0.5, rel=0.03)
    assert 0 < rates[-1] < 0.001


def test_pieces_of_one_cycle_follow_the_whole() -> None:
    whole = [learning_rate(Train(epochs=1), 0.1, step, 90) for step in range(90)]
    pieces = [
        learning_rate(Train(epochs=1, start=part / 3, stop=(part + 1) / 3), 0.1, step, 30)
        for part in range(3)
        for step in range(30)
    ]
    assert pieces == pytest.approx(whole)


def test_a_constant_rate_is_warmed_up_and_stays() -> None:
    directive = Train(epochs=1, schedule="constant", warmup=0.5)
    assert [learning_rate(directive, 1.0, s, 4) for s in range(4)] == pytest.approx([0.25, 0.75, 1, 1])


def test_no_warm_up_is_allowed() -> None:
    assert learning_rate(Train(epochs=1, warmup=0.0), 0.1, 0, 1000) == pytest.approx(0.1, rel=1e-3)
    assert learning_rate(Train(epochs=1, warmup=1.0), 0.1, 999, 1000) == pytest.approx(0.1, rel=1e-3)


def test_epochs_have_unrelated_seeds() -> None:
    seeds = {epoch_seed(s, d, e) for s in range(5) for d in range(5) for e in range(5)}
    assert len(seeds) == 125
    assert all(0 <= seed < 2**63 for seed in seeds)
