"""The ridge chosen by held-out images: two forms of the data, brute force, few images and many."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prunus.adapters.pytorch.covariance import Moments
from prunus.adapters.pytorch.regression import RIDGE, bounded_share, ridge_from_rows
from prunus.adapters.pytorch.regression_data import (
    BEARABLE,
    SHARES,
    STRENGTHS,
    MomentData,
    RegressionData,
    RowData,
)

SLOTS, INPUTS, OUTPUTS = 2, 6, 3


def rows(count: int, noise: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x (slots, rows, n) with a mean, y (slots, rows, m) = x W + noise + constant, W (slots, m, n)."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.Generator().manual_seed(99)
    weights = torch.randn(SLOTS, OUTPUTS, INPUTS, generator=made, dtype=torch.float64)
    x = torch.randn(SLOTS, count, INPUTS, generator=generator, dtype=torch.float64) + 0.5
    y = x @ weights.mT + noise * torch.randn(SLOTS, count, OUTPUTS, generator=generator, dtype=torch.float64) + 2
    return x, y, weights


def as_moments(x: Tensor, y: Tensor, folds: Tensor, intercept: bool = True) -> MomentData:
    parts = [Moments(INPUTS, SLOTS, targets=OUTPUTS) for _ in range(int(folds.max()) + 1)]
    for k, part in enumerate(parts):
        part.add(x[:, folds == k].transpose(0, 1), y[:, folds == k].transpose(0, 1))
    return MomentData(parts, intercept)


ODDS = torch.tensor([[0, 0.5, 1, 2, 0, 9], [0, 0, 3, 0, 0, 1]], dtype=torch.float64)


@pytest.mark.parametrize("odds", [None, ODDS])
@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("folds", [2, 3])
def test_moments_and_rows_judge_alike(odds: Tensor | None, intercept: bool, folds: int) -> None:
    x, y, weights = rows(41)
    fold_of_row = torch.arange(41) % folds
    data: list[RegressionData] = [
        as_moments(x, y, fold_of_row, intercept),
        RowData(x, y, fold_of_row, intercept),
    ]
    prior = 0.5 * weights
    for one in SHARES[1:]:
        from_moments, from_rows = (d.held_out_error(prior, one) - d.held_out_error(prior, SHARES[0]) for d in data)
        assert from_moments == pytest.approx(from_rows, rel=1e-4, abs=1e-4)
    solved = [d.fit(prior, odds, None) for d in data]
    torch.testing.assert_close(*solved, rtol=1e-4, atol=1e-5)


def test_the_error_of_a_fold_is_that_of_weights_and_constant_fitted_to_the_others() -> None:
    x, y, weights = rows(30)
    fold_of_row = torch.arange(30) // 10
    expected = 0.0
    for k in range(3):
        mine = fold_of_row == k
        mean, target_mean = x[:, ~mine].mean(1, keepdim=True), y[:, ~mine].mean(1, keepdim=True)
        fitted = ridge_from_rows(x[:, ~mine] - mean, y[:, ~mine] - target_mean, weights * 0, None, 0.1)
        expected += float((y[:, mine] - target_mean - (x[:, mine] - mean) @ fitted.mT).square().sum())
    assert RowData(x, y, fold_of_row, True).held_out_error(weights * 0, 0.1) == pytest.approx(expected)


def test_the_chosen_ridge_is_the_best_of_all_by_its_own_measure() -> None:
    for noise in (0.1, 2.0, 10.0):
        x, y, weights = rows(24, noise)
        data = as_moments(x, y, torch.arange(24) % 2)
        errors = {share: data.held_out_error(weights * 0.9, share) for share in SHARES}
        assert data.best_share(weights * 0.9) == min(errors, key=lambda s: errors[s])


def test_few_noisy_rows_are_fitted_with_more_care_and_do_better_on_new_ones() -> None:
    x, y, weights = rows(16, noise=3.0)
    prior = weights + 0.1
    data = as_moments(x, y, torch.arange(16) % 2)
    assert data.best_share(prior) >= 0.1
    new_x, new_y, _ = rows(4000, noise=3.0, seed=1)

    def error(found: Tensor) -> float:
        constant = data.target_mean - (found @ data.mean.unsqueeze(2)).squeeze(2)
        return float((new_x @ found.mT + constant.unsqueeze(1) - new_y).square().mean())

    assert error(data.fit(prior, None, None)) < 0.9 * error(data.fit(prior, None, RIDGE))


def test_many_rows_leave_the_weakest_ridge() -> None:
    x, y, weights = rows(4000, noise=0.1)
    assert as_moments(x, y, torch.arange(4000) % 2).best_share(weights * 0) == SHARES[0]


def test_weights_beyond_their_limit_get_the_weakest_ridge_that_brings_them_below() -> None:
    x, y, weights = rows(400, noise=0.1)
    data = as_moments(x, y, torch.arange(400) % 2)
    prior = 0.1 * weights
    free = data.fit(prior, None, None)
    assert torch.equal(free, data.fit(prior, None, None, 1.01 * float(free.norm())))
    for part in (0.95, 0.5, 0.2):
        largest = part * float(free.norm())
        found = data.fit(prior, None, None, largest)
        share = bounded_share(lambda s: float(data.solve(prior, None, s).norm()), RIDGE, largest)
        assert torch.equal(found, data.solve(prior, None, share))
        assert float(found.norm()) <= largest < float(data.solve(prior, None, share / 10**0.25).norm())


def test_without_a_second_fold_there_is_nothing_to_judge_by() -> None:
    x, y, weights = rows(10)
    same = torch.zeros(10, dtype=torch.int64)
    assert as_moments(x, y, same).best_share(weights * 0) == RIDGE
    assert RowData(x, y, same, True).best_share(weights * 0) == RIDGE


@pytest.mark.parametrize("intercept", [True, False])
def test_weights_that_fit_already_are_handed_back_as_they_are(intercept: bool) -> None:
    x, _, weights = rows(40)
    y = x @ weights.mT + (3 if intercept else 0)
    fold_of_row = torch.arange(40) % 2
    for data in (as_moments(x, y, fold_of_row, intercept), RowData(x, y, fold_of_row, intercept)):
        assert data.fit(weights, None, None) is weights
        assert data.fit(weights, ODDS, None) is not weights


def test_what_may_vanish_carries_as_little_as_the_layer_can_bear() -> None:
    """The strongest survival term that leaves 99.9% of what can be explained; found by trying all of them."""
    x, y, weights = rows(60)
    fold_of_row = torch.arange(60) % 2
    for data in (as_moments(x, y, fold_of_row), RowData(x, y, fold_of_row, True)):
        prior = 0.5 * weights
        free = data.solve(prior, None, RIDGE)
        tried = [data.solve(prior, strength * ODDS, RIDGE) for strength in STRENGTHS]
        enough = [found for found in tried if data.explained(found) >= (1 - BEARABLE) * data.explained(free)]
        assert 0 < len(enough) < len(tried)
        torch.testing.assert_close(data.fit(prior, ODDS, RIDGE), enough[0], rtol=0, atol=0)


def test_what_explains_is_counted_by_both_alike() -> None:
    x, y, weights = rows(60)
    centred = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    left = float((centred[1] - centred[0] @ weights.mT).square().sum())
    expected = float(centred[1].square().sum()) - left
    fold_of_row = torch.arange(60) % 2
    assert RowData(x, y, fold_of_row, True).explained(weights) == pytest.approx(expected)
    assert 60 * as_moments(x, y, fold_of_row).explained(weights) == pytest.approx(expected)


def test_weight_moves_from_an_input_that_may_vanish_to_its_twin_and_not_to_nothing() -> None:
    x, _, weights = rows(400)
    x[:, :, 1] = x[:, :, 0] + 0.01 * x[:, :, 1]  # inputs 0 and 1 say the same
    y = x @ weights.mT
    goes = torch.zeros_like(ODDS)
    goes[:, [0, 2]] = 9.0  # 2 has no twin
    data = RowData(x, y, torch.arange(400) % 2, True)
    free, found = data.fit(weights, None, RIDGE), data.fit(weights, goes, RIDGE)
    assert found[:, :, 0].square().sum() < 0.1 * free[:, :, 0].square().sum()
    torch.testing.assert_close(found[:, :, 2], free[:, :, 2], rtol=0.1, atol=0.05)


def test_merged_moments_are_those_of_all_rows() -> None:
    x, y, _ = rows(37)
    parts = [Moments(INPUTS, SLOTS, targets=OUTPUTS) for _ in range(3)]
    for part, where in zip(parts[:2], (slice(0, 5), slice(5, 37)), strict=True):
        part.add(x[:, where].transpose(0, 1), y[:, where].transpose(0, 1))
    whole = Moments(INPUTS, SLOTS, targets=OUTPUTS)
    whole.add(x.transpose(0, 1), y.transpose(0, 1))
    before = parts[0].covariance
    together = parts[0].copy()
    for part in parts[1:]:
        together.merge(part)  # the last is empty
    assert torch.equal(parts[0].covariance, before)
    for name in ("count", "mean", "target_mean", "covariance", "cross_covariance"):
        torch.testing.assert_close(getattr(together, name), getattr(whole, name))
