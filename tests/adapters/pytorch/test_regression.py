"""The ridge solve against brute force, its limits, and the optimality of the survival term."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prunus.adapters.pytorch.regression import ridge, ridge_from_rows


def problem(rows: int, inputs: int = 6, outputs: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    x = torch.randn(rows, inputs, generator=generator, dtype=torch.float64) @ mixing
    y = torch.randn(rows, outputs, generator=generator, dtype=torch.float64) + x[:, :outputs]
    prior = torch.randn(1, outputs, inputs, generator=generator, dtype=torch.float64)
    return x, y, prior


def moments(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return (x.T @ x / len(x)).unsqueeze(0), (y.T @ x / len(x)).unsqueeze(0)


def test_ridge_is_the_formula_of_the_methods() -> None:
    x, y, prior = problem(50)
    covariance, cross = moments(x, y)
    odds = torch.tensor([0, 0, 1, 2, 0, 9], dtype=torch.float64)
    lam = 0.1 * covariance[0].diagonal().mean() + 1e-9
    eye, penalty = torch.eye(6, dtype=torch.float64), torch.diag(odds * covariance[0].diagonal())
    expected = (cross[0] + lam * prior[0]) @ torch.linalg.inv(covariance[0] + lam * eye + penalty)
    found = ridge(covariance, cross, prior, odds.unsqueeze(0), share=0.1)
    torch.testing.assert_close(found[0], expected)


def test_plain_least_squares_is_the_limit_of_no_ridge() -> None:
    x, y, prior = problem(200)
    expected = torch.linalg.lstsq(x, y).solution.T
    found = ridge(*moments(x, y), prior, None, share=1e-10)
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-6)


def test_a_strong_ridge_keeps_the_given_weights() -> None:
    x, y, prior = problem(200)
    torch.testing.assert_close(ridge(*moments(x, y), prior, None, share=1e9), prior, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("survival", [False, True])
def test_fewer_rows_than_inputs_give_the_same_weights_by_the_smaller_system(survival: bool) -> None:
    x, y, prior = problem(5)
    odds = torch.tensor([[0, 0.5, 1, 2, 0, 9]], dtype=torch.float64) if survival else None
    direct = ridge(*moments(x, y), prior, odds)
    found = ridge_from_rows(x.unsqueeze(0), y.unsqueeze(0), prior, odds)
    torch.testing.assert_close(found, direct, rtol=1e-6, atol=1e-7)


def test_a_dead_input_is_no_singularity() -> None:
    x, y, prior = problem(50)
    assert ridge(*moments(x * 0, y), prior, None).isfinite().all()
    assert ridge_from_rows(x.unsqueeze(0) * 0, y.unsqueeze(0), prior, None).isfinite().all()


def test_the_survival_term_is_optimal_when_inputs_vanish() -> None:
    x, y, prior = problem(400)
    probability = torch.tensor([0.0, 0.3, 0.0, 0.7, 0.5, 0.0], dtype=torch.float64)
    odds = (probability / (1 - probability)).unsqueeze(0)
    with_term = ridge(*moments(x, y), prior, odds, share=1e-9)[0]
    plain = ridge(*moments(x, y), prior, None, share=1e-9)[0]
    generator = torch.Generator().manual_seed(1)
    lives = [
        (torch.rand(len(x), 6, generator=generator, dtype=torch.float64) > probability) / (1 - probability)
        for _ in range(300)
    ]

    def expected_error(weights: Tensor) -> float:
        return float(sum(((x * life) @ weights.T - y).square().mean() for life in lives) / len(lives))

    best = expected_error(with_term)
    assert best < 0.9 * expected_error(plain)
    step = torch.Generator().manual_seed(2)
    for _ in range(20):
        nearby = with_term + 0.1 * torch.randn(with_term.shape, generator=step, dtype=torch.float64)
        assert best < expected_error(nearby)
