"""Who may write to stdout."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TextIO


@contextlib.contextmanager
def stdout_for_json(json_wanted: bool) -> Iterator[TextIO]:
    """Yield the real stdout; while it is kept for one JSON object, everything else that prints goes to stderr."""
    real = sys.stdout
    if not json_wanted:
        yield real
        return
    with contextlib.redirect_stdout(sys.stderr):
        yield real
    real.flush()
