"""Options of the whole test suite."""

from __future__ import annotations

import os

import pytest

# Before anything imports numpy or torch. Threads that share matrices as small as the tests' mostly wait for each
# other: ten times as long on a machine that has something else to do. Tests of threads set their own number.
for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")


AT_ONCE = 4
"""Each process of tests takes a gigabyte or two."""


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A model of the coverage sweep may need all of the memory, so those go one by one, or by --shard."""
    return 0 if config.option.markexpr == "coverage" else min(os.cpu_count() or 1, AT_ONCE)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("coverage sweep", "pytest -m coverage")
    group.addoption("--shard", metavar="K/N", help="run the K-th of N slices of the sweep")
    group.addoption("--again", action="store_true", help="run models that passed before as well")
