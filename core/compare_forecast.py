"""How long the rest of a comparison takes, going by the cells that are done."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import fmean

from prunus.core.compare_protocol import Cell
from prunus.core.compare_record import CellRecord

_LIKE: tuple[Callable[[Cell | CellRecord], object], ...] = (
    lambda cell: (_entry(cell), cell.epochs, cell.target, cell.teaching),
    lambda cell: (_entry(cell), cell.epochs, cell.target),
    lambda cell: (_entry(cell), cell.epochs),
    lambda cell: cell.epochs,
    lambda cell: None,
)
"""What two cells may have in common, from the most to the least that it says about their time."""


def seconds_left(cells: Sequence[Cell], records: Iterable[CellRecord]) -> float | None:
    """Seconds that `cells` take one after the other; None without a finished cell.

    Each is taken to last as long as the finished cells that are most like it did, in the mean.
    """
    known: list[dict[object, list[float]]] = [{} for _ in _LIKE]
    for record in records:
        if record.outcome is not None:
            for groups, like in zip(known, _LIKE, strict=True):
                groups.setdefault(like(record), []).append(record.seconds)
    if not known[-1]:
        return None
    total = 0.0
    for cell in cells:
        total += next(
            fmean(groups[like(cell)]) for groups, like in zip(known, _LIKE, strict=True) if like(cell) in groups
        )
    return total


def _entry(cell: Cell | CellRecord) -> str:
    return cell.entry.name if isinstance(cell, Cell) else cell.entry
