"""Merging and splitting axes: the algebra behind every view and reshape."""

from __future__ import annotations

from math import prod

import numpy as np

from prunus.adapters.pytorch.tracing.labelling import Label, Labelling, Labels, ids_or_true, short, tidy
from prunus.adapters.pytorch.tracing.program import Shape, Step
from prunus.adapters.pytorch.tracing.variables import TRUE
from prunus.core.cost import IntArray

MAX_CELLS = 1_000_000
"""A merged axis beyond this size is locked: no model met so far has one."""


def reshape_labels(t: Labelling, s: Step, old: Shape, labels: Labels, new: Shape) -> Labels:
    """Labels after a reshape from `old` to `new`: blocks of equal product are merged, then split."""
    if prod(old) == 0:
        return [None] * len(new)
    result: Labels = []
    i = j = 0
    while i < len(old) or j < len(new):
        start_i, start_j = i, j
        left = right = 1
        if i < len(old):
            left, i = old[i], i + 1
        if j < len(new):
            right, j = new[j], j + 1
        while left != right:
            if left < right:
                left, i = left * old[i], i + 1
            else:
                right, j = right * new[j], j + 1
        result += _block(t, s, old[start_i:i], labels[start_i:i], new[start_j:j])
    return result


def _block(t: Labelling, s: Step, old: Shape, labels: Labels, new: Shape) -> Labels:
    if all(ids is None for ids in labels):
        return [None] * len(new)
    wide_old = [n for n in old if n != 1]
    wide_new = [n for n in new if n != 1]
    kept = [ids for n, ids in zip(old, labels, strict=True) if n != 1]
    pieces = iter(kept if wide_old == wide_new else split(t, s, merge(t, s, wide_old, kept), tuple(wide_new)))
    return [next(pieces) if n != 1 else None for n in new]


def merge(t: Labelling, s: Step, sizes: list[int], labels: Labels) -> Label:
    """One axis from several: index (i, j) lives while i and j both live."""
    total = prod(sizes)
    if total > MAX_CELLS:
        for ids in labels:
            t.lock(ids, f"{short(s)} in {s.where()} merges it into an axis of {total} entries")
        return None
    merged = ids_or_true(labels[0], sizes[0]) if sizes else np.zeros(1, dtype=np.int64)
    for n, ids in zip(sizes[1:], labels[1:], strict=True):
        merged = t.variables.both(np.repeat(merged, n), np.tile(ids_or_true(ids, n), len(merged)))
    return tidy(merged)


def split(t: Labelling, s: Step, ids: Label, sizes: Shape) -> Labels:
    """Several axes from one, in row-major order."""
    if ids is None or len(sizes) <= 1:
        return [ids] * len(sizes)
    rows, columns = sizes[0], prod(sizes[1:])
    if rows == 1:
        return [None, *split(t, s, ids, sizes[1:])]
    if columns == 1:
        return [ids, *([None] * (len(sizes) - 1))]
    row_ids, column_ids = _factor(t, s, ids.reshape(rows, columns))
    return [row_ids, *split(t, s, column_ids, sizes[1:])]


def _factor(t: Labelling, s: Step, cells: IntArray) -> tuple[Label, Label]:
    """Row and column variables whose conjunction is each cell; new ones where the cells have no structure."""
    rows, columns = cells.shape
    leaves = t.variables.leaves(cells.reshape(-1)).reshape(rows, columns, -1)
    if (leaves == leaves[:, :1]).all():
        return tidy(cells[:, 0]), None
    if (leaves == leaves[:1]).all():
        return None, tidy(cells[0])
    in_row = _common(leaves[:, 0], leaves.transpose(1, 0, 2))
    in_column = _common(leaves[0], leaves)
    of_row = np.where(in_row, leaves[:, 0], TRUE)
    of_column = np.where(in_column, leaves[0], TRUE)
    explained = _contains(of_row[:, None, :], leaves) | _contains(of_column[None, :, :], leaves)
    if (explained | (leaves == TRUE)).all():
        return tidy(t.variables.conjunctions(of_row)), tidy(t.variables.conjunctions(of_column))
    row_ids, column_ids = t.variables.fresh(rows), t.variables.fresh(columns)
    joint = t.variables.both(np.repeat(row_ids, columns), np.tile(column_ids, rows))
    t.variables.unify(cells.reshape(-1), joint, f"its channels are mixed by {short(s)} in {s.where()}")
    return row_ids, column_ids


def _common(candidates: IntArray, cells: IntArray) -> np.ndarray:
    """candidates (n, k), cells (m, n, k): which candidates occur in all m cells of their line."""
    present = (candidates[None, :, :, None] == cells[:, :, None, :]).any(axis=3)
    return np.asarray(present.all(axis=0) & (candidates != TRUE))


def _contains(line: IntArray, leaves: IntArray) -> np.ndarray:
    """leaves (r, c, k): which of them occur in the line's variables."""
    return np.asarray((leaves[:, :, :, None] == line[:, :, None, :]).any(axis=3))
