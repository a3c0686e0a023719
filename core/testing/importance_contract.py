"""Tests for a third party's estimator: subclass, override one fixture, run pytest.

class TestMine(ImportanceContract):
    @pytest.fixture
    def estimator(self):
        return Mine
"""

from __future__ import annotations

import pytest

from prunus.core.importance import ImportanceEstimator
from prunus.core.testing.contract import Rule, enforce
from prunus.core.testing.importance_rules import IMPORTANCE_RULES


class ImportanceContract:
    """Every rule for estimators as one test each."""

    @pytest.fixture
    def estimator(self) -> type[ImportanceEstimator]:
        """The class to test."""
        pytest.fail("override the fixture `estimator`: return your ImportanceEstimator class")

    @pytest.mark.parametrize("rule", list(IMPORTANCE_RULES))
    def test_estimator_keeps_the_rule(self, estimator: type[ImportanceEstimator], rule: str) -> None:
        enforce(Rule(rule, IMPORTANCE_RULES[rule]), estimator, estimator.__name__)
