"""Which attribute every literal size of a forward pass came from, by watching one.

All integer attributes of a model are replaced, for one forward pass of a structural copy, by integers
that remember where they come from through arithmetic. What reaches torch's functions as a size then
tells its own origin: no guessing by value, so that `num_heads == head_dim == 8` is no trap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from prunus.adapters.pytorch.size_algebra import OPERATORS, Attribute, Expression, Operation
from prunus.adapters.pytorch.structural_copy import separate_copy


class _Tracked(int):
    """An integer that remembers its origin."""

    expression: Expression


def _tracked(value: int, expression: Expression) -> _Tracked:
    number = _Tracked(value)
    number.expression = expression
    return number


def _expression(value: int) -> Expression:
    return value.expression if isinstance(value, _Tracked) else int(value)


def _arithmetic(symbol: str, compute: Callable[[int, int], int], swapped: bool) -> Callable[..., Any]:
    def method(self: _Tracked, other: Any) -> Any:
        if type(other) not in (int, _Tracked):
            return NotImplemented
        left, right = (other, self) if swapped else (self, other)
        operation = Operation(symbol, _expression(left), _expression(right))
        return _tracked(compute(int(left), int(right)), operation)

    return method


for _symbol, _name in {"+": "add", "-": "sub", "*": "mul", "//": "floordiv"}.items():
    setattr(_Tracked, f"__{_name}__", _arithmetic(_symbol, OPERATORS[_symbol], swapped=False))
    setattr(_Tracked, f"__r{_name}__", _arithmetic(_symbol, OPERATORS[_symbol], swapped=True))


@dataclass(frozen=True, slots=True)
class Use:
    """A run of sizes that code passed to one torch function."""

    owner: str
    """Path of the module whose forward passed them."""
    function: str
    values: tuple[int, ...]
    expressions: tuple[Expression, ...]


class _Recorder(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.owners: list[str] = [""]
        self.uses: list[Use] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        for sizes in _size_runs([*args, *(kwargs or {}).values()]):
            if any(isinstance(size, _Tracked) for size in sizes):
                values = tuple(int(size) for size in sizes)
                expressions = tuple(_expression(size) for size in sizes)
                self.uses.append(Use(self.owners[-1], getattr(func, "__name__", ""), values, expressions))
        return func(*args, **(kwargs or {}))


def _size_runs(arguments: Sequence[Any]) -> Iterator[list[int]]:
    """Each list or tuple of integers among the arguments, each bound of a slice, each run of plain integers."""
    run: list[int] = []
    for argument in arguments:
        if isinstance(argument, int) and not isinstance(argument, bool):
            run.append(argument)
            continue
        if run:
            yield run
            run = []
        if isinstance(argument, slice):
            yield from ([bound] for bound in (argument.start, argument.stop) if isinstance(bound, int))
        elif isinstance(argument, list | tuple):
            yield from _size_runs(argument)
    if run:
        yield run


def record_uses(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], fake: bool = False
) -> list[Use]:
    """Every use of an integer attribute as a size in one forward pass, in order; `model` is not touched.

    With `fake` nothing is computed: for code that asks for no values.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext()
    if isinstance(mode, FakeTensorMode):
        args, kwargs = pytree.tree_map_only(Tensor, mode.from_tensor, (args, dict(kwargs)))
    twin = separate_copy(model, parameters=False)
    twin.eval()  # alone: an overridden train() need not return the model
    recorder = _Recorder()
    with ExitStack() as hooks, torch.no_grad():
        for path, module in twin.named_modules():
            _track_attributes(path, module)
            handles = (
                module.register_forward_pre_hook(lambda m, i, path=path: recorder.owners.append(path)),
                module.register_forward_hook(lambda m, i, o: _drop(recorder.owners), always_call=True),
            )
            for handle in handles:
                hooks.callback(handle.remove)
        # Code that insists on plain integers ends the watch early; what is then unknown, certification locks.
        with suppress(Exception), mode, recorder:
            twin(*args, **kwargs)
    return recorder.uses


def _drop(owners: list[str]) -> None:
    owners.pop()


def _track_attributes(path: str, module: nn.Module) -> None:
    for name, value in list(vars(module).items()):
        if name.startswith("_"):
            continue
        if type(value) is int:
            vars(module)[name] = _tracked(value, Attribute(path, name))
        elif type(value) in (list, tuple) and value and all(type(item) is int for item in value):
            vars(module)[name] = type(value)(
                _tracked(item, Attribute(path, name, i)) for i, item in enumerate(value)
            )
