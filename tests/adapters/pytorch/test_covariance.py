"""Streamed moments are the moments of all samples at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunus.adapters.pytorch import covariance
from prunus.adapters.pytorch.covariance import Moments


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    slots=st.integers(1, 3),
    width=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_merging_batches_equals_all_samples_at_once(sizes: list[int], slots: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(sizes), slots, width, generator=generator, dtype=torch.float64) + 3
    y = torch.randn(sum(sizes), slots, 2, generator=generator, dtype=torch.float64) - 5
    moments, variances = Moments(width, slots, targets=2), Moments(width, slots, full=False)
    for part_x, part_y in zip(x.split(sizes), y.split(sizes), strict=True):
        moments.add(part_x, part_y)
        variances.add(part_x)
    for s in range(slots):
        both = torch.cat([y[:, s], x[:, s]], 1)
        expected = torch.cov(both.T, correction=0).reshape(2 + width, 2 + width)
        torch.testing.assert_close(moments.covariance[s], expected[2:, 2:])
        torch.testing.assert_close(moments.cross_covariance[s], expected[:2, 2:])
        torch.testing.assert_close(variances.covariance[s], expected.diagonal()[2:])
    torch.testing.assert_close(moments.mean, x.mean(0))
    torch.testing.assert_close(moments.target_mean, y.mean(0))


def test_a_large_mean_costs_no_digits() -> None:
    x = torch.randn(4000, 1, 2, dtype=torch.float64)
    near, far = Moments(2), Moments(2)
    for part in x.split(100):
        near.add(part)
        far.add(part + 1e6)
    torch.testing.assert_close(near.covariance, far.covariance, rtol=1e-8, atol=1e-8)


def test_no_more_than_one_block_is_converted_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(covariance, "BLOCK_BYTES", 8 * 3 * 7)
    rows = torch.randn(50, 1, 3)
    moments, seen = Moments(3), []
    merge = moments._merge
    monkeypatch.setattr(moments, "_merge", lambda x, y: (seen.append(x.shape[1]), merge(x, y)))
    moments.add(rows)
    assert max(seen) == 7 and sum(seen) == 50
    torch.testing.assert_close(moments.covariance[0], torch.cov(rows[:, 0].double().T, correction=0))
