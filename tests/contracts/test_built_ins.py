"""Every estimator and method that ships keeps the contract that third parties are held to."""

from __future__ import annotations

import pytest

from prunus.core.registry import Registry
from prunus.core.testing.contract import check_estimator_contract, check_policy_contract

REGISTRY = Registry.discover()


def _built_in(kind: str) -> list[str]:
    return [e.name for e in REGISTRY.entries(kind) if e.source == "built-in"]  # type: ignore[arg-type]


@pytest.mark.parametrize("name", _built_in("importance"))
def test_every_estimator_keeps_every_rule(name: str) -> None:
    results = check_estimator_contract(REGISTRY.estimator(name), name)
    assert [r.problem for r in results if r.problem] == []


@pytest.mark.parametrize("name", _built_in("plugins"))
def test_every_method_keeps_every_rule(name: str) -> None:
    results = check_policy_contract(REGISTRY.policy(name), name)
    assert [r.problem for r in results if r.problem] == []
