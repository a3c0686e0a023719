"""The sweep: `pytest -m coverage [--shard k/n] [--again]`. Resumable: what passed is not run again."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import ledger
import pytest

SECONDS, GIB = 1800, 20
EXAMINATION = Path(__file__).with_name("examination.py")


def _limit() -> None:
    """Memory that a process may write to: libraries that it maps and never touches do not count."""
    resource.setrlimit(resource.RLIMIT_DATA, (GIB * 2**30, GIB * 2**30))


def _examined(name: str) -> dict[str, Any]:
    try:
        done = subprocess.run(
            [sys.executable, str(EXAMINATION), name],
            capture_output=True,
            text=True,
            timeout=SECONDS,
            preexec_fn=_limit,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    except subprocess.TimeoutExpired:
        return {"model": name, "fault": f"did not end within {SECONDS} s"}
    last = (done.stdout.strip().splitlines() or [""])[-1]
    if done.returncode == 0 and last.startswith("{"):
        record: dict[str, Any] = json.loads(last)
        return record
    reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return {"model": name, "fault": reason[:500]}


@pytest.mark.coverage
@pytest.mark.timeout(SECONDS + 60)
def test_a_model_is_traced_pruned_proven_and_replayed(swept_model: str, request: pytest.FixtureRequest) -> None:
    record = ledger.read().get(swept_model)
    if request.config.getoption("--again") or not ledger.passed(record):
        record = _examined(swept_model)
        ledger.add(record)
    assert record is not None
    assert not ledger.faults(record)
