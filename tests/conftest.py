"""Options of the whole test suite."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("coverage sweep", "pytest -m coverage")
    group.addoption("--shard", metavar="K/N", help="run the K-th of N slices of the sweep")
    group.addoption("--again", action="store_true", help="run models that passed before as well")
