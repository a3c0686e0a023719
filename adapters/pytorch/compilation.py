"""torch.compile for trainings: of the model as it is, anew for each shape, stepping aside where it cannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Compiled:
    """Calls a compiled module; the module itself from the first failure to compile on.

    A removal or growth changes shapes, so every training compiles the model that it finds. Shapes that were
    compiled before in this process are not compiled again.
    """

    def __init__(
        self, module: nn.Module, notice: Callable[[str], None], backend: str | Callable[..., Any] = "inductor"
    ) -> None:
        """`notice` is told, in one line, if nothing can be compiled here."""
        self._module, self._notice = module, notice
        self._compiled: Any = torch.compile(module, backend=backend, dynamic=False)

    def __call__(self, images: Tensor) -> Any:
        if self._compiled is None:
            return self._module(images)
        try:
            return self._compiled(images)
        except Exception as error:
            if not _is_compilers(error):
                raise
            self._compiled = None
            self._notice(f"torch.compile cannot compile this model here and steps aside ({_reason(error)})")
            return self._module(images)


def _reason(error: Exception) -> str:
    """The first line, and the next where the first announces it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])[:160]


def _is_compilers(error: Exception) -> bool:
    """True if it comes from the compiler, not from the model."""
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
