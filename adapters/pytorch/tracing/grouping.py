"""From alive variables to channel groups, and from labels to axis lengths in kept counts.

Leaves (independent variables) belong to one group when they come from one family and occur equally often
in every labelled axis of every tensor, literal and cost: then any of them is worth any other, counts alone
decide every length, and every length is a polynomial of the kept counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from prunus.adapters.pytorch.tracing.labelling import Labelling, RoleMark
from prunus.adapters.pytorch.tracing.program import Step
from prunus.adapters.pytorch.tracing.variables import TRUE
from prunus.core.cost import Extent, IntArray
from prunus.core.graph import Axis, ChannelGroup, Role, Slice

SINGLE = "it is a single unit"
IRREGULAR = "its units are wired irregularly, so that no count says how long its axes become"
UNWRITTEN = "no weight writes it"
ROLES: tuple[Role, ...] = ("scales", "writes", "reads")
_MIX = np.uint64(0x9E3779B97F4A7C15)


class Grouping:
    """The partition of leaves into groups, and everything that is read off it."""

    def __init__(self, labelling: Labelling) -> None:
        self._labelling = labelling
        self._variables = labelling.variables
        self._tables: dict[int, tuple[IntArray, IntArray]] = {}
        self._axes: dict[Axis, IntArray] = {
            (name, axis): ids
            for name, labels in labelling.tensors.items()
            for axis, ids in enumerate(labels)
            if ids is not None
        }
        counted = [x.ids for x in labelling.literals]
        counted += [ids for x in labelling.multiplications for ids in x.axes]
        for ids in (*self._axes.values(), *counted):
            self._table(ids)
        self._roles = self._resolve_roles()
        self._partition()
        self._lock_irregular()
        self._extents: dict[int, Extent] = {}
        self.groups = self._build()

    def _table(self, ids: IntArray) -> IntArray:
        """(n, k) leaves of a label array; the array is kept alive so that its id stays its own."""
        found = self._tables.get(id(ids))
        if found is None:
            found = self._tables[id(ids)] = (ids, self._variables.leaves(ids))
        return found[1]

    def _partition(self) -> None:
        size = self._variables.count
        signature = np.zeros(size, dtype=np.uint64)
        present = np.zeros(size, dtype=bool)
        with np.errstate(over="ignore"):
            for number, (_, table) in enumerate(self._tables.values()):
                code = np.uint64(2 * number + 1) * _MIX
                code ^= code >> np.uint64(29)
                np.add.at(signature, table.reshape(-1), code * np.uint64(0xBF58476D1CE4E5B9) | np.uint64(1))
        for ids in self._axes.values():
            present[self._table(ids)] = True
        present[TRUE] = False
        leaves = np.flatnonzero(present)
        self._reasons = self._variables.locked()
        texts = sorted(set(self._reasons.values()))
        number_of = {text: i + 1 for i, text in enumerate(texts)}
        reason = np.zeros(size, dtype=np.int64)
        for leaf, text in self._reasons.items():
            reason[leaf] = number_of[text]
        inverse = _classes(reason[leaves], signature[leaves].astype(np.int64), self._variables.family(leaves))
        self._group_of = np.full(size, -1, dtype=np.int64)
        self._group_of[leaves] = inverse
        self._count = int(inverse.max(initial=-1)) + 1
        self._units = np.bincount(inverse, minlength=self._count)
        self._lock_of: list[str | None] = [None] * self._count
        self._locked = np.zeros(self._count, dtype=bool)
        for leaf, text in self._reasons.items():
            if self._group_of[leaf] >= 0:
                self._lock(int(self._group_of[leaf]), text)
        for group in np.flatnonzero(self._units == 1).tolist():
            self._lock(group, SINGLE)

    def _lock_irregular(self) -> None:
        """Locks groups whose joint indices do not form a complete product, until none is left."""
        while True:
            found = False
            for _, table in self._tables.values():
                if table.shape[1] == 1:
                    continue
                for pattern, rows in self._patterns(table):
                    if not self._complete(pattern, rows):
                        found = True
                        for group in pattern:
                            self._lock(group, IRREGULAR)
            if not found:
                return

    def _lock(self, group: int, reason: str) -> None:
        if self._lock_of[group] is None:
            self._lock_of[group] = reason
            self._locked[group] = True

    def _patterns(self, table: IntArray) -> Iterable[tuple[tuple[int, ...], IntArray]]:
        """Rows of a table by the unlocked groups of their leaves: (groups, (rows, leaves))."""
        groups = np.where(table == TRUE, -1, self._group_of[table])
        groups = np.where((groups >= 0) & self._locked[groups], -1, groups)
        order = np.argsort(np.where(groups < 0, np.iinfo(np.int64).max, groups), axis=1, kind="stable")
        groups, leaves = np.take_along_axis(groups, order, 1), np.take_along_axis(table, order, 1)
        patterns, inverse = np.unique(groups, axis=0, return_inverse=True)
        for i, pattern in enumerate(patterns):
            width = int((pattern >= 0).sum())
            yield tuple(int(g) for g in pattern[:width]), leaves[inverse.reshape(-1) == i][:, :width]

    def _complete(self, pattern: tuple[int, ...], rows: IntArray) -> bool:
        if len(pattern) < 2:
            return True
        if len(set(pattern)) != len(pattern):
            return False
        _, counts = np.unique(rows, axis=0, return_counts=True)
        return len(counts) == int(np.prod(self._units[list(pattern)])) and len(set(counts.tolist())) == 1

    def extent(self, ids: IntArray) -> Extent:
        """The number of alive indices of a label array, as a polynomial of kept counts."""
        found = self._extents.get(id(ids))
        if found is None:
            found = self._extents[id(ids)] = self._extent(self._table(ids))
        return found

    def _extent(self, table: IntArray) -> Extent:
        if table.shape[1] == 1:
            return self._plain_extent(table[:, 0])
        constant, terms = 0, []
        for pattern, rows in self._patterns(table):
            if not pattern:
                constant = len(rows)
                continue
            times = len(rows) // int(np.prod(self._units[list(pattern)]))
            terms.append((times, tuple(self._names[g] for g in pattern)))
        return Extent(constant, tuple(sorted(terms)))

    def _plain_extent(self, leaves: IntArray) -> Extent:
        groups = self._group_of[leaves]
        groups = np.where((groups < 0) | self._locked[groups], self._count, groups)
        counts = np.bincount(groups, minlength=self._count + 1)
        terms = [
            (int(counts[g] // self._units[g]), (self._names[g],))
            for g in np.flatnonzero(counts[: self._count]).tolist()
        ]
        return Extent(int(counts[self._count]), tuple(sorted(terms)))

    def alive(self, ids: IntArray, keep: Mapping[str, IntArray]) -> np.ndarray:
        """(n,) bool: which indices are left when each group keeps the units in `keep`."""
        dead = np.zeros(self._variables.count, dtype=bool)
        for name, units in keep.items():
            members = self._members[name]
            dead[members] = True
            dead[members[units]] = False
        return np.asarray(~dead[self._table(ids)].any(axis=1))

    def _resolve_roles(self) -> dict[Axis, list[tuple[IntArray, Role]]]:
        roles: dict[Axis, list[tuple[IntArray, Role]]] = {}
        for mark in self._labelling.roles:
            axis = self._marked_axis(mark)
            if axis is not None:
                leaves = self._variables.leaves(mark.ids).reshape(-1)
                roles.setdefault(axis, []).append((leaves, mark.role))
        return roles

    def _marked_axis(self, mark: RoleMark) -> Axis | None:
        """The tensor axis behind an axis of a weight, through whatever was computed in between."""
        if mark.step.op == "tensor":
            return mark.step.name, mark.axis
        sources = [x for x in _ancestors(mark.step) if x.op == "tensor" and x.shape]
        rank = max((len(x.shape) for x in sources), default=0)
        for source in sources:
            if len(source.shape) == rank and source.shape == mark.step.shapes:
                return source.name, mark.axis
        for source in sources:
            for axis in range(len(source.shape)):
                own = self._axes.get((source.name, axis))
                if len(source.shape) == rank and own is not None and np.isin(mark.ids, own).all():
                    return source.name, axis
        return None

    def _role_codes(self, axis: Axis, codes: IntArray) -> IntArray:
        """For the leaves on this axis their role, as an index into ROLES; reading outranks writing.

        `codes` is room for one number per variable, used again for every axis.
        """
        codes[self._table(self._axes[axis])] = 0
        for leaves, _ in self._roles.get(axis, []):
            codes[leaves] = 0
        for leaves, role in self._roles.get(axis, []):
            codes[leaves] = np.maximum(codes[leaves], ROLES.index(role))
        return codes

    def _build(self) -> list[ChannelGroup]:
        slices: dict[int, list[tuple[Axis, int, Role]]] = {}
        room = np.zeros(self._variables.count, dtype=np.int64)
        for axis, ids in self._axes.items():
            table, codes = self._table(ids), self._role_codes(axis, room)
            for column in range(table.shape[1]):
                for group, row in _first_rows(self._group_of[table[:, column]]):
                    if group >= 0:
                        role = ROLES[codes[table[row, column]]]
                        slices.setdefault(group, []).append((axis, column, role))
        chosen = {g: found for g, found in slices.items() if any(role == "writes" for _, _, role in found)}
        members = {g: self._ordered(g, found) for g, found in chosen.items()}
        self._name(chosen, members)
        inexact = self._touched(self._labelling.statistic_ids)
        ungateable = self._touched(self._labelling.ungateable_ids)
        unit = np.full(self._variables.count, -1, dtype=np.int64)
        built = []
        for group, found in chosen.items():
            unit[members[group]] = np.arange(len(members[group]))
            pieces = [
                self._slice(axis, columns, role, group, unit) for (axis, role), columns in _merged(found).items()
            ]
            built.append(
                ChannelGroup(
                    self._names[group],
                    len(members[group]),
                    tuple(pieces),
                    exact=group not in inexact,
                    locked=self._lock_of[group],
                    gateable=group not in ungateable,
                )
            )
        self._members = {self._names[g]: leaves for g, leaves in members.items()}
        return built

    def _slice(self, axis: Axis, columns: list[int], role: Role, group: int, unit: IntArray) -> Slice:
        table = self._table(self._axes[axis])
        unit_of = np.full(len(table), -1, dtype=np.int64)
        for column in columns:
            own = self._group_of[table[:, column]] == group
            unit_of[own] = unit[table[own, column]]
        return Slice(axis[0], axis[1], role, unit_of)

    def _ordered(self, group: int, found: list[tuple[Axis, int, Role]]) -> IntArray:
        """The leaves of a group in the order in which its first writer has them."""
        axis = next(axis for axis, _, role in found if role == "writes")
        table = self._table(self._axes[axis])
        leaves = table[self._group_of[table] == group]
        _, first = np.unique(leaves, return_index=True)
        return np.asarray(leaves[np.sort(first)])

    def _name(self, chosen: Mapping[int, list[tuple[Axis, int, Role]]], members: Mapping[int, IntArray]) -> None:
        """Each group is named after its first writer, numbered where that writer writes several groups."""
        writers: dict[str, list[tuple[tuple[int, int, int], int]]] = {}
        for group, found in chosen.items():
            axis, column = next((axis, column) for axis, column, role in found if role == "writes")
            table = self._table(self._axes[axis])
            first = int(np.flatnonzero((self._group_of[table] == group).any(axis=1))[0])
            writers.setdefault(axis[0], []).append(((axis[1], first, column), group))
        self._names = {}
        for tensor, entries in writers.items():
            for number, (_, group) in enumerate(sorted(entries)):
                self._names[group] = tensor if len(entries) == 1 else f"{tensor}#{number + 1}"
        for group in range(self._count):
            if group not in self._names:
                self._lock(group, UNWRITTEN)

    def _touched(self, marks: Iterable[IntArray]) -> set[int]:
        touched: set[int] = set()
        for ids in marks:
            touched.update(int(g) for g in np.unique(self._group_of[np.unique(self._variables.leaves(ids))]))
        return touched


def _first_rows(groups: IntArray) -> list[tuple[int, int]]:
    """(group, first row that holds it), by group."""
    if (groups == groups[0]).all():  # nearly always
        return [(int(groups[0]), 0)]
    found, first = np.unique(groups, return_index=True)
    return list(zip(found.tolist(), first.tolist(), strict=True))


def _classes(*keys: IntArray) -> IntArray:
    """Numbers of the classes of equal rows, in the order of the last key, then the one before..."""
    order = np.lexsort(keys)
    starts = np.zeros(len(order), dtype=bool)
    for key in keys:
        starts[1:] |= np.diff(key[order]) != 0
    numbers = np.empty(len(order), dtype=np.int64)
    numbers[order] = np.cumsum(starts)
    return numbers


def _merged(found: list[tuple[Axis, int, Role]]) -> dict[tuple[Axis, Role], list[int]]:
    merged: dict[tuple[Axis, Role], list[int]] = {}
    for axis, column, role in found:
        merged.setdefault((axis, role), []).append(column)
    return merged


def _ancestors(step: Step) -> list[Step]:
    seen: dict[Step, None] = {}
    stack = [step]
    while stack:
        current = stack.pop()
        if current not in seen:
            seen[current] = None
            stack.extend(current.inputs())
    return sorted(seen, key=lambda x: x.index)
