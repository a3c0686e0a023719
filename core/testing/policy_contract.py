"""Tests for a third party's method: subclass, override one fixture, run pytest.

class TestMine(PolicyContract):
    @pytest.fixture
    def policy(self):
        return Mine
"""

from __future__ import annotations

import pytest

from prunus.core.policy import PruningPolicy
from prunus.core.testing.contract import Rule, enforce
from prunus.core.testing.policy_rules import POLICY_RULES


class PolicyContract:
    """Every rule for policies as one test each."""

    @pytest.fixture
    def policy(self) -> type[PruningPolicy]:
        """The class to test."""
        pytest.fail("override the fixture `policy`: return your PruningPolicy class")

    @pytest.mark.parametrize("rule", list(POLICY_RULES))
    def test_policy_keeps_the_rule(self, policy: type[PruningPolicy], rule: str) -> None:
        enforce(Rule(rule, POLICY_RULES[rule]), policy, policy.__name__)
