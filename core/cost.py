"""What a model costs as a function of how many units each group keeps.

Costs are sums of products of axis lengths, and an axis length is a polynomial of kept counts, so the
cost of any candidate is exact and known without touching the model. One MAC is one multiply-add;
norms, activations and pooling count nothing (the convention of timm and of the papers).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Quantity = Literal["macs", "params", "bytes", "latency"]
QUANTITIES: tuple[Quantity, ...] = ("macs", "params", "bytes", "latency")


@dataclass(frozen=True, slots=True)
class Cost:
    """MACs of one forward pass of one sample, number of parameters, bytes of all parameters and buffers.

    `latency` (seconds) is 0 unless latency terms were measured and added to the graph.
    """

    macs: float
    params: float
    bytes: float
    latency: float = 0.0

    def share_of(self, dense: Cost) -> dict[Quantity, float]:
        """Each quantity as a fraction of `dense`."""
        return {q: getattr(self, q) / (getattr(dense, q) or 1) for q in QUANTITIES}


@dataclass(frozen=True, slots=True)
class Extent:
    """Length of one tensor axis: `constant + sum(coefficient * product of kept counts)`.

    A channel axis is `0 + 1*kept[g]`, a flattened one `0 + 49*kept[g]`, a concatenation a sum of such
    terms, an axis of attention heads and head dimensions `1*kept[heads]*kept[dims]`.
    """

    constant: int = 0
    terms: tuple[tuple[int, tuple[str, ...]], ...] = ()

    def at(self, kept: Mapping[str, float]) -> float:
        total = float(self.constant)
        for coefficient, groups in self.terms:
            product = float(coefficient)
            for group in groups:
                product *= kept[group]
            total += product
        return total


@dataclass(frozen=True, slots=True)
class CostTerm:
    """`coefficient * product of extents` of one quantity, owed to one layer or tensor (`source`)."""

    quantity: Quantity
    source: str
    coefficient: float
    """An integer for what is counted, so that it is exact; seconds for what is measured."""
    extents: tuple[Extent, ...] = ()


class CostModel:
    """The terms, compiled to arrays: evaluates thousands of candidates a second, with exact gradients."""

    def __init__(self, groups: Sequence[str], terms: Sequence[CostTerm]) -> None:
        self.groups = tuple(groups)
        self.terms = tuple(terms)
        column = {name: i for i, name in enumerate(self.groups)}
        one = len(self.groups)  # a count that is always 1 pads short products
        extents: dict[Extent, int] = {Extent(1): 0}
        rows = []
        for term in self.terms:
            rows.append([extents.setdefault(extent, len(extents)) for extent in term.extents])
        width = max((len(row) for row in rows), default=0)
        self._factors = np.array([row + [0] * (width - len(row)) for row in rows], dtype=np.int64).reshape(
            len(rows), width
        )
        self._coefficients = np.array([t.coefficient for t in self.terms], dtype=np.float64)
        self._quantity = np.array([QUANTITIES.index(t.quantity) for t in self.terms], dtype=np.int64)
        self._constants = np.array([extent.constant for extent in extents], dtype=np.float64)
        monomials = [
            (i, coefficient, [column[g] for g in groups])
            for extent, i in extents.items()
            for coefficient, groups in extent.terms
        ]
        degree = max((len(m[2]) for m in monomials), default=0)
        self._monomial_extent = np.array([m[0] for m in monomials], dtype=np.int64)
        self._monomial_coefficient = np.array([m[1] for m in monomials], dtype=np.float64)
        self._monomial_groups = np.array(
            [m[2] + [one] * (degree - len(m[2])) for m in monomials], dtype=np.int64
        ).reshape(len(monomials), degree)

    def counts(self, kept: Mapping[str, float]) -> FloatArray:
        """`kept` as a vector in the order of `groups`."""
        return np.array([kept[name] for name in self.groups], dtype=np.float64)

    def _extents(self, counts: FloatArray) -> FloatArray:
        padded = np.append(counts, 1.0)
        values = self._monomial_coefficient * padded[self._monomial_groups].prod(axis=1)
        extents = self._constants.copy()
        np.add.at(extents, self._monomial_extent, values)
        return extents

    def at(self, counts: FloatArray) -> Cost:
        """Cost at `counts`, shape (groups,); counts may be fractional (expected widths)."""
        values = self._coefficients * self._extents(counts)[self._factors].prod(axis=1)
        totals = np.bincount(self._quantity, weights=values, minlength=len(QUANTITIES))
        return Cost(*(float(v) for v in totals))

    def by_source(self, counts: FloatArray, quantity: Quantity) -> dict[str, float]:
        """One quantity, layer by layer."""
        values = self._coefficients * self._extents(counts)[self._factors].prod(axis=1)
        totals: dict[str, float] = {}
        for term, value in zip(self.terms, values, strict=True):
            if term.quantity == quantity:
                totals[term.source] = totals.get(term.source, 0.0) + float(value)
        return totals

    def gradient(self, counts: FloatArray, quantity: Quantity) -> FloatArray:
        """d quantity / d count, shape (groups,): what one more unit of each group would cost."""
        extents = self._extents(counts)
        padded = np.append(counts, 1.0)
        jacobian = np.zeros((len(extents), len(self.groups) + 1))
        factors = padded[self._monomial_groups]
        for k in range(self._monomial_groups.shape[1]):
            others = np.delete(factors, k, axis=1).prod(axis=1) * self._monomial_coefficient
            np.add.at(jacobian, (self._monomial_extent, self._monomial_groups[:, k]), others)
        chosen = np.flatnonzero(self._quantity == QUANTITIES.index(quantity))
        rows, weights = self._factors[chosen], self._coefficients[chosen]
        values = extents[rows]
        slope = np.zeros(len(extents))
        for k in range(rows.shape[1]):
            np.add.at(slope, rows[:, k], weights * np.delete(values, k, axis=1).prod(axis=1))
        return np.asarray((slope @ jacobian)[: len(self.groups)], dtype=np.float64)
