"""Decisions that a forward pass takes by value, and their replay.

Detection models sort, threshold and suppress. Two computations that agree to the last few bits may order equal
scores either way, and everything after that differs, though nothing is wrong. So the decisions of one pass are
recorded together with the values they were taken on, and another pass follows them: compared is what it would
have decided on, and all that it computes given the same decisions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunus.adapters.pytorch.tracing.capture import as_found
from prunus.adapters.pytorch.tracing.program import Step
from prunus.adapters.pytorch.tracing.recorder import Recorder
from prunus.core.errors import TraceError

ROUNDINGS = frozenset({"aten.ceil", "aten.floor", "aten.round", "aten.trunc", "aten.fix", "aten.floor_divide"})
"""Real in type, but steps in value."""


@dataclass(frozen=True, slots=True)
class Decision:
    """One operator that turned real numbers into indices, truth values or Python numbers."""

    place: tuple[str, str]
    """(path of the module that ran it, operator)"""
    grounds: tuple[Tensor, ...]
    """The real tensors it was taken on."""
    results: tuple[Any, ...]
    """Everything the operator returned."""


def decision(step: Step, arguments: Mapping[str, Any], result: Any) -> Decision | None:
    """What the operator of `step` decided; None for one whose result is as real as its operands."""
    grounds = tuple(x for value in arguments.values() for x in _tensors(value) if x.is_floating_point())
    results = tuple(result) if isinstance(result, list | tuple) else (result,)
    if not grounds or not (step.op in ROUNDINGS or any(_discrete(x) for x in results)):
        return None
    return Decision(
        (step.owner, step.op), tuple(x.detach().clone() for x in grounds), tuple(_copied(x) for x in results)
    )


Pair = tuple[Decision, Decision]
"""One decision as two passes took it."""


def following(model: nn.Module, taken: Sequence[Decision], args: tuple[Any, ...]) -> tuple[Any, list[Pair]]:
    """(outputs, pairs of own and given decisions) of `model` in eval mode, made to go the way of `taken`.

    A decision about an axis that has another length here stays the model's own, and so does what only one
    of the passes decides because the other has remembered the outcome from before (anchors, scales). Raises
    TraceError where a module comes to another number of decisions than it should.
    """
    with as_found(model, training=False), torch.no_grad():
        recorder = _Following(model, taken)
        with recorder.watching():
            outputs = model(*args)
    recorder.check()
    return outputs, recorder.pairs


def grounds(pairs: Sequence[Pair]) -> tuple[list[Tensor], list[Tensor]]:
    """What both passes took their decisions on; without the tensors that differ in shape."""
    found = [
        (a, b)
        for mine, theirs in pairs
        for a, b in zip(mine.grounds, theirs.grounds, strict=True)
        if a.shape == b.shape
    ]
    return [a for a, _ in found], [b for _, b in found]


class _Following(Recorder):
    """Replaces what each operator decides."""

    def __init__(self, model: nn.Module, taken: Sequence[Decision]) -> None:
        super().__init__(model)
        self.pairs: list[Pair] = []
        self._given: dict[tuple[str, str], deque[Decision]] = {}
        for one in taken:
            self._given.setdefault(one.place, deque()).append(one)
        self._begun: set[tuple[str, str]] = set()

    def _completed(self, step: Step, arguments: dict[str, Any], result: Any) -> Any:
        mine = decision(step, arguments, result)
        if mine is None or mine.place not in self._given:
            return result
        self._begun.add(mine.place)
        if not self._given[mine.place]:
            raise TraceError(f"{step.op} in {step.where()} decides by value more often than in the whole model")
        theirs = self._given[mine.place].popleft()
        self.pairs.append((mine, theirs))
        if any(a.shape != b.shape for a, b in zip(mine.grounds, theirs.grounds, strict=True)):
            return result
        return _replaced(step, arguments, result, theirs)

    def check(self) -> None:
        """Raises where a module stopped deciding too soon."""
        for owner, op in self._begun:
            if self._given[owner, op]:
                raise TraceError(
                    f"{op} in {owner or 'the model'} decides by value less often than in the whole model"
                )


def _replaced(step: Step, arguments: Mapping[str, Any], result: Any, taken: Decision) -> Any:
    several = isinstance(result, list | tuple)
    own = list(result) if several else [result]
    order = next((x for x in taken.results[1:] if isinstance(x, Tensor) and x.dtype == torch.int64), None)
    for place, theirs in enumerate(taken.results):
        if _discrete(theirs) or step.op in ROUNDINGS:
            own[place] = own[place].copy_(theirs) if _mutates(step) else _copied(theirs)
        elif order is not None and isinstance(arguments.get("dim"), int):
            own[place] = _picked(arguments, order)
    return type(result)(own) if several else own[0]


def _picked(arguments: Mapping[str, Any], order: Tensor) -> Tensor:
    """The values that belong to the indices of a sort, top-k or maximum."""
    values, dim = next(x for x in arguments.values() if isinstance(x, Tensor)), arguments["dim"]
    if order.dim() == values.dim():
        return values.gather(dim, order)
    return values.gather(dim, order.unsqueeze(dim)).squeeze(dim)


def _mutates(step: Step) -> bool:
    schema = getattr(step.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def _discrete(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, Tensor) and not value.is_floating_point())


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
