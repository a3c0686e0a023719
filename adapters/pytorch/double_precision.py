"""A forward pass in float64, whatever types its code asks for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_COARSE = frozenset({torch.float32, torch.float16, torch.bfloat16})


class DoublePrecision(TorchDispatchMode):
    """While active, every operator works in float64: on its operands, and where it is told a coarser type.

    Composite operators may check the types of their operands before this mode sees them, so weights and
    inputs should be float64 already. What a pass keeps (caches) is float64: run a copy of the model.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map(_widened, (args, kwargs or {}))
        return func(*args, **kwargs)


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype in _COARSE:
        return value.double()
    if isinstance(value, torch.dtype) and value in _COARSE:
        return torch.float64
    return value
