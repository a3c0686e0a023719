"""Sizes as polynomials: evaluation, and solving code's arithmetic for an attribute."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunus.adapters.pytorch.size_algebra import (
    OPERATORS,
    Attribute,
    Operation,
    Polynomial,
    evaluate,
    solve,
)
from prunus.core.cost import Extent

HEADS, DIM = Attribute("attn", "num_heads"), Attribute("attn", "dim")
H = Polynomial.from_extent(Extent(0, ((1, ("h",)),)))
D = Polynomial.from_extent(Extent(0, ((1, ("d",)),)))
COUNTS = st.fixed_dictionaries({"h": st.integers(1, 50), "d": st.integers(1, 50)})


def _polynomials() -> st.SearchStrategy[Polynomial]:
    monomials = st.sampled_from([(), ("h",), ("d",), ("d", "h"), ("h", "h")])
    return st.dictionaries(monomials, st.integers(-5, 5).map(Fraction), max_size=4).map(Polynomial.of)


@given(_polynomials(), _polynomials(), COUNTS)
def test_arithmetic_on_polynomials_is_arithmetic_on_their_values(a: Polynomial, b: Polynomial, at: dict) -> None:
    assert (a + b).at(at) == a.at(at) + b.at(at)
    assert (a - b).at(at) == a.at(at) - b.at(at)
    assert (a * b).at(at) == a.at(at) * b.at(at)


@given(_polynomials(), st.sampled_from([H, D, H * D, Polynomial.constant(3)]))
def test_division_undoes_multiplication(a: Polynomial, b: Polynomial) -> None:
    assert (a * b).divided_by(b) == a


def test_division_without_a_quotient_says_so() -> None:
    assert H.divided_by(D) is None
    assert H.divided_by(H + D) is None


def test_an_extent_and_its_polynomial_agree() -> None:
    extent = Extent(7, ((2, ("h",)), (3, ("d", "h"))))
    at = {"h": 4, "d": 5}
    assert Polynomial.from_extent(extent).at(at) == extent.at(at)


@pytest.mark.parametrize("symbol", list(OPERATORS))
@pytest.mark.parametrize("attribute_first", [True, False])
def test_solving_finds_the_attribute_that_makes_the_equation_true(symbol: str, attribute_first: bool) -> None:
    sides = (DIM, HEADS) if attribute_first else (HEADS, DIM)
    expression = Operation(symbol, *sides)
    wanted = H * D * D if attribute_first else D
    known = {HEADS: H * D}
    target = evaluate(expression, {**known, DIM: wanted})
    if target is None:  # no polynomial: nothing to solve for
        assert symbol == "//"
        return
    assert solve(expression, target, known) == (DIM, wanted)


def test_two_unknowns_are_not_guessed() -> None:
    assert solve(Operation("*", HEADS, DIM), H * D, {}) is None


def test_nested_arithmetic_is_undone_step_by_step() -> None:
    expression = Operation("-", Operation("*", 3, DIM), HEADS)  # 3 * self.dim - self.num_heads
    assert solve(expression, H * Polynomial.constant(3) - D, {HEADS: D}) == (DIM, H)
