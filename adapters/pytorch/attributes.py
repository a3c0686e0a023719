"""Python attributes that a forward pass relies on, as data: which attribute goes from what to what.

The edits belong to the plan, so that replaying one on a fresh model needs no tracing.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from prunus.core.errors import PlanError
from prunus.core.plan import AttributeEdit


def apply_edits(model: nn.Module, edits: Iterable[AttributeEdit]) -> None:
    """Applies `edits` to `model` in place.

    Raises PlanError, before anything is changed, if a module or attribute is missing or its value is
    neither the old nor the new one (shared modules may be reached twice).
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    todo = []
    for edit in edits:
        module = modules.get(edit.module)
        where = f"{edit.module or 'the model'}.{edit.attribute}"
        if module is None or not hasattr(module, edit.attribute):
            raise PlanError(f"{where} does not exist: the plan is of another model")
        value = getattr(module, edit.attribute)
        if frozen(value) not in (edit.old, edit.new):
            raise PlanError(f"{where} is {value!r}, the plan expects {edit.old!r}")
        todo.append((module, edit, isinstance(value, list)))
    for module, edit, is_list in todo:
        setattr(module, edit.attribute, _thawed(edit.new) if is_list else edit.new)


def frozen(value: object) -> object:
    """`value` with lists as tuples, at every depth."""
    if isinstance(value, (list, tuple)):
        return tuple(frozen(item) for item in value)
    return value


def _thawed(value: object) -> object:
    if isinstance(value, tuple):
        return [_thawed(item) for item in value]
    return value
