"""Tests for a framework adapter: subclass, override one fixture, run pytest.

class TestMine(AdapterContract):
    @pytest.fixture
    def fresh(self):
        return lambda: MyAdapter(small_model(), small_data())
"""

from __future__ import annotations

import pytest

from prunus.core.testing.adapter_rules import ADAPTER_RULES, Fresh


class AdapterContract:
    """Every rule for adapters as one test each."""

    @pytest.fixture
    def fresh(self) -> Fresh:
        """A function that opens the adapter anew, with equal weights and data every time."""
        pytest.fail("override the fixture `fresh`: return a function that opens your adapter")

    @pytest.mark.parametrize("rule", list(ADAPTER_RULES))
    def test_adapter_keeps_the_rule(self, fresh: Fresh, rule: str) -> None:
        ADAPTER_RULES[rule](fresh, "the adapter")
