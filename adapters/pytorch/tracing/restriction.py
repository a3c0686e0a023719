"""What masking does to one operator: zeros where it sums, the living alone where it takes statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunus.adapters.pytorch.tracing.labelling import Contraction
from prunus.adapters.pytorch.tracing.program import Step, call
from prunus.core.cost import IntArray

Number = tuple[str, int | None, int]
"""(argument, position in it, new value) of a literal."""


class Restriction:
    """Restricts tensors to living indices; `living(ids)` says which indices of a label array live."""

    def __init__(self, living: Callable[[IntArray], np.ndarray]) -> None:
        self._living = living
        self._known: dict[int, tuple[IntArray, Tensor | None]] = {}

    def indices(self, ids: IntArray) -> Tensor | None:
        """The living indices, None if all live."""
        if id(ids) not in self._known:
            alive = self._living(ids)
            index = None if alive.all() else torch.from_numpy(np.flatnonzero(alive))
            self._known[id(ids)] = (ids, index)
        return self._known[id(ids)][1]

    def count(self, ids: IntArray) -> int:
        index = self.indices(ids)
        return len(ids) if index is None else len(index)

    def restrict(self, value: Tensor, labels: Any) -> Tensor:
        for axis, ids in enumerate(labels):
            index = None if ids is None else self.indices(ids)
            if index is not None:
                value = value.index_select(axis, index)
        return value

    def scatter(self, value: Tensor, labels: Any, shape: Sequence[int]) -> Tensor:
        """The inverse of `restrict`, with zeros where nothing lives."""
        for axis, ids in enumerate(labels):
            index = None if ids is None else self.indices(ids)
            if index is not None:
                whole = value.new_zeros([*value.shape[:axis], shape[axis], *value.shape[axis + 1 :]])
                value = whole.index_copy(axis, index, value)
        return value

    def zero(self, arguments: dict[str, Any], contraction: Contraction) -> None:
        """Replaces the contracted operand by one that is zero at its dead indices."""
        index = self.indices(contraction.ids)
        if index is None:
            return
        name, position, axis = contraction.argument, contraction.position, contraction.axis
        value = arguments[name] if position is None else arguments[name][position]
        dead = torch.ones(value.shape[axis], dtype=torch.bool)
        dead[index] = False
        zeroed = value.index_fill(axis, torch.nonzero(dead)[:, 0], 0)
        if position is None:
            arguments[name] = zeroed
        else:
            arguments[name] = [zeroed if i == position else x for i, x in enumerate(arguments[name])]

    def call(
        self,
        step: Step,
        arguments: Mapping[str, Any],
        sources: Mapping[str, Any],
        labels: Any,
        numbers: Iterable[Number],
    ) -> Any:
        """The operator on living indices alone, its result put back into place."""
        restricted = {
            name: self.restrict(value, sources[name]) if name in sources else value
            for name, value in arguments.items()
        }
        result = call(step, with_numbers(restricted, numbers))
        if isinstance(result, Tensor):
            return self.scatter(result, labels, step.shape)
        return tuple(self.scatter(r, x, n) for r, x, n in zip(result, labels, step.shapes, strict=True))


def with_numbers(arguments: dict[str, Any], numbers: Iterable[Number]) -> dict[str, Any]:
    """The arguments with literals replaced."""
    changed = dict(arguments)
    for name, position, value in numbers:
        if position is None:
            changed[name] = value
        else:
            changed[name] = [value if i == position else x for i, x in enumerate(changed[name])]
    return changed
