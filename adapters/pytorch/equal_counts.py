"""Where one Python number serves several axes, those axes keep equal counts, or nothing of them goes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from fractions import Fraction

from prunus.adapters.pytorch.attributes import Conflict
from prunus.adapters.pytorch.size_algebra import Monomial, Polynomial
from prunus.core.graph import ChannelGraph, ChannelGroup

Pair = tuple[str, str]


def reconcile(graph: ChannelGraph, conflicts: Sequence[Conflict]) -> ChannelGraph:
    """`graph` with the constraints under which no attribute has to be two numbers at once."""
    tags = _Tags(graph)
    locks: dict[str, str] = {}
    for conflict in conflicts:
        where = f"{conflict.attribute.module or 'the model'}.{conflict.attribute.name}"
        first = conflict.wanted[0]
        for other in conflict.wanted[1:]:
            pairs = _pairs(first, other)
            if pairs is not None and all(graph.groups[a].units == graph.groups[b].units for a, b in pairs):
                for a, b in pairs:
                    tags.join(a, b, where)
            else:
                reason = f"one number, {where}, is the size of axes that shrink in different steps"
                locks.update(dict.fromkeys(first.groups | other.groups, reason))
    return with_locks(tags.applied(graph), locks)


def with_locks(graph: ChannelGraph, locks: dict[str, str]) -> ChannelGraph:
    """`graph` with the groups of `locks` (group -> reason) locked, and everything tagged equal to them."""
    reasons = dict(locks)
    for names in graph.equal_counts.values():
        locked = next((n for n in names if n in reasons or graph.groups[n].locked is not None), None)
        if locked is not None:
            reason = reasons.get(locked) or graph.groups[locked].locked
            for name in names:
                reasons.setdefault(name, f"must keep as many units as {locked}, which is locked: {reason}")
    groups = [
        replace(group, locked=reasons[name], equal_count=None)
        if name in reasons and group.locked is None
        else group
        for name, group in graph.groups.items()
    ]
    return graph.with_groups(groups)


def _pairs(a: Polynomial, b: Polynomial) -> list[Pair] | None:
    """Groups that must keep equal counts for `a` to equal `b`; None if equal counts cannot do it."""
    left, right = _without(a.terms, b.terms), _without(b.terms, a.terms)
    left.sort(key=lambda term: (term[1], len(term[0]), term[0]))
    right.sort(key=lambda term: (term[1], len(term[0]), term[0]))
    if len(left) != len(right):
        return None
    pairs: list[Pair] = []
    for (x, coefficient), (y, other) in zip(left, right, strict=True):
        rest, other_rest = _difference(x, y), _difference(y, x)
        if coefficient != other or len(rest) != len(other_rest):
            return None
        pairs.extend(zip(rest, other_rest, strict=True))
    return pairs


def _without(
    terms: Iterable[tuple[Monomial, Fraction]], others: Iterable[tuple[Monomial, Fraction]]
) -> list[tuple[Monomial, Fraction]]:
    gone = set(others)
    return [term for term in terms if term not in gone]


def _difference(a: Monomial, b: Monomial) -> list[str]:
    rest = list(a)
    for group in b:
        if group in rest:
            rest.remove(group)
    return rest


class _Tags:
    """Sets of groups with equal counts, merged as conflicts come in."""

    def __init__(self, graph: ChannelGraph) -> None:
        self._set: dict[str, set[str]] = {}
        self._name: dict[str, str] = {}
        for tag, names in graph.equal_counts.items():
            for name in names[1:]:
                self.join(names[0], name, tag)

    def join(self, a: str, b: str, why: str) -> None:
        joined = self._set.get(a, {a}) | self._set.get(b, {b})
        tag = self._name.get(a) or self._name.get(b) or why
        for name in joined:
            self._set[name], self._name[name] = joined, tag

    def applied(self, graph: ChannelGraph) -> ChannelGraph:
        groups: list[ChannelGroup] = [
            replace(group, equal_count=self._name[name])
            if name in self._name and len(self._set[name]) > 1
            else group
            for name, group in graph.groups.items()
        ]
        return graph.with_groups(groups)
