"""prunus for PyTorch: `prune(model, ...)`, `load("runs/NAME")`, `trace(model, example_inputs)`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunus.adapters.pytorch.api import Pruned, load, prune, trace

__all__ = ["Pruned", "load", "prune", "trace"]


def __getattr__(name: str) -> Any:
    # late, so that importing one module of the adapter does not import all of it
    if name in __all__:
        from prunus.adapters.pytorch import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
