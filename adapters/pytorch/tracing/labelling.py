"""Labels every axis of every value of a program with alive variables, rule by rule.

A label is, per axis, None (nothing on it can be removed) or the variables of its indices. The one law
that every rule keeps: running the operator on restricted operands gives the restricted result, in index
order, where contractions see removed terms as zero and statistics see only what is left.

Besides labels, the rules note what the later stages need: literals that depend on labelled axes,
contracted operands (zeroed by the oracle), statistics, roles of weights, multiply-adds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prunus.adapters.pytorch.tracing.program import Program, Step, steps_in
from prunus.adapters.pytorch.tracing.variables import TRUE, Variables
from prunus.core.cost import IntArray
from prunus.core.graph import Role

Label = IntArray | None
Labels = list[Label]
Rule = Callable[["Labelling", Step], Any]
RULES: dict[str, Rule] = {}


def rule(*operators: str) -> Callable[[Rule], Rule]:
    """Registers a function as the rule of operators, named as in `Step.op`."""

    def register(function: Rule) -> Rule:
        for name in operators:
            RULES[name] = function
        return function

    return register


def operators(names: str) -> tuple[str, ...]:
    """ "relu gelu" -> ("aten.relu", "aten.gelu")."""
    return tuple(f"aten.{name}" for name in names.split())


@dataclass(frozen=True, eq=False)
class Literal:
    """A number in the program that follows an axis: `arguments[argument][position]` of `step`."""

    step: Step
    argument: str
    position: int | None
    value: int
    ids: IntArray


@dataclass(frozen=True, eq=False)
class Contraction:
    """`arguments[argument]` of `step` (item `position` of a list) must be zero at the dead indices of `axis`."""

    step: Step
    argument: str
    axis: int
    ids: IntArray
    position: int | None = None


@dataclass(frozen=True, eq=False)
class Multiplications:
    """`coefficient * product of axis lengths` multiply-adds of one step."""

    step: Step
    coefficient: int
    axes: tuple[IntArray, ...]


@dataclass(frozen=True, eq=False)
class RoleMark:
    """The weight that `step` computes has `role`, for the units of `ids`, on its `axis`."""

    step: Step
    axis: int
    ids: IntArray
    role: Role


class Labelling:
    """The labels of one or more programs of one model; programs share the labels of its tensors."""

    def __init__(self) -> None:
        self.variables = Variables()
        self.tensors: dict[str, Labels] = {}
        """Labels of parameters and float buffers, in the order of their first use."""
        self.literals: list[Literal] = []
        self.contractions: list[Contraction] = []
        self.statistics: set[Step] = set()
        self.statistic_ids: list[IntArray] = []
        self.ungateable_ids: list[IntArray] = []
        self.multiplications: list[Multiplications] = []
        self.roles: list[RoleMark] = []
        self.unknown: dict[str, str] = {}
        """Operators without a rule -> where they were met first."""
        self._labels: dict[Step, Any] = {}
        self._weights: dict[Step, bool] = {}

    def run(self, program: Program, labelled: Callable[[str], bool]) -> dict[Step, Any]:
        """Label `program`; only tensors for which `labelled(name)` holds may shrink. Returns step -> labels."""
        self._labels, self._weights = {}, {}
        for step in program.steps:
            self.add(step, labelled)
        for output in steps_in(program.outputs):
            for ids in _arrays(self._labels.get(output)):
                self.variables.lock(ids, "model output")
        return self._labels

    def add(self, step: Step, labelled: Callable[[str], bool]) -> None:
        """Label one more step; those it reads were added before."""
        self._weights[step] = step.op != "input" and all(self._weights[x] for x in step.inputs())
        if step.op in ("tensor", "input", "constant"):
            return
        for source in step.inputs():
            if source not in self._labels:
                self._labels[source] = self._source(source, labelled)
        self._labels[step] = self._apply(step)

    def add_with_sources(self, step: Step) -> None:
        """Label a step whose tensors all have labels already (`tensors`), or cannot shrink."""
        for source in step.inputs():
            if source not in self._weights:
                self.add(source, self.tensors.__contains__)
        self.add(step, self.tensors.__contains__)

    def _source(self, step: Step, labelled: Callable[[str], bool]) -> Labels:
        if step.op != "tensor" or not labelled(step.name):
            return _free(step.shapes)
        if step.name not in self.tensors:
            self.tensors[step.name] = [self.variables.fresh(n) if n > 1 else None for n in step.shape]
        return self.tensors[step.name]

    def _apply(self, step: Step) -> Any:
        function = RULES.get(step.op)
        if function is not None:
            return function(self, step)
        if any(True for source in step.inputs() for _ in _arrays(self.of(source))):
            self.unknown.setdefault(step.op, step.where())
            self.lock_inputs(step, f"unknown operator {step.op} in {step.where()}")
        return _free(step.shapes)

    def of(self, step: Any) -> Any:
        """The labels of a step's result."""
        return self._labels[step]

    def free(self, step: Step) -> Any:
        """Labels of a result that cannot shrink."""
        return _free(step.shapes)

    def lock(self, ids: Label, reason: str) -> None:
        if ids is not None:
            self.variables.lock(ids, reason)

    def lock_inputs(self, step: Step, reason: str) -> None:
        for source in step.inputs():
            for ids in _arrays(self.of(source)):
                self.variables.lock(ids, reason)

    def same(self, step: Step, a: Label, b: Label) -> Label:
        """Two axes that must shrink alike; returns the label of both."""
        if a is None or b is None:
            other = b if a is None else a
            tied = (
                f"tied by {short(step)} in {step.where()} to an axis that cannot shrink (positions, fixed sizes)"
            )
            self.lock(other, tied)
            return None
        self.variables.unify(a, b, f"its channels are mixed by {short(step)} in {step.where()}")
        return a

    def fresh(self, n: int) -> Label:
        return self.variables.fresh(n) if n > 1 else None

    def contract(self, step: Step, argument: str, axis: int, ids: Label, position: int | None = None) -> None:
        if ids is not None:
            self.contractions.append(Contraction(step, argument, axis, ids, position))

    def statistic(self, step: Step, *labels: Label) -> None:
        """The step's result depends on how many of these indices are left."""
        for ids in labels:
            if ids is not None:
                self.statistics.add(step)
                self.statistic_ids.append(ids)

    def ungateable(self, *labels: Label) -> None:
        """These indices are read without a weight that a gate could scale."""
        self.ungateable_ids.extend(ids for ids in labels if ids is not None)

    def literal(self, step: Step, argument: str, position: int | None, value: int, ids: Label) -> None:
        if ids is not None:
            self.literals.append(Literal(step, argument, position, value, ids))

    def macs(self, step: Step, coefficient: int, labels: Iterable[Label]) -> None:
        """`coefficient` holds everything that cannot shrink, `labels` the axes that may."""
        self.multiplications.append(Multiplications(step, coefficient, tuple(x for x in labels if x is not None)))

    def role(self, weight: Step, axis: int, ids: Label, role: Role) -> None:
        if ids is not None:
            self.roles.append(RoleMark(weight, axis, ids, role))

    def is_weight(self, step: Step) -> bool:
        """Whether a value is computed from parameters and constants alone."""
        return self._weights[step]


def short(step: Step) -> str:
    return step.op.removeprefix("aten.")


def extent_of(shape: Sequence[int], labels: Labels) -> tuple[int, list[Label]]:
    """The fixed and the labelled part of a shape: their product is the number of elements."""
    fixed = 1
    for size, ids in zip(shape, labels, strict=True):
        fixed *= size if ids is None else 1
    return fixed, [ids for ids in labels if ids is not None]


def ids_or_true(label: Label, n: int) -> IntArray:
    return np.full(n, TRUE, dtype=np.int64) if label is None else label


def tidy(label: IntArray) -> Label:
    """None instead of an array of TRUE."""
    return label if (label != TRUE).any() else None


def _free(shapes: Any) -> Any:
    if isinstance(shapes, tuple):
        return [None] * len(shapes)
    if isinstance(shapes, list):
        return [_free(s) for s in shapes]
    return None


def _arrays(labels: Any) -> Iterable[IntArray]:
    """All label arrays in the labels of one result, or of a list of results."""
    if isinstance(labels, np.ndarray):
        yield labels
    elif isinstance(labels, list):
        for item in labels:
            yield from _arrays(item)
