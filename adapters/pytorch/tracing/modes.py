"""Training and evaluation mode of models whose own code takes part in the switch between them.

A model may override `train`: to keep norms in eval mode, to empty a cache, to freeze stages. Some merge weights
in eval mode and take them apart in training (LoRA, re-parametrised convolutions): then no look at the model
leaves it as it was, and a removal from the one form says nothing of the other.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

KNOWN = ("torch.", "timm.", "torchvision.", "prunus.")
"""Packages whose modules know no sizes in training that they do not know in evaluation."""


def overrides_modes(module: nn.Module) -> bool:
    """Whether code of its own runs when `module` is put into a mode."""
    kind, own = type(module), vars(module)
    return kind.train is not nn.Module.train or kind.eval is not nn.Module.eval or "train" in own or "eval" in own


def asks_for_mode(model: nn.Module) -> bool:
    """Whether code outside of the known packages does something else in training than in evaluation."""
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    codes = [code for kind in kinds if not f"{kind.__module__}.".startswith(KNOWN) for code in _codes(vars(kind))]
    codes += [code for module in model.modules() for code in _codes(vars(module))]
    return any("training" in code.co_names for code in codes)


def _codes(namespace: Mapping[str, Any]) -> Iterator[CodeType]:
    """The code of all functions of a class or an object, and of the functions within them."""
    pending = [code for value in namespace.values() if (code := _code(value)) is not None]
    while pending:
        code = pending.pop()
        yield code
        pending += [constant for constant in code.co_consts if isinstance(constant, CodeType)]


def _code(value: Any) -> CodeType | None:
    function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
    function = inspect.unwrap(function) if isinstance(function, FunctionType) else None
    return function.__code__ if isinstance(function, FunctionType) else None


def set_mode(module: nn.Module, training: bool) -> None:
    """As users do it; what an override returns is not relied upon, since many return nothing."""
    if training:
        module.train()
    else:
        module.eval()


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by each of its names."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


class Snapshot:
    """A model as it was: attributes and containers of every module, and the values of some tensors."""

    def __init__(self, model: nn.Module, tensors: Iterable[Tensor] = ()) -> None:
        self._attributes = {module: dict(vars(module)) for module in model.modules()}
        held = [value for found in self._attributes.values() for value in found.values()]
        self._dicts = [(value, dict(value)) for value in held if isinstance(value, dict)]
        self._lists = [(value, list(value)) for value in held if type(value) is list]
        self._values = [(t, t.data, t.detach().clone()) for t in tensors if not is_lazy(t)]
        self._learning = _learning(model)

    def restore(self) -> None:
        """Puts everything back, bit for bit."""
        for module, found in self._attributes.items():
            vars(module).clear()
            vars(module).update(found)
        for mapping, content in self._dicts:
            mapping.clear()
            mapping.update(content)
        for sequence, items in self._lists:
            sequence[:] = items
        with torch.no_grad():
            for tensor, storage, before in self._values:
                if _elsewhere(tensor, storage):
                    tensor.data = storage
                if not same_values(tensor, before):
                    tensor.copy_(before)
        _restore_learning(self._learning)


@contextmanager
def learning_kept(model: nn.Module) -> Iterator[None]:
    """Parameters that learn before the block do so after it, and no others: an overridden `train` may freeze some.

    Those of copies that share them included.
    """
    found = _learning(model)
    try:
        yield
    finally:
        _restore_learning(found)


def _learning(model: nn.Module) -> list[tuple[nn.Parameter, bool]]:
    return [(parameter, parameter.requires_grad) for parameter in model.parameters()]


def _restore_learning(found: list[tuple[nn.Parameter, bool]]) -> None:
    for parameter, learning in found:
        if parameter.requires_grad != learning:
            parameter.requires_grad_(learning)


def _elsewhere(tensor: Tensor, storage: Tensor) -> bool:
    """Whether another memory was put under `tensor`."""
    return tensor.layout == torch.strided and tensor.data_ptr() != storage.data_ptr()


def same_values(a: Tensor, b: Tensor) -> bool:
    """Equal in shape, type and every value; NaN equals nothing."""
    try:
        return a.dtype == b.dtype and torch.equal(a, b)
    except RuntimeError:  # sparse tensors cannot be asked
        return False


def moved_by_modes(model: nn.Module) -> tuple[str, str] | None:
    """(module, tensor): the first parameter or buffer that a switch of modes changes, and whose code does it.

    None for a model that stays the same, as nearly all do. `model` is left as it was.
    """
    own = [path for path, module in model.named_modules() if overrides_modes(module)]
    if not own:
        return None
    tensors = named_tensors(model)
    if any(is_lazy(tensor) for tensor in tensors.values()):
        return None
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    found = Snapshot(model, {id(tensor): tensor for tensor in tensors.values()}.values())
    try:
        with torch.no_grad():
            for training in (True, False):
                with suppress(Exception):  # a model that knows one mode alone
                    set_mode(model, training)
                name = _difference(before, named_tensors(model))
                if name is not None:
                    return max((path for path in own if _within(name, path)), key=len, default=own[0]), name
    finally:
        found.restore()
    return None


def _difference(before: dict[str, Tensor], after: dict[str, Tensor]) -> str | None:
    for name in (*before, *after):
        if name not in before or name not in after or not same_values(before[name], after[name]):
            return name
    return None


def _within(tensor: str, path: str) -> bool:
    return not path or tensor.startswith(f"{path}.")
