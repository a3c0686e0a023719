"""Images that cannot be read: named when they are first met, and counted for the report."""

from __future__ import annotations

import logging
from collections.abc import Callable

_LOG = logging.getLogger("prunus.data")
_NAMED = 10
"""So many are named; the others are counted."""


class BrokenImages:
    """What one data set's readers met, each image once. Without a listener, notices go to the log."""

    def __init__(self) -> None:
        self._met: list[str] = []
        self._notice: Callable[[str], None] = _LOG.warning

    def listen(self, notice: Callable[[str], None]) -> None:
        """Give every further notice to `notice`."""
        self._notice = notice

    def meet(self, problems: str) -> None:
        """`problems` are lines "NAME (REASON)", as the readers report them."""
        for problem in problems.splitlines():
            if problem in self._met:
                continue
            self._met.append(problem)
            if len(self._met) <= _NAMED:
                self._notice(f"left out an image that cannot be read: {problem}")
            elif len(self._met) == _NAMED + 1:
                self._notice("further images that cannot be read are counted, not named")

    @property
    def notes(self) -> tuple[str, ...]:
        """One sentence for the report; nothing if all was well."""
        if not self._met:
            return ()
        count = len(self._met)
        named = "; ".join(self._met[:_NAMED]) + ("; ..." if count > _NAMED else "")
        what = "1 image that cannot be read was" if count == 1 else f"{count} images that cannot be read were"
        return (f"{what} left out (in training, the next image took its place): {named}",)
