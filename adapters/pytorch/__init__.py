"""prunus for PyTorch: `prune(model, ...)`, `begin(model, ...)`, `load(RUN)`, `from_pretrained(...)`, `trace`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunus.adapters.pytorch.api import Pruned, load, prune, trace
    from prunus.adapters.pytorch.hub import from_pretrained
    from prunus.adapters.pytorch.loop import Finished, LoopRun, begin

__all__ = ["Finished", "LoopRun", "Pruned", "begin", "from_pretrained", "load", "prune", "trace"]


def __getattr__(name: str) -> Any:
    # late, so that importing one module of the adapter does not import all of it
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    homes = {"Finished": "loop", "LoopRun": "loop", "begin": "loop", "from_pretrained": "hub"}
    return getattr(import_module(f"prunus.adapters.pytorch.{homes.get(name, 'api')}"), name)
