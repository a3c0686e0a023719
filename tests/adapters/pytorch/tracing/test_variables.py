"""Union-find with conjunctions against brute force: every asserted equality holds for every alive set."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunus.adapters.pytorch.tracing.variables import TRUE, Variables


def alive(variables: Variables, ids: np.ndarray, dead: set[int]) -> list[bool]:
    return [not (set(row.tolist()) & dead) for row in variables.leaves(ids)]


def free_leaves(variables: Variables, ids: np.ndarray) -> list[int]:
    locked = variables.locked()
    return sorted(set(np.unique(variables.leaves(ids)).tolist()) - {TRUE} - set(locked))


@st.composite
def stories(draw: st.DrawFn) -> tuple[int, list[tuple[str, list[int], list[int]]], int]:
    """A number of leaves, a list of conjunctions and equalities between earlier variables, and a seed."""
    n = draw(st.integers(2, 6))
    known, steps = n, []
    for _ in range(draw(st.integers(1, 7))):
        length = draw(st.integers(1, 3))
        pick = st.lists(st.integers(0, known - 1), min_size=length, max_size=length)
        kind = draw(st.sampled_from(["both", "unify", "unify", "lock"]))
        steps.append((kind, draw(pick), draw(pick)))
        known += length if kind == "both" else 0
    return n, steps, draw(st.integers(0, 99))


@settings(max_examples=400, deadline=None)
@given(stories())
def test_unified_variables_live_and_die_together_for_every_choice_of_dead_leaves(story):
    n, steps, seed = story
    variables = Variables()
    known = list(variables.fresh(n))
    equalities, conjunctions = [], []
    for kind, left, right in steps:
        a = np.array([known[i] for i in left])
        b = np.array([known[i] for i in right])
        if kind == "both":
            joint = variables.both(a, b)
            conjunctions += zip(a, b, joint, strict=True)
            known += joint.tolist()
        elif kind == "unify":
            variables.unify(a, b, "unified")
            equalities += zip(a, b, strict=True)
        else:
            variables.lock(a, "locked")
    everything = np.array(known)
    leaves = free_leaves(variables, everything)
    rng = np.random.default_rng(seed)
    for _ in range(12):
        dead = {leaf for leaf in leaves if rng.random() < 0.4}
        state = dict(zip(known, alive(variables, everything, dead), strict=True))
        state[TRUE] = True
        assert all(state[a] == state[b] for a, b in equalities)
        for a, b, joint in conjunctions:
            whole = alive(variables, np.array([a, b, joint]), dead)
            assert whole[2] == (whole[0] and whole[1])


def test_a_locked_variable_keeps_the_first_reason_it_was_given():
    variables = Variables()
    ids = variables.fresh(2)
    variables.lock(ids[:1], "softmax")
    variables.lock(ids, "output")
    assert variables.locked() == {int(ids[0]): "softmax", int(ids[1]): "output"}


def test_tying_to_something_immortal_locks():
    variables = Variables()
    ids = variables.fresh(3)
    variables.unify(ids, np.full(3, TRUE), "tied to the input")
    assert set(variables.locked().values()) == {"tied to the input"}


def test_a_conjunction_with_itself_or_with_true_is_no_new_variable():
    variables = Variables()
    ids = variables.fresh(2)
    assert variables.both(ids, ids).tolist() == ids.tolist()
    assert variables.both(ids, np.array([TRUE, TRUE])).tolist() == ids.tolist()


def test_binding_keeps_swapped_pairs_free_of_cycles():
    variables = Variables()
    a, b = (int(v) for v in variables.fresh(2))
    variables.unify(np.array([a, b]), np.array([b, a]), "swapped")
    assert len(set(variables.roots(np.array([a, b])).tolist())) == 1


@pytest.mark.parametrize("heads, dims", [(2, 3), (4, 4)])
def test_leaves_list_heads_before_dimensions(heads, dims):
    variables = Variables()
    h, d = variables.fresh(heads), variables.fresh(dims)
    joint = variables.both(np.repeat(h, dims), np.tile(d, heads))
    leaves = variables.leaves(joint)
    assert leaves[:, 0].tolist() == np.repeat(h, dims).tolist()
    assert leaves[:, 1].tolist() == np.tile(d, heads).tolist()


def test_families_join_when_their_variables_do():
    variables = Variables()
    a, b, c = variables.fresh(3), variables.fresh(3), variables.fresh(3)
    variables.unify(a, b, "added")
    family = variables.family(variables.roots(np.concatenate([a, b, c])))
    assert len(set(family[:6].tolist())) == 1
    assert family[6] not in family[:6]
