"""Python attributes follow the tensors.

Many forward passes take sizes from attributes (`self.num_heads`, `self.split_sizes`). The trace knows how
every literal of the pass depends on the kept counts, `attribute_uses` knows which attribute it came from;
together they say what each attribute must become for any plan. The result is data: edits that belong to
the plan, so that replaying one on a fresh model needs no tracing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from prunus.adapters.pytorch.attribute_uses import Use, record_uses
from prunus.adapters.pytorch.size_algebra import (
    Attribute,
    Expression,
    Operation,
    Polynomial,
    attributes_in,
    solve,
)
from prunus.adapters.pytorch.tracing import LiteralSite, Trace
from prunus.adapters.pytorch.tracing.program import Step
from prunus.core.errors import PlanError
from prunus.core.plan import AttributeEdit

Equation = tuple[Expression, Polynomial]
"""What code computed, and what that must become."""


@dataclass(frozen=True, slots=True)
class Conflict:
    """One attribute that would have to become several numbers at once."""

    attribute: Attribute
    wanted: tuple[Polynomial, ...]


@dataclass(frozen=True, slots=True)
class Bindings:
    """What every attribute must be, as a function of the kept counts."""

    values: Mapping[tuple[str, str], Polynomial | tuple[int | Polynomial, ...]]
    """(module, attribute) -> its value; only attributes that depend on a count."""
    conflicts: tuple[Conflict, ...] = ()

    def edits(self, before: Mapping[str, int], after: Mapping[str, int]) -> list[AttributeEdit]:
        """The edits that take a model from the kept counts `before` to `after`."""
        found = []
        for (module, name), value in self.values.items():
            old, new = _at(value, before), _at(value, after)
            if old != new:
                found.append(AttributeEdit(module=module, attribute=name, old=old, new=new))
        return found


def bind_attributes(
    model: nn.Module, trace: Trace, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None
) -> Bindings:
    """How the attributes of `model` depend on kept counts; `args` as they were traced."""
    modules, first = dict(model.named_modules()), _first_paths(model)
    uses = record_uses(model, args, kwargs or {}, fake=not trace.program.concrete)
    equations = list(_equations(uses, trace, first))
    equations.extend(_named_arguments(modules, trace.sites, first))
    equations.extend(_announced_widths(model, trace))
    solution, conflicts = _solved(equations, modules)
    values: dict[tuple[str, str], Any] = {}
    for attribute, value in solution.items():
        if not value.groups:
            continue
        key = (attribute.module, attribute.name)
        if attribute.item is None:
            values[key] = value
        else:
            held = getattr(modules[attribute.module], attribute.name)
            items = list(values.get(key, held))
            items[attribute.item] = value
            values[key] = tuple(items)
    return Bindings(values, tuple(conflicts))


def _first_paths(model: nn.Module) -> dict[str, str]:
    """Every path of every module -> the first path of that module: a shared module has several."""
    first: dict[int, str] = {}
    return {
        path: first.setdefault(id(module), path) for path, module in model.named_modules(remove_duplicate=False)
    }


def _equations(uses: Sequence[Use], trace: Trace, first: Mapping[str, str]) -> Iterable[Equation]:
    """Pairs each use with the step of the traced program that it became."""
    literals: dict[str, list[_Literal]] = {}
    for literal in _literals(trace):
        literals.setdefault(first.get(literal.step.owner, literal.step.owner), []).append(literal)
    for (owner, values), group in _grouped(uses).items():
        for use, row in _paired(group, values, literals.get(owner, [])):
            for expression, target in zip(use.expressions, row, strict=True):
                if attributes_in(expression) and target is not None:
                    yield expression, target


def _paired(
    uses: Sequence[Use], values: tuple[int, ...], literals: Sequence[_Literal]
) -> Iterable[tuple[Use, Sequence[Polynomial | None]]]:
    """Uses with equal values in one module, each with what its values must become."""
    rows: list[Sequence[Polynomial | None]] = [x.targets for x in literals if x.values == values]
    if len(rows) == len(uses):  # called in the order in which they were captured
        return zip(uses, rows, strict=True)
    if not rows:  # unflatten(1, (4, 6)) is captured as a view of the whole shape
        rows = [row for x in literals if (row := _within(values, x)) is not None]
    if rows and all(row == rows[0] for row in rows):
        return [(use, rows[0]) for use in uses]
    if rows:
        return []
    return [(use, [_single(use, value, literals) for value in values]) for use in uses]


def _single(use: Use, value: int, literals: Sequence[_Literal]) -> Polynomial | None:
    """A number that stands alone: split(x, width, 1) passes a size and an axis."""
    wanted = _CAPTURED_AS.get(use.function, use.function)
    found = [
        x.targets[0]
        for x in literals
        if x.values == (value,) and wanted in x.step.op and x.argument not in _AXIS_ARGUMENTS
    ]
    return found[0] if found and all(target == found[0] for target in found) else None


_CAPTURED_AS = {"__getitem__": "slice", "chunk": "split"}
_AXIS_ARGUMENTS = ("dim", "dim0", "dim1", "start_dim", "end_dim", "step")


def _grouped(uses: Sequence[Use]) -> dict[tuple[str, tuple[int, ...]], list[Use]]:
    groups: dict[tuple[str, tuple[int, ...]], list[Use]] = {}
    for use in uses:
        groups.setdefault((use.owner, use.values), []).append(use)
    return groups


@dataclass(frozen=True, slots=True)
class _Literal:
    """One argument of one step, with what each of its numbers must become."""

    step: Step
    argument: str
    values: tuple[int, ...]
    targets: tuple[Polynomial, ...]


def _literals(trace: Trace) -> Iterable[_Literal]:
    moving = {
        (site.step, site.argument, site.position): Polynomial.from_extent(site.extent) for site in trace.sites
    }
    for step in trace.program.steps:
        for argument, value in step.arguments.items():
            several = isinstance(value, list | tuple)
            values = tuple(value) if several else (value,)
            if values and all(type(item) is int for item in values):
                keys = ((step.index, argument, i if several else None) for i in range(len(values)))
                targets = (
                    moving[key] if key in moving else Polynomial.constant(v)
                    for key, v in zip(keys, values, strict=True)
                )
                yield _Literal(step, argument, values, tuple(targets))


def _within(values: tuple[int, ...], literal: _Literal) -> Sequence[Polynomial] | None:
    """The part of a longer literal that holds `values` in order."""
    for start in range(len(literal.values) - len(values) + 1):
        if len(values) > 1 and literal.values[start : start + len(values)] == values:
            return literal.targets[start : start + len(values)]
    return None


def _named_arguments(
    modules: Mapping[str, nn.Module], sites: Sequence[LiteralSite], first: Mapping[str, str]
) -> Iterable[Equation]:
    """Layers hold what they pass on under the operator's own name: groups, normalized_shape, num_groups."""
    for site in sites:
        owner = first.get(site.owner, site.owner)
        held = getattr(modules.get(owner), site.argument, None)
        target = Polynomial.from_extent(site.extent)
        if site.position is None and type(held) is int and held == site.value:
            yield Attribute(owner, site.argument), target
        elif site.position is not None and isinstance(held, list | tuple) and len(held) > site.position:
            yield Attribute(owner, site.argument, site.position), target


def _announced_widths(model: Any, trace: Trace) -> Iterable[Equation]:
    """timm's models say how wide their features are; whoever replaces the classifier relies on it."""
    head = model.get_classifier() if hasattr(model, "get_classifier") else None
    if not isinstance(head, nn.Linear):
        return
    name = next((n for n, p in model.named_parameters() if p is head.weight), None)
    labels = next((trace.labels[step] for step in trace.labels if step.op == "tensor" and step.name == name), None)
    if labels is None or labels[1] is None:
        return
    width = Polynomial.from_extent(trace.grouping.extent(labels[1]))
    for attribute in ("num_features", "head_hidden_size"):
        if vars(model).get(attribute) == head.in_features:
            yield Attribute("", attribute), width


def _divisor(expression: Expression, known: Mapping[Attribute, Polynomial]) -> Attribute | None:
    """An unknown attribute that something is divided by."""
    if not isinstance(expression, Operation):
        return None
    if expression.symbol == "//" and isinstance(expression.right, Attribute) and expression.right not in known:
        return expression.right
    return _divisor(expression.left, known) or _divisor(expression.right, known)


def _solved(
    equations: Sequence[Equation], modules: Mapping[str, nn.Module]
) -> tuple[dict[Attribute, Polynomial], list[Conflict]]:
    wanted: dict[Attribute, list[Polynomial]] = {}
    for expression, target in equations:
        if isinstance(expression, Attribute):
            seen = wanted.setdefault(expression, [])
            if target not in seen:
                seen.append(target)
    solution = {attribute: targets[0] for attribute, targets in wanted.items()}
    pending = [e for e in equations if not isinstance(e[0], Attribute)]
    while pending:
        solved = [solve(expression, target, solution) for expression, target in pending]
        fresh = [answer for answer in solved if answer is not None]
        if not fresh:
            divisor = next((d for e, _ in pending if (d := _divisor(e, solution)) is not None), None)
            if divisor is None:
                break
            # self.in_channels // self.num_paths, both unknown: the width moves, the number of parts stays
            held = getattr(modules[divisor.module], divisor.name)
            value = held if divisor.item is None else held[divisor.item]
            solution[divisor] = Polynomial.constant(value)
            continue
        for (
            attribute,
            wanted_value,
        ) in fresh:  # the same code may hold runtime sizes: good to fill in, not to contradict
            solution.setdefault(attribute, wanted_value)
        pending = [e for e, answer in zip(pending, solved, strict=True) if answer is None]
    conflicts = [Conflict(a, tuple(targets)) for a, targets in wanted.items() if len(targets) > 1]
    return solution, conflicts


def apply_edits(model: nn.Module, edits: Iterable[AttributeEdit]) -> None:
    """Applies `edits` to `model` in place.

    Raises PlanError, before anything is changed, if a module or attribute is missing or its value is
    neither the old nor the new one (layers that repeat their tensors' sizes have followed already).
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    todo = []
    for edit in edits:
        module = modules.get(edit.module)
        where = f"{edit.module or 'the model'}.{edit.attribute}"
        if module is None or not hasattr(module, edit.attribute):
            raise PlanError(f"{where} does not exist: the plan is of another model")
        value = getattr(module, edit.attribute)
        if _frozen(value) not in (edit.old, edit.new):
            raise PlanError(f"{where} is {value!r}, the plan expects {edit.old!r}")
        todo.append((module, edit, isinstance(value, list)))
    for module, edit, is_list in todo:
        setattr(module, edit.attribute, _thawed(edit.new) if is_list else edit.new)


def _at(value: Polynomial | tuple[int | Polynomial, ...], counts: Mapping[str, int]) -> Any:
    if isinstance(value, Polynomial):
        return value.at(counts)
    return tuple(item.at(counts) if isinstance(item, Polynomial) else item for item in value)


def _frozen(value: object) -> object:
    if isinstance(value, list | tuple):
        return tuple(_frozen(item) for item in value)
    return value


def _thawed(value: object) -> object:
    if isinstance(value, tuple):
        return [_thawed(item) for item in value]
    return value
