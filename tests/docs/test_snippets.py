"""Every Python block of README and docs runs: the blocks of a page in order, as one program."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ("docs/users.md", "docs/plugin_authors.md", "docs/adapter_authors.md")
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: str) -> list[str]:
    return BLOCK.findall((ROOT / page).read_text("utf-8"))


def run(program: str, folder: Path, *words: str) -> str:
    """Its output; the test fails with all it said if it ends otherwise than well."""
    script = folder / "page.py"
    script.write_text(program, "utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *words, str(script)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run_as_one_program(page: str, tmp_path: Path) -> None:
    found = blocks(page)
    assert found
    run("\n\n".join(found), tmp_path)


@pytest.mark.parametrize("page", ["docs/plugin_authors.md", "docs/adapter_authors.md"])
def test_the_contract_tests_of_a_page_pass(page: str, tmp_path: Path) -> None:
    """The classes that a page shows are collected and kept by pytest."""
    out = run("\n\n".join(blocks(page)), tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    assert " passed" in out


def test_the_blocks_of_the_readme_run_in_a_folder_with_a_finished_run(tmp_path: Path) -> None:
    make = (
        "from prunus.core.cli import run\n"
        "words = 'prune --plugin one-shot --model prunus/resnet8 --data none --output runs/NAME'\n"
        "assert run(words.split()) == 0\n"
    )
    run("\n\n".join([make, *blocks("README.md")]), tmp_path)


def test_every_page_is_in_the_list() -> None:
    found = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}
    assert {page for page in found if blocks(page)} == set(PAGES)
