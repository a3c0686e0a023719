"""The reference of law 1: interprets a captured forward pass with units masked, or removed.

Both modes run the operators of the original model, nothing else is trusted:

    mask   original tensors; operands of contractions are zero at dead indices; statistics (norms, means)
           run over the living indices alone
    prune  restricted tensors, literals re-derived from kept counts
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from prunus.adapters.pytorch.tracing.program import Step, call
from prunus.adapters.pytorch.tracing.trace import Trace
from prunus.core.cost import IntArray
from prunus.core.errors import TraceError

Mode = Literal["mask", "prune"]


class Oracle:
    """One forward pass of one plan."""

    def __init__(
        self, trace: Trace, tensors: Mapping[str, Tensor], keep: Mapping[str, Sequence[int]], mode: Mode
    ) -> None:
        self._trace = trace
        self._mode = mode
        self._tensors = {**trace.program.constants, **tensors}
        kept = {name: np.asarray(units, dtype=np.int64) for name, units in keep.items()}
        self._keep = trace.graph.check_keep(kept)
        self._counts = {name: len(units) for name, units in self._keep.items()}
        self._alive: dict[int, Tensor | None] = {}
        self._sites: dict[int, list[Any]] = {}
        for site in trace.sites:
            self._sites.setdefault(site.step, []).append(site)
        self._contracted: dict[int, list[Any]] = {}
        for contraction in trace.contractions:
            self._contracted.setdefault(contraction.step.index, []).append(contraction)
        self._last_use: dict[int, list[Step]] = _last_uses(trace)

    def run(self, inputs: Any) -> Any:
        """`inputs` is a tensor or the tuple of positional arguments; larger batches run in parts."""
        args = inputs if isinstance(inputs, tuple) else (inputs,)
        batch = self._trace.program.batch
        first = next((x for x in args if isinstance(x, Tensor)), None)
        if first is None or first.dim() == 0 or first.shape[0] == batch:
            return self._forward(args)
        if first.shape[0] % batch:
            raise TraceError(
                f"a batch of {first.shape[0]} is no multiple of the traced batch of {batch}; pass a multiple"
            )
        parts = [
            self._forward(tuple(x[i : i + batch] if isinstance(x, Tensor) else x for x in args))
            for i in range(0, first.shape[0], batch)
        ]
        return pytree.tree_map(lambda *xs: torch.cat(xs) if isinstance(xs[0], Tensor) else xs[0], *parts)

    @torch.no_grad()
    def _forward(self, args: tuple[Any, ...]) -> Any:
        program = self._trace.program
        values: dict[Step, Any] = {}
        leaves = pytree.tree_flatten((args, {}))[0]
        for step, value in zip(program.inputs, leaves, strict=True):
            if step is not None:
                values[step] = value
        for step in program.steps:
            if step.op == "tensor":
                values[step] = self._tensor(step)
            elif step.op == "constant":
                values[step] = program.constants[step.name]
            elif step.op != "input":
                values[step] = self._call(step, values)
            for done in self._last_use.get(step.index, ()):
                values.pop(done, None)
        flat = [values[x] if isinstance(x, Step) else x for x in program.outputs]
        return pytree.tree_unflatten(flat, program.output_spec)

    def _tensor(self, step: Step) -> Tensor:
        if step.name not in self._tensors:
            raise TraceError(f"tensor {step.name!r} is missing; pass the state dict of the whole model")
        value = self._tensors[step.name].detach()
        if self._mode == "prune" and step in self._trace.labels:
            return self._restrict(value, self._trace.labels[step])
        return value

    def _call(self, step: Step, values: Mapping[Step, Any]) -> Any:
        arguments = {name: _resolve(x, values) for name, x in step.arguments.items()}
        if self._mode == "prune":
            return self._checked(step, self.execute(step, _unaliased(step, self._literals(step, arguments))))
        if step in self._trace.statistics:
            return self._restricted_call(step, arguments)
        for contraction in self._contracted.get(step.index, ()):
            self._zero(arguments, contraction)
        return call(step, _unaliased(step, arguments))

    def execute(self, step: Step, arguments: dict[str, Any]) -> Any:
        """One operator of a pruned pass; what times operators overrides it."""
        return call(step, arguments)

    def _restricted_call(self, step: Step, arguments: dict[str, Any]) -> Any:
        """Statistics over the living: restrict every operand, run, put zeros back where nothing lives."""
        for name, source in step.arguments.items():
            if isinstance(source, Step) and source in self._trace.labels:
                arguments[name] = self._restrict(arguments[name], self._trace.labels[source])
        result = call(step, _unaliased(step, self._literals(step, arguments)))
        labels = self._trace.labels[step]
        if isinstance(result, Tensor):
            return self._scatter(result, labels, step.shape)
        return tuple(self._scatter(r, x, n) for r, x, n in zip(result, labels, step.shapes, strict=True))

    def _literals(self, step: Step, arguments: dict[str, Any]) -> dict[str, Any]:
        for site in self._sites.get(step.index, ()):
            value = round(site.extent.at(self._counts))
            if site.position is None:
                arguments[site.argument] = value
            else:
                numbers = list(arguments[site.argument])
                numbers[site.position] = value
                arguments[site.argument] = numbers
        return arguments

    def _checked(self, step: Step, result: Any) -> Any:
        """A pruned result must have the length that its labels promise."""
        if isinstance(result, Tensor) and isinstance(step.shapes, tuple):
            for axis, ids in enumerate(self._trace.labels[step]):
                index = None if ids is None else self._indices(ids)
                expected = step.shape[axis] if index is None else len(index)
                if result.shape[axis] != expected:
                    raise TraceError(
                        f"{step.op} in {step.where()}: axis {axis} has {result.shape[axis]} entries after "
                        f"removal, {expected} were expected",
                        node=step.op,
                    )
        return result

    def _indices(self, ids: IntArray) -> Tensor | None:
        """The living indices, None if all live."""
        if id(ids) not in self._alive:
            alive = self._trace.grouping.alive(ids, self._keep)
            self._alive[id(ids)] = None if alive.all() else torch.from_numpy(np.flatnonzero(alive))
        return self._alive[id(ids)]

    def _restrict(self, value: Tensor, labels: Any) -> Tensor:
        for axis, ids in enumerate(labels):
            index = None if ids is None else self._indices(ids)
            if index is not None:
                value = value.index_select(axis, index)
        return value

    def _scatter(self, value: Tensor, labels: Any, shape: Sequence[int]) -> Tensor:
        for axis, ids in enumerate(labels):
            index = None if ids is None else self._indices(ids)
            if index is not None:
                whole = value.new_zeros([*value.shape[:axis], shape[axis], *value.shape[axis + 1 :]])
                value = whole.index_copy(axis, index, value)
        return value

    def _zero(self, arguments: dict[str, Any], contraction: Any) -> None:
        index = self._indices(contraction.ids)
        if index is None:
            return
        name, position, axis = contraction.argument, contraction.position, contraction.axis
        value = arguments[name] if position is None else arguments[name][position]
        dead = torch.ones(value.shape[axis], dtype=torch.bool)
        dead[index] = False
        zeroed = value.index_fill(axis, torch.nonzero(dead)[:, 0], 0)
        if position is None:
            arguments[name] = zeroed
        else:
            arguments[name] = [zeroed if i == position else x for i, x in enumerate(arguments[name])]


def _resolve(value: Any, values: Mapping[Step, Any]) -> Any:
    if isinstance(value, Step):
        return values[value]
    if isinstance(value, list | tuple):
        return [_resolve(x, values) for x in value]
    return value


def _unaliased(step: Step, arguments: dict[str, Any]) -> dict[str, Any]:
    """An in-place operator on a parameter, buffer or input works on a copy, never on the caller's own."""
    schema = getattr(step.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return arguments
    return {
        name: value.clone()
        if isinstance(value, Tensor) and step.arguments[name].op in ("tensor", "input", "constant")
        else value
        for name, value in arguments.items()
    }


def _last_uses(trace: Trace) -> dict[int, list[Step]]:
    last: dict[Step, int] = {}
    for step in trace.program.steps:
        for source in step.inputs():
            last[source] = step.index
    kept = {x for x in trace.program.outputs if isinstance(x, Step)}
    found: dict[int, list[Step]] = {}
    for source, index in last.items():
        if source not in kept:
            found.setdefault(index, []).append(source)
    return found
