"""Polynomials of kept counts, and the arithmetic that Python code does on sizes.

A literal in the forward pass must become a known polynomial of the kept counts (an `Extent`); the code
computed it from attributes (`3 * self.dim`, `self.dim // 2`). Solving one for the other says what each
attribute has to become.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction

from prunus.core.cost import Extent

Monomial = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Polynomial:
    """sum(coefficient * product of kept counts); the empty product is the constant term."""

    terms: tuple[tuple[Monomial, Fraction], ...]

    @classmethod
    def of(cls, terms: Mapping[Monomial, Fraction]) -> Polynomial:
        return cls(tuple(sorted((m, c) for m, c in terms.items() if c)))

    @classmethod
    def constant(cls, value: int) -> Polynomial:
        return cls.of({(): Fraction(value)})

    @classmethod
    def from_extent(cls, extent: Extent) -> Polynomial:
        terms: dict[Monomial, Fraction] = {(): Fraction(extent.constant)}
        for coefficient, groups in extent.terms:
            key = tuple(sorted(groups))
            terms[key] = terms.get(key, Fraction(0)) + coefficient
        return cls.of(terms)

    @property
    def groups(self) -> frozenset[str]:
        return frozenset(group for monomial, _ in self.terms for group in monomial)

    def at(self, counts: Mapping[str, int]) -> int:
        """The value at these counts, rounded down where a division leaves a rest (as `//` does)."""
        total = Fraction(0)
        for monomial, coefficient in self.terms:
            product = coefficient
            for group in monomial:
                product *= counts[group]
            total += product
        return total.__floor__()

    def __add__(self, other: Polynomial) -> Polynomial:
        terms = dict(self.terms)
        for monomial, coefficient in other.terms:
            terms[monomial] = terms.get(monomial, Fraction(0)) + coefficient
        return Polynomial.of(terms)

    def __mul__(self, other: Polynomial) -> Polynomial:
        terms: dict[Monomial, Fraction] = {}
        for a, x in self.terms:
            for b, y in other.terms:
                key = tuple(sorted((*a, *b)))
                terms[key] = terms.get(key, Fraction(0)) + x * y
        return Polynomial.of(terms)

    def __sub__(self, other: Polynomial) -> Polynomial:
        return self + other * Polynomial.constant(-1)

    def divided_by(self, other: Polynomial) -> Polynomial | None:
        """The quotient where `other` is a single product that divides every term, else None."""
        if len(other.terms) != 1:
            return None
        ((divisor, scale),) = other.terms
        terms: dict[Monomial, Fraction] = {}
        for monomial, coefficient in self.terms:
            rest = list(monomial)
            for group in divisor:
                if group not in rest:
                    return None
                rest.remove(group)
            terms[tuple(rest)] = coefficient / scale
        return Polynomial.of(terms)


@dataclass(frozen=True, slots=True)
class Attribute:
    """A number held by a module: its attribute, or one item of a tuple or list attribute."""

    module: str
    name: str
    item: int | None = None


@dataclass(frozen=True, slots=True)
class Operation:
    """`left symbol right`, as the code computed it."""

    symbol: str
    left: Expression
    right: Expression


Expression = int | Attribute | Operation
Solution = Mapping[Attribute, Polynomial]

OPERATORS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
}


def attributes_in(expression: Expression) -> frozenset[Attribute]:
    if isinstance(expression, Attribute):
        return frozenset({expression})
    if isinstance(expression, Operation):
        return attributes_in(expression.left) | attributes_in(expression.right)
    return frozenset()


def evaluate(expression: Expression, known: Solution) -> Polynomial | None:
    """The expression as a polynomial; None where an attribute is not known or a division leaves no polynomial."""
    if isinstance(expression, int):
        return Polynomial.constant(expression)
    if isinstance(expression, Attribute):
        return known.get(expression)
    left, right = evaluate(expression.left, known), evaluate(expression.right, known)
    if left is None or right is None:
        return None
    if expression.symbol == "//":
        return left.divided_by(right)
    return {"+": left.__add__, "-": left.__sub__, "*": left.__mul__}[expression.symbol](right)


def solve(expression: Expression, target: Polynomial, known: Solution) -> tuple[Attribute, Polynomial] | None:
    """What the one unknown attribute of `expression` must be for it to equal `target`; None if unclear."""
    if isinstance(expression, Attribute):
        return None if expression in known else (expression, target)
    if isinstance(expression, int):
        return None
    if expression.symbol == "//" and isinstance(expression.left, int):
        return None  # C // self.num_heads: the number divided is a size read at run time
    left, right = evaluate(expression.left, known), evaluate(expression.right, known)
    if (left is None) == (right is None):
        return None
    if right is not None:
        wanted = {
            "+": lambda: target - right,
            "-": lambda: target + right,
            "*": lambda: target.divided_by(right),
            "//": lambda: target * right,
        }[expression.symbol]()
        return None if wanted is None else solve(expression.left, wanted, known)
    assert left is not None
    wanted = {
        "+": lambda: target - left,
        "-": lambda: left - target,
        "*": lambda: target.divided_by(left),
        "//": lambda: left.divided_by(target),
    }[expression.symbol]()
    return None if wanted is None else solve(expression.right, wanted, known)
