"""Records the operators that a Python call runs, as the steps of a `Program`.

Operators are seen before autograd and before composite ones fall apart, the level on which torch.export
writes them, at a fraction of its time: nothing is compiled, no shape is symbolic. Tensors may be fake (no
memory, no arithmetic) or real (where the code asks for values: detection models).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from prunus.adapters.pytorch.tracing.program import Call, Step, operator_name
from prunus.core.errors import TraceError


class Recorder(ProxyTorchDispatchMode):
    """While active, every operator becomes a step. PyTorch admits only this base class at this level."""

    def __init__(self, model: nn.Module) -> None:
        TorchDispatchMode.__init__(self, torch._C.DispatchKey.PreDispatch)
        self._mode_key = torch._C._TorchDispatchModeKey.PROXY
        self.enter_stack = []
        self.steps: list[Step] = []
        self.constants: dict[str, Tensor] = {}
        self._step_of: Any = WeakIdKeyDictionary()
        self._names = tensor_names(model)
        self._paths = {id(module): path for path, module in reversed(list(model.named_modules()))}
        self._stack: list[tuple[str, str]] = []
        self.calls: list[Call] = []
        self._open: list[tuple[int, Step | None]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        named = _bind(func, args, kwargs)
        arguments = {name: self._recorded(value) for name, value in named.items()}
        owner = self._stack[-1] if self._stack else ("", "")
        result = func(*args, **kwargs)
        step = self._add(operator_name(func), func, arguments, shapes_of(result), owner)
        result = self._completed(step, named, result)
        self._assign(step, result)
        return result

    def _completed(self, step: Step, arguments: dict[str, Any], result: Any) -> Any:
        """Called with every new step; what it returns is the operator's result."""
        return result

    def source(self, kind: str, name: str, value: Tensor) -> Step:
        """Introduce a tensor that the recorded call does not make itself."""
        step = self._add(kind, None, {}, shapes_of(value), name=name)
        self._step_of[value] = step
        return step

    def step_of(self, value: Any) -> Any:
        """The step that made a tensor; other values stand for themselves."""
        return self._recorded(value)

    def _add(
        self,
        op: str,
        target: Any,
        arguments: dict[str, Any],
        shapes: Any,
        owner: tuple[str, str] = ("", ""),
        name: str = "",
    ) -> Step:
        step = Step(len(self.steps), op, target, arguments, shapes, owner[0], owner[1], name)
        self.steps.append(step)
        return step

    def _recorded(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            known = self._step_of.get(value)
            if known is None and id(value) in self._names:
                known = self.source("tensor", self._names[id(value)], value)
            elif known is None:
                name = f"constant_{len(self.constants)}"
                if isinstance(value, FakeTensor):
                    raise TraceError("a tensor was made out of the recorder's sight; real tensors are needed")
                self.constants[name] = value
                known = self.source("constant", name, value)
            return known
        if isinstance(value, list | tuple):
            return [self._recorded(item) for item in value]
        return value

    def _known(self, value: Any) -> Step | None:
        """The step that made a tensor, if one did."""
        found: Step | None = self._step_of.get(value) if isinstance(value, Tensor) else None
        return found

    def _assign(self, step: Step, result: Any) -> None:
        if isinstance(result, Tensor):
            self._step_of[result] = step
        elif isinstance(result, list | tuple):
            for position, item in enumerate(result):
                if isinstance(item, Tensor):
                    part, place = {"a": step, "b": position}, (step.owner, step.owner_class)
                    self._step_of[item] = self._add("getitem", _item, part, shapes_of(item), place)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Records, and follows which module is running, for the duration of a block."""

        def enter(module: nn.Module, args: Any) -> None:
            self._stack.append((self._paths.get(id(module), ""), type(module).__name__))
            self._open.append((len(self.steps), self._known(args[0]) if args else None))

        def leave(module: nn.Module, _: Any, output: Any) -> None:
            path, _ = self._stack.pop()
            start, source = self._open.pop()
            self.calls.append(Call(path, start, len(self.steps), source, self._known(output)))

        hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
        try:
            with enable_python_dispatcher(), self:
                yield
        finally:
            for hook in hooks:
                hook.remove()
            self._stack.clear()
            self._open.clear()


def tensor_names(model: nn.Module) -> dict[int, str]:
    """id of each parameter and buffer -> the first name it goes by: tied tensors have one name."""
    names: dict[int, str] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        names.setdefault(id(tensor), name)
    return names


def _item(values: Any, position: int) -> Any:
    return values[position]


def _bind(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by the names of the operator's schema, defaults filled in."""
    named: dict[str, Any] = {}
    for position, argument in enumerate(target._schema.arguments):
        if position < len(args):
            named[argument.name] = args[position]
        else:
            named[argument.name] = kwargs.get(argument.name, argument.default_value)
    return named


def shapes_of(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(int(size) for size in value.shape)
    if isinstance(value, list | tuple):
        return [shapes_of(item) for item in value]
    return None
