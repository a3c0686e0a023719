"""Residual blocks, read off a captured forward pass: modules whose output is their input plus something.

Names prove nothing. The trunk of a module leads from its output back to its input through additions, and
through operators that pass values on: what is added on the way are the branches. With zeros in their
place the module is the identity on every input that can reach it, which is shown by computing the trunk.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunus.adapters.pytorch.tracing.program import Call, Program, Step, call
from prunus.core.blocks import Block
from prunus.core.graph import ChannelGraph

_ADD = "aten.add"
_LAYOUT = frozenset(
    f"aten.{name}"
    for name in (
        *("view", "reshape", "permute", "transpose", "flatten", "unflatten", "unsqueeze", "squeeze", "movedim"),
        *("contiguous", "clone", "alias", "detach", "dropout", "feature_dropout", "alpha_dropout"),
    )
)
"""Operators that move values without changing them; dropout is one in eval mode."""
_CLAMPS = frozenset({"aten.relu", "aten.relu6", "aten.hardtanh"})
"""Operators that change nothing of what has been through them."""
_POOLS = frozenset({"aten.max_pool2d", "aten.avg_pool2d", "aten.adaptive_avg_pool2d"})
"""Operators whose results stay within the range of what they read, or are 0."""


_Way = list[tuple[Step, str]] | None
"""Steps in their order, each with the argument that leads back."""


@dataclass(frozen=True, slots=True)
class Residual:
    """A block, and where its branches join the trunk."""

    block: Block
    cuts: frozenset[tuple[int, str]]
    """(index of an addition, name of the argument that holds the branch): zeros there, and the block is gone."""


def find_residuals(program: Program, model: nn.Module) -> dict[str, Residual]:
    """Every module that can be replaced by the identity, in the order in which they run.

    A module that merely strings such modules together is none itself; one within another can be.
    """
    if program.concrete:
        return {}
    search = _Search(program, model)
    times = Counter(one.path for one in program.calls)
    found: dict[str, Residual] = {}
    for one in sorted(program.calls, key=lambda c: (c.start, -c.stop)):
        if times[one.path] == 1 and one.path:
            residual = search.residual(one)
            if residual is not None:
                found[one.path] = residual
    return {path: r for path, r in found.items() if not _strings(path, r, found)}


def blocks_of(graph: ChannelGraph, residuals: Mapping[str, Residual]) -> list[Block]:
    """The blocks whose inner groups decide nothing outside of them."""
    blocks = []
    for residual in residuals.values():
        whole = ChannelGraph(graph.groups.values(), graph.terms, graph.tensors, [residual.block])
        rest = whole.without_blocks([residual.block.name])
        products = [names for term in rest.terms for extent in term.extents for _, names in extent.terms]
        if set().union(*products) <= set(rest.groups):
            blocks.append(residual.block)
    return blocks


def _strings(path: str, residual: Residual, found: Mapping[str, Residual]) -> bool:
    """True if all that the module adds is added by blocks inside of it."""
    inner = [r.cuts for other, r in found.items() if other.startswith(f"{path}.")]
    return bool(inner) and residual.cuts <= frozenset[tuple[int, str]]().union(*inner)


class _Search:
    """What can be asked of one program again and again."""

    def __init__(self, program: Program, model: nn.Module) -> None:
        self._program, self._modules = program, dict(model.named_modules(remove_duplicate=False))
        self._last_use: dict[Step, int] = {x: len(program.steps) for x in program.outputs if isinstance(x, Step)}
        for step in program.steps:
            for source in step.inputs():
                self._last_use[source] = max(step.index, self._last_use.get(source, 0))
        self._readers: dict[str, set[str]] = {}
        """tensor -> paths of the modules whose code reads it."""
        for step in program.steps:
            for source in step.inputs():
                if source.op == "tensor":
                    self._readers.setdefault(source.name, set()).add(step.owner)
        self._homes: dict[int, list[str]] = {}
        for named in (model.named_parameters, model.named_buffers):
            for name, tensor in named(remove_duplicate=False):
                self._homes.setdefault(id(tensor), []).append(name)

    def residual(self, one: Call) -> Residual | None:
        source, result = one.input, one.output
        if source is None or result is None or source is result or source.shapes != result.shapes:
            return None
        trunk = self._trunk(result, source, one, {})
        if trunk is None or not any(step.op == _ADD for step, _ in trunk):
            return None
        if not (self._closed(one, result) and _passes(trunk, source)):
            return None
        tensors = self._own_tensors(one.path)
        if tensors is None:
            return None
        paths = [p for p in self._modules if p == one.path or p.startswith(f"{one.path}.")]
        cuts = frozenset((step.index, _other(operand)) for step, operand in trunk if step.op == _ADD)
        return Residual(Block(one.path, tensors, frozenset(paths)), cuts)

    def _trunk(self, step: Step, source: Step, one: Call, known: dict[Step, _Way]) -> _Way:
        """The way from `source` to `step`; None if there is none, or more than one."""
        if step is source:
            return []
        if step.index < one.start:
            return None
        if step not in known:
            ways = []
            for argument in _carriers(step):
                way = self._trunk(step.arguments[argument], source, one, known)
                if way is not None:
                    ways.append([*way, (step, argument)])
            known[step] = ways[0] if len(ways) == 1 else None
        return known[step]

    def _closed(self, one: Call, result: Step) -> bool:
        """True if nothing but the result leaves the call, and all of its work is owned by the module."""
        prefix = f"{one.path}."
        for step in self._program.steps:
            inside = one.start <= step.index < one.stop
            if step.op == "tensor":
                continue
            if step.target is not None and inside != (step.owner == one.path or step.owner.startswith(prefix)):
                return False
            leaves = self._last_use.get(step, 0) >= one.stop
            if inside and leaves and step.target is not None and step is not result:
                return False
        return True

    def _own_tensors(self, path: str) -> frozenset[str] | None:
        """The parameters and buffers of a module; None if it has none, or shares one with another."""
        names = set()
        for homes in self._homes.values():
            inside = [name for name in homes if name.startswith(f"{path}.")]
            if inside and len(inside) != len(homes):
                return None
            names.update(inside)
        parameters = any(True for _ in self._modules[path].parameters())
        readers = set().union(*(self._readers.get(name, ()) for name in names))
        outside = any(not f"{owner}.".startswith(f"{path}.") for owner in readers)
        return frozenset(names) if parameters and not outside else None


def _carriers(step: Step) -> list[str]:
    """The arguments through which a step may pass a trunk on."""
    tensors = [name for name, value in step.arguments.items() if isinstance(value, Step)]
    if step.op == _ADD:
        alike = [n for n in tensors if step.arguments[n].shapes == step.shapes]
        return alike if len(alike) == 2 and step.arguments.get("alpha", 1) == 1 else []
    if step.op in _LAYOUT or step.op in _CLAMPS:
        return tensors if len(tensors) == 1 else []
    return []


def _other(operand: str) -> str:
    return "other" if operand == "self" else "self"


def _passes(trunk: list[tuple[Step, str]], source: Step) -> bool:
    """True if the trunk gives back what it is given, whatever reaches the module."""
    for step, _ in trunk:
        if step.op in _CLAMPS and not _clamped(source, step):
            return False
    size = torch.Size(source.shape).numel()
    values = torch.linspace(0.0, 1.0, max(size, 2), dtype=torch.float64)[:size].reshape(source.shape)
    passed: Tensor = values
    for step, argument in trunk:
        if step.op != _ADD:
            passed = call(step, {**step.arguments, argument: passed.clone()})
    return torch.equal(passed, values)


def _clamped(step: Step, clamp: Step) -> bool:
    """True if all values of `step` have been through an operator like `clamp`, or a narrower one."""
    while step.op not in _CLAMPS:
        before = [x for x in step.inputs() if x.op != "tensor"]
        if len(before) != 1 or not (step.op in _LAYOUT or step.op in _POOLS):
            return False
        step = before[0]
    low, high = _range(step)
    lowest, highest = _range(clamp)
    return lowest <= low and high <= highest


def _range(clamp: Step) -> tuple[float, float]:
    if clamp.op == "aten.hardtanh":
        return float(clamp.arguments["min_val"]), float(clamp.arguments["max_val"])
    return 0.0, 6.0 if clamp.op == "aten.relu6" else float("inf")
