"""Which models this run of the sweep covers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the sweep's own modules: families, ledger, examination


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per model, only when the sweep is asked for: naming the families may take minutes."""
    if "swept_model" in metafunc.fixturenames:
        metafunc.parametrize("swept_model", _chosen(metafunc.config))


def _chosen(config: pytest.Config) -> list[str]:
    expression = config.getoption("markexpr") or ""
    if "coverage" not in expression or "not coverage" in expression:
        return []
    import families

    names = families.all_names()
    shard = config.getoption("--shard")
    keyword = config.getoption("keyword") or ""
    names = [n for n in names if n not in families.TOO_LARGE or n.partition("/")[2] in keyword]
    if shard is None:
        return names
    number, _, total = shard.partition("/")
    if not (number.isdigit() and total.isdigit() and 1 <= int(number) <= int(total)):
        raise pytest.UsageError(f"--shard takes k/n with 1 <= k <= n, got {shard!r}")
    return names[int(number) - 1 :: int(total)]
