"""A captured forward pass as a flat list of steps, ready to be labelled and interpreted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Shape = tuple[int, ...]


@dataclass(eq=False, repr=False, slots=True)
class Step:
    """One value of the program: a parameter, an input, a constant, or the result of one operator."""

    index: int
    op: str
    """Of a source "tensor", "input" or "constant"; else the operator, "aten.conv2d" (no overload, no final _)."""
    target: Callable[..., Any] | None
    arguments: dict[str, Any]
    """By the names of the operator's schema, defaults filled in; other steps stand for their values."""
    shapes: Any
    """The shape of a tensor result, a list of them for several results, None for anything else."""
    owner: str = ""
    """Path of the module whose forward ran the operator."""
    owner_class: str = ""
    name: str = ""
    """Of a tensor: its name in the model. Of an input or constant: its name in the captured program."""

    @property
    def shape(self) -> Shape:
        assert isinstance(self.shapes, tuple), f"{self.op} has no single tensor result"
        return self.shapes

    def __repr__(self) -> str:
        return f"Step({self.index}, {self.op!r}, {self.name or self.owner!r}, {self.shapes})"

    def inputs(self) -> Iterator[Step]:
        """The steps this one reads, in the order of its arguments."""
        for value in self.arguments.values():
            yield from steps_in(value)

    def where(self) -> str:
        """The place in words, for messages."""
        return (
            f"{self.owner or 'the model'} ({self.owner_class})" if self.owner_class else self.owner or "the model"
        )


def steps_in(value: Any) -> Iterator[Step]:
    if isinstance(value, Step):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from steps_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from steps_in(item)


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a module within the forward pass."""

    path: str
    start: int
    stop: int
    """Steps start..stop-1 were recorded meanwhile."""
    input: Step | None
    """The first positional argument, if it is a tensor."""
    output: Step | None
    """The result, if it is a single tensor."""


@dataclass(eq=False, repr=False)
class Program:
    """The forward pass of one model in one mode, at one input shape."""

    steps: list[Step]
    outputs: list[Any]
    """The flat outputs: steps or plain values."""
    output_spec: pytree.TreeSpec
    constants: dict[str, Tensor]
    """Lifted constants by step name, and buffers that are not part of the state dict by tensor name."""
    inputs: list[Step | None] = field(default_factory=list)
    """One per flat input; None for an input that is no tensor."""
    calls: list[Call] = field(default_factory=list)
    """Every call of a module, in the order in which they ended."""
    concrete: bool = False
    """The forward pass asks for values, so it was recorded on real ones and is true for these alone."""

    @property
    def batch(self) -> int:
        """The batch size of the capture: the first dimension of the first input."""
        for step in self.inputs:
            if step is not None and isinstance(step.shapes, tuple) and step.shapes:
                return step.shapes[0]
        return 1


def call(step: Step, arguments: dict[str, Any]) -> Any:
    """Run the step's operator on concrete arguments."""
    target = step.target
    assert target is not None
    schema = getattr(target, "_schema", None)
    if schema is None:
        return target(*arguments.values())
    positional, keywords = [], {}
    for argument in schema.arguments:
        if argument.kwarg_only:
            keywords[argument.name] = arguments[argument.name]
        else:
            positional.append(arguments[argument.name])
    return target(*positional, **keywords)


def operator_name(target: Any) -> str:
    """ "aten.relu" for aten.relu_.default: in-place variants mean the same to labels."""
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.replace("::", ".")
        return name[:-1] if name.endswith("_") and not name.endswith("__") else name
    return getattr(target, "__name__", str(target))
