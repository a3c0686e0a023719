"""The example programs run, briefly, and prune."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, folder: Path, *words: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / name), "--epochs", "1", *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def halved(line: str) -> bool:
    found = re.search(r"(\d+) -> (\d+) MACs", line)
    assert found, line
    return int(found[2]) <= int(found[1]) / 2


@pytest.mark.parametrize("plugin", ["gsm-anneal", "bayes-reparam"])
def test_the_plain_loop(plugin: str, tmp_path: Path) -> None:
    assert halved(run("plain_loop.py", tmp_path, "--plugin", plugin))
    assert (tmp_path / "runs/plain/model.safetensors").exists()


def test_the_loop_with_timm_s_utilities(tmp_path: Path) -> None:
    found = re.search(r"-> (\d+) parameters.*the average has (\d+)", run("timm_loop.py", tmp_path))
    assert found
    assert found[1] == found[2]


@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="Lightning is not installed")
def test_the_lightning_callback(tmp_path: Path) -> None:
    assert halved(run("lightning_callback.py", tmp_path))
