"""Copies of modules, and modules in eval mode: for classes that do either in a way of their own, too."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from types import FunctionType, MethodType, ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from prunus.core.errors import TraceError

Module = TypeVar("Module", bound=nn.Module)

_HOLD_NOTHING = (type(None), bool, int, float, complex, str, bytes, type, FunctionType, ModuleType)


def in_eval(module: Module) -> Module:
    """`module`, put into eval mode. A `train()` that keeps norms frozen often returns nothing."""
    module.eval()
    return module


def copied(module: Module) -> Module:
    """A deep copy, of models that keep computed tensors as well (`self.features = ...` in forward).

    PyTorch copies no tensor that has a history. The copy gets its values without the history; a view of a
    parameter is a view of the copy's parameter. Raises TraceError naming the attribute that cannot be copied.
    """
    memo = detached(module)
    try:
        return copy.deepcopy(module, dict(memo))
    except (MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:  # each object fails in a way of its own
        where, reason = _what_fails(module, memo) or (f"the model ({type(module).__name__})", _said(error))
        raise TraceError(
            f"{where} cannot be copied ({reason}), and pruning works on copies; set it to None meanwhile, or "
            "leave it out in the __getstate__ of its class"
        ) from error


def detached(module: nn.Module, known: Mapping[int, Any] | None = None) -> dict[int, Any]:
    """What `copy.deepcopy` of `module` needs as its memo: copies of the tensors that it would refuse.

    `known`: a memo (id -> copy) that is kept as it is.
    """
    memo: dict[int, Any] = dict(known or {})
    for tensor in _computed(module):
        if id(tensor) in memo:
            continue
        base = tensor._base
        if isinstance(base, nn.Parameter):  # the memo, too, where the parameter's own turn comes
            other = copy.deepcopy(base, memo)
            memo[id(tensor)] = other.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        else:
            memo[id(tensor)] = tensor.detach().clone()
    return memo


def _computed(module: nn.Module) -> Iterator[Tensor]:
    """Every tensor with a history that `module` holds: in attributes, containers, objects of other classes."""
    seen: set[int] = set()
    left: list[Any] = [module]
    while left:
        value = left.pop()
        if isinstance(value, _HOLD_NOTHING) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor) and not value.is_leaf:
            yield value
        elif isinstance(value, dict):
            left.extend(value.values())
        elif isinstance(value, list | tuple | set | frozenset):
            left.extend(value)
        elif isinstance(value, MethodType):
            left.append(value.__self__)
        if hasattr(value, "__dict__"):
            left.append(vars(value))


def _what_fails(module: nn.Module, memo: dict[int, Any]) -> tuple[str, str] | None:
    """The first attribute that cannot be copied, with its type, and what Python says of it."""
    known = {**memo, **{id(part): part for part in module.modules()}}
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            if name == "_modules":
                continue
            own = value if name in ("_parameters", "_buffers") else {name: value}
            for attribute, each in own.items():
                try:
                    copy.deepcopy(each, dict(known))
                except Exception as error:
                    dotted = f"{path}.{attribute}" if path else attribute
                    return f"{dotted} ({type(each).__name__})", _said(error)
    return None


def _said(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
