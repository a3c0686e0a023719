"""Decisions that a forward pass takes by value, and their replay.

Detection models sort, threshold and suppress. Two computations that agree to the last few bits may order equal
scores either way, and everything after that differs, though nothing is wrong. So the decisions of one pass are
recorded together with the values they were taken on, and another pass follows them: compared is what it would
have decided on, and all that it computes given the same decisions.
"""

from __future__ import annotations

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

    op: str
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
    return Decision(step.op, tuple(x.detach().clone() for x in grounds), tuple(_copied(x) for x in results))


def following(model: nn.Module, taken: Sequence[Decision], args: tuple[Any, ...]) -> tuple[Any, list[Decision]]:
    """(outputs, own decisions) of `model` in eval mode, made to go the way of the decisions `taken`.

    A decision about an axis that has another length here stays the model's own. Raises TraceError where
    the pass does not come to the same decisions in the same order.
    """
    with as_found(model, training=False), torch.no_grad():
        recorder = _Following(model, taken)
        with recorder.watching():
            outputs = model(*args)
    if len(recorder.own) != len(taken):
        raise TraceError(
            f"{len(taken)} decisions are taken by value before the removal, {len(recorder.own)} after"
        )
    return outputs, recorder.own


def grounds(own: Sequence[Decision], taken: Sequence[Decision]) -> tuple[list[Tensor], list[Tensor]]:
    """What both passes took their decisions on, in pairs; without the axes that have other lengths."""
    pairs = [
        (a, b)
        for mine, theirs in zip(own, taken, strict=True)
        for a, b in zip(mine.grounds, theirs.grounds, strict=True)
        if a.shape == b.shape
    ]
    return [a for a, _ in pairs], [b for _, b in pairs]


class _Following(Recorder):
    """Replaces what each operator decides."""

    def __init__(self, model: nn.Module, taken: Sequence[Decision]) -> None:
        super().__init__(model)
        self.own: list[Decision] = []
        self._taken = taken

    def _completed(self, step: Step, arguments: dict[str, Any], result: Any) -> Any:
        mine = decision(step, arguments, result)
        if mine is None:
            return result
        place = len(self.own)
        self.own.append(mine)
        theirs = self._taken[place] if place < len(self._taken) else None
        if theirs is None or theirs.op != mine.op:
            was = theirs.op if theirs else "none"
            raise TraceError(f"{step.op} in {step.where()} decides by value where the whole model has {was}")
        if any(a.shape != b.shape for a, b in zip(mine.grounds, theirs.grounds, strict=True)):
            return result
        return _replaced(step, arguments, result, theirs)


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
