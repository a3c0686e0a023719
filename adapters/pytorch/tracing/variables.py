"""Alive variables: which indices of which axes live and die together.

Every index of every axis of every tensor carries one variable, "this index is alive". Three facts are
all that a network's operators say about them: two variables are equal, one is the conjunction of two
others (an index of a merged axis lives while its head and its head dimension both live), and one can
never die. Whenever two conditions must agree, a choice is made that is *sufficient* for equality, so the
result may forbid more than needed, but never too little.

    ids  (n,) int64: variables along one axis; variable 0 (`TRUE`) never dies
"""

from __future__ import annotations

import numpy as np

from prunus.core.cost import IntArray

TRUE = 0
_ROOM = 2**16
"""Variables to begin with: enough for most models, and memory that is not touched costs nothing."""


class Variables:
    """Union-find over alive variables, with conjunctions, in numpy."""

    def __init__(self) -> None:
        self._parent = np.zeros(_ROOM, dtype=np.int64)
        self._left = np.zeros(_ROOM, dtype=np.int64)
        self._right = np.zeros(_ROOM, dtype=np.int64)
        self._run = np.zeros(_ROOM, dtype=np.int64)
        self._mark = np.zeros(_ROOM, dtype=np.int64)
        """Room for notes on each variable within one method."""
        self._families = [0]
        self._locks: list[tuple[IntArray, str]] = []
        self.count = 1

    def _allocate(self, n: int) -> IntArray:
        stop = self.count + n
        if stop > len(self._parent):
            size = max(2 * len(self._parent), stop)
            for name in ("_parent", "_left", "_right", "_run", "_mark"):
                grown = np.zeros(size, dtype=np.int64)
                old = getattr(self, name)
                grown[: len(old)] = old
                setattr(self, name, grown)
        ids = np.arange(self.count, stop, dtype=np.int64)
        self._parent[self.count : stop] = ids
        self.count = stop
        return ids

    def fresh(self, n: int) -> IntArray:
        """`n` new independent variables; they form one family."""
        ids = self._allocate(n)
        self._run[self.count - n : self.count] = len(self._families)
        self._families.append(len(self._families))
        return ids

    def both(self, a: IntArray, b: IntArray) -> IntArray:
        """Element by element the conjunction of two equally long arrays of variables."""
        a, b = self.roots(a), self.roots(b)
        made = np.where(a == TRUE, b, a)
        pairs = np.flatnonzero((a != TRUE) & (b != TRUE) & (a != b))
        if len(pairs):
            ids = self._allocate(len(pairs))
            self._left[ids], self._right[ids] = a[pairs], b[pairs]
            made[pairs] = ids
        return made

    def roots(self, ids: IntArray) -> IntArray:
        """The representative of each variable's class, same shape as `ids`."""
        found = self._parent[ids]
        further = self._parent[found]
        if (further == found).all():
            return found
        while not (further == found).all():
            found, further = further, self._parent[further]
        self._parent[ids] = found
        return found

    def leaves(self, ids: IntArray) -> IntArray:
        """(n, k): the independent variables that each of `ids` is a conjunction of, padded with TRUE.

        In the order of the conjunctions (heads before head dimensions), without repetition.
        """
        roots = self.roots(ids)
        table = roots[:, None]
        if not self._left[roots].any():  # TRUE is zero
            return table
        while True:
            joint = self._left[table] != TRUE
            if not joint.any():
                break
            left = np.where(joint, self.roots(self._left[table]), table)
            right = np.where(joint, self.roots(self._right[table]), TRUE)
            table = np.stack([left, right], axis=2).reshape(len(ids), -1)
            table = table[:, (table != TRUE).any(axis=0)]
        return _compact(table)

    def family(self, leaves: IntArray) -> IntArray:
        """The family of each leaf: variables created together, and those identified with them."""
        runs = np.unique(self._run[leaves])
        lookup = {int(run): self._family_root(int(run)) for run in runs}
        table = np.array([lookup[int(run)] for run in runs], dtype=np.int64)
        return table[np.searchsorted(runs, self._run[leaves])]

    def lock(self, ids: IntArray, reason: str) -> None:
        """None of `ids` may die. The first reason given for a leaf is the one reported."""
        if len(ids):
            self._locks.append((ids, reason))

    def locked(self) -> dict[int, str]:
        """Leaf -> reason, as of now."""
        reasons: dict[int, str] = {}
        for ids, reason in self._locks:
            for leaf in np.unique(self.leaves(ids)):
                reasons.setdefault(int(leaf), reason)
        reasons.pop(TRUE, None)
        return reasons

    def unify(self, a: IntArray, b: IntArray, reason: str) -> None:
        """Make `a[i]` and `b[i]` live and die together; `reason` explains the locks that this takes."""
        if a is b:
            return
        a, b = self.roots(a), self.roots(b)
        differ = a != b
        if not differ.all():
            a, b = a[differ], b[differ]
        if not len(a):
            return
        if not (a.all() and b.all()):  # TRUE is zero
            fixed = (a == TRUE) | (b == TRUE)
            self.lock(np.concatenate([a[fixed], b[fixed]]), reason)
            a, b = a[~fixed], b[~fixed]
        if len(a) and not (self._bind(b, a) or self._bind(a, b)):
            self._unify_leaves(a, b, reason)

    def _bind(self, source: IntArray, target: IntArray) -> bool:
        """Identify independent, distinct `source` variables with `target`, all at once; False if not possible."""
        numbers = np.arange(1, len(source) + 1)
        self._mark[source] = numbers
        if self._left[source].any() or not (self._mark[source] == numbers).all():  # TRUE is zero
            return False
        joint = self._left[target] != TRUE
        several = bool(joint.any())
        self._mark[self.leaves(target) if several else target] = 0
        if not self._mark[source].all():
            return False
        self._parent[source] = target
        plain = ~joint
        self._join_families(source[plain] if several else source, target[plain] if several else target)
        return True

    def _unify_leaves(self, a: IntArray, b: IntArray, reason: str) -> None:
        left, right = self.leaves(a), self.leaves(b)
        full = left.shape == right.shape and (left != TRUE).all() and (right != TRUE).all()
        if full and left.shape[1] > 1 and not np.isin(left, right).any():
            for column in range(left.shape[1]):
                pairs = np.unique(np.stack([left[:, column], right[:, column]]), axis=1)
                self.unify(pairs[0], pairs[1], reason)
            return
        pairs = _distinct_rows(np.stack([a, b], axis=1))
        for x, y in pairs:
            self._unify_pair(int(x), int(y), reason)

    def _leaf_tuple(self, x: int) -> tuple[int, ...]:
        return tuple(int(v) for v in self.leaves(np.array([x], dtype=np.int64))[0] if v != TRUE)

    def _unify_pair(self, x: int, y: int, reason: str) -> None:
        left, right = self._leaf_tuple(x), self._leaf_tuple(y)
        common = set(left) & set(right)
        left = tuple(v for v in left if v not in common)
        right = tuple(v for v in right if v not in common)
        if not left or not right:
            self.lock(np.array(left + right, dtype=np.int64), reason)
        elif len(left) == len(right):
            for u, v in zip(left, right, strict=True):
                self._identify(u, v)
        elif len(left) == 1 or len(right) == 1:
            single, several = (left, right) if len(left) == 1 else (right, left)
            self._parent[single[0]] = self._conjunction(several)
        else:
            for v in left[1:] + right:
                self._identify(left[0], v)

    def _identify(self, u: int, v: int) -> None:
        u, v = (int(r) for r in self.roots(np.array([u, v], dtype=np.int64)))
        if u == v:
            return
        self._parent[v] = u
        self._join_families(np.array([v]), np.array([u]))

    def _conjunction(self, leaves: tuple[int, ...]) -> int:
        joint = np.array([leaves[0]], dtype=np.int64)
        for leaf in leaves[1:]:
            joint = self.both(joint, np.array([leaf], dtype=np.int64))
        return int(joint[0])

    def conjunctions(self, table: IntArray) -> IntArray:
        """(n,): for each row of leaves (padded with TRUE) the variable that is their conjunction."""
        joint = table[:, 0]
        for column in range(1, table.shape[1]):
            joint = self.both(joint, table[:, column])
        return joint

    def _family_root(self, run: int) -> int:
        while self._families[run] != run:
            self._families[run] = self._families[self._families[run]]
            run = self._families[run]
        return run

    def _join_families(self, a: IntArray, b: IntArray) -> None:
        runs, others = self._run[a], self._run[b]
        if len(runs) and (runs == runs[0]).all() and (others == others[0]).all():  # nearly always
            pairs = [(runs[0], others[0])]
        else:
            pairs = _distinct_rows(np.stack([runs, others], axis=1)).tolist()
        for x, y in pairs:
            x, y = self._family_root(int(x)), self._family_root(int(y))
            if x != y:
                self._families[max(x, y)] = min(x, y)


def _distinct_rows(table: IntArray) -> IntArray:
    """The different rows of (n, 2), in the order of their first occurrence."""
    if len(table) < 2:
        return table
    _, first = np.unique(table[:, 0] * (int(table.max()) + 1) + table[:, 1], return_index=True)
    return table[np.sort(first)]


def _compact(table: IntArray) -> IntArray:
    """Drop repetitions within each row, move the padding to the right, trim empty columns."""
    table = table.copy()
    for column in range(1, table.shape[1]):
        repeated = (table[:, :column] == table[:, column : column + 1]).any(axis=1)
        table[repeated, column] = TRUE
    order = np.argsort(table == TRUE, axis=1, kind="stable")
    table = np.take_along_axis(table, order, axis=1)
    width = max(int((table != TRUE).sum(axis=1).max(initial=0)), 1)
    return table[:, :width]
