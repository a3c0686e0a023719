"""Layers whose forward pass takes sizes of one axis from another, and hand-written forwards that do not.

Much attention code reads `B, N, C = x.shape` and then takes the width of the heads from C, the width of
its input: `C // self.num_heads`, `reshape(B, N, C)`. Once heads and residual stream shrink apart that is
wrong, and no attribute can make it right. For these classes, and only for these, a small subclass
replaces `forward`; it computes the same function and reads every width from the tensor it belongs to.

A handler is known by a name that plans store. Installing is exact: an instance keeps its tensors,
attributes and base class, and installing changes no output. No source is rewritten.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from prunus.core.errors import PlanError

Forward = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Handler:
    """A forward for instances of exactly one class."""

    name: str
    """"timm.models.cait.ClassAttn": the class it is for; the name that plans store."""
    forward: Forward
    prepare: Callable[[Any], None] | None = None
    """Stores on a fresh instance what its forward computes from sizes (an attention's scale)."""
    fits: Callable[[Any], bool] = lambda module: True
    """False for configurations of the class that the forward does not cover."""


_HANDLERS: dict[str, Handler] = {}
_MODULES = ("prunus.adapters.pytorch.handlers_timm", "prunus.adapters.pytorch.handlers_torchvision")


def handles(
    *names: str,
    prepare: Callable[[Any], None] | None = None,
    fits: Callable[[Any], bool] = lambda module: True,
) -> Callable[[Forward], Forward]:
    """Registers the decorated forward for the classes with these qualified names."""

    def register(forward: Forward) -> Forward:
        for name in names:
            _HANDLERS[name] = Handler(name, forward, prepare, fits)
        return forward

    return register


def known() -> Mapping[str, Handler]:
    """Every handler by name."""
    for module in _MODULES:
        importlib.import_module(module)
    return _HANDLERS


def needed(model: nn.Module) -> dict[str, str]:
    """module path -> handler name, for every module of `model` that needs one and has none yet."""
    table = known()
    found = {}
    for path, module in model.named_modules():
        handler = table.get(_qualified(type(module)))
        if handler is not None and handler.fits(module):
            found[path] = handler.name
    return found


def install_handlers(model: nn.Module, handlers: Mapping[str, str]) -> None:
    """Gives the modules at these paths their handlers' forward, in place. Idempotent.

    Must run on a model of original sizes, before anything is removed. Raises PlanError if a path, a
    name or the class of a module does not fit.
    """
    table, modules = known(), dict(model.named_modules(remove_duplicate=False))
    for path, name in handlers.items():
        module, handler = modules.get(path), table.get(name)
        if module is None or handler is None:
            what = f"no module {path!r}" if module is None else f"no handler {name!r}"
            raise PlanError(f"{what}: the plan is of another model or of another version")
        if handled_name(module) == name:
            continue
        if _qualified(type(module)) != name:
            raise PlanError(f"{path} is a {_qualified(type(module))}; handler {name!r} does not fit it")
        if handler.prepare is not None:
            handler.prepare(module)
        module.__class__ = _handled(type(module), name)


def handled_name(module: nn.Module) -> str | None:
    """Name of the handler that `module` runs, None for an untouched module."""
    return getattr(type(module), "_prunus_handler", None)


def _qualified(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


_KINDS: dict[tuple[Any, str], Any] = {}


def _handled(original: Any, name: str) -> Any:
    key = original, name
    if key not in _KINDS:
        _KINDS[key] = _subclass(original, name)
    return _KINDS[key]


def _subclass(original: Any, name: str) -> Any:
    body = {
        "forward": known()[name].forward,
        "_prunus_handler": name,
        "__module__": __name__,
        "__doc__": original.__doc__,
        "__reduce_ex__": _reduce,
    }
    return type(original.__name__, (original,), body)


def _reduce(module: nn.Module, protocol: object) -> tuple[Any, ...]:
    """Copies and pickles by class and name: the subclass itself is made anew where it is needed."""
    kind = type(module)
    return _blank, (kind.__bases__[0], handled_name(module)), module.__dict__


def _blank(original: Any, name: str) -> Any:
    kind = _handled(original, name)
    return kind.__new__(kind)
