"""The API reference is what the docstrings say now."""

from __future__ import annotations

import runpy
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_the_reference_is_current() -> None:
    made = runpy.run_path(str(DOCS / "make_api.py"))["api_text"]()
    assert (DOCS / "api.md").read_text("utf-8") == made, "run: python docs/make_api.py"
