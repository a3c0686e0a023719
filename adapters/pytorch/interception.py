"""Functions of torch that are answered otherwise for a while, whoever calls them and from whatever module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import NotImplementedType
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

Answer = Tensor | NotImplementedType


class Interception(TorchFunctionMode):
    """While active, `handlers` (function -> who answers) answer; NotImplemented leaves a call as it is."""

    def __init__(self, handlers: Mapping[Callable[..., Any], Callable[..., Answer]]) -> None:
        super().__init__()
        self._handlers = handlers

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        handler = self._handlers.get(func)
        if handler is not None:
            result = handler(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True, slots=True, eq=False)
class BatchNormCall:
    """The arguments of `torch.nn.functional.batch_norm`, as it takes them."""

    input: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5
