"""The reference of law 1: interprets a captured forward pass with units masked, or removed.

Both modes run the operators of the original model, nothing else is trusted:

    mask   original tensors; operands of contractions are zero at dead indices; statistics (norms, means)
           run over the living indices alone
    prune  restricted tensors, literals re-derived from kept counts

In both, blocks can be without effect: zeros stand where their branches join the trunk.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from prunus.adapters.pytorch.tracing.labelling import Contraction
from prunus.adapters.pytorch.tracing.program import Step, call, steps_in
from prunus.adapters.pytorch.tracing.restriction import Number, Restriction, with_numbers
from prunus.adapters.pytorch.tracing.trace import Trace
from prunus.core.errors import TraceError

Mode = Literal["mask", "prune"]


class Oracle:
    """One plan, in one mode, on any number of inputs."""

    def __init__(
        self,
        trace: Trace,
        tensors: Mapping[str, Tensor],
        keep: Mapping[str, Sequence[int]],
        mode: Mode,
        without: Collection[str] = (),
    ) -> None:
        self._trace = trace
        self._mode = mode
        self._cuts = dict(cut for name in without for cut in trace.residuals[name].cuts)
        self._needed = _needed(trace, without)
        self._tensors = {**trace.program.constants, **tensors}
        kept = trace.graph.check_keep({n: np.asarray(u, dtype=np.int64) for n, u in keep.items()})
        self._restriction = Restriction(lambda ids: trace.grouping.alive(ids, kept))
        counts = {name: len(units) for name, units in kept.items()}
        self._numbers: dict[int, list[Number]] = {}
        for site in trace.sites:
            number = (site.argument, site.position, round(site.extent.at(counts)))
            self._numbers.setdefault(site.step, []).append(number)
        self._contracted: dict[int, list[Contraction]] = {}
        for contraction in trace.contractions:
            self._contracted.setdefault(contraction.step.index, []).append(contraction)
        self._last_use = _last_uses(trace)

    def run(self, inputs: Any) -> Any:
        """`inputs` is a tensor or the tuple of positional arguments; larger batches run in parts."""
        if self._trace.program.concrete:
            raise TraceError(
                "the forward pass depends on its input's values, so its recording holds for one input alone; "
                "use masked_call with the model"
            )
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
        leaves = pytree.tree_leaves(args)
        for step, value in zip(program.inputs, leaves, strict=True):
            if step is not None:
                values[step] = value
        for step in program.steps:
            if step not in self._needed:
                pass
            elif step.op == "tensor":
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
            return self._restriction.restrict(value, self._trace.labels[step])
        return value

    def _call(self, step: Step, values: Mapping[Step, Any]) -> Any:
        branch = self._cuts.get(step.index)
        arguments = {name: _resolve(x, values) for name, x in step.arguments.items() if name != branch}
        if branch is not None:
            trunk = next(x for x in arguments.values() if isinstance(x, Tensor))
            arguments = {name: arguments.get(name, torch.zeros_like(trunk)) for name in step.arguments}
        numbers, labels = self._numbers.get(step.index, []), self._trace.labels
        if self._mode == "prune":
            return self._checked(step, self.execute(step, _unaliased(step, with_numbers(arguments, numbers))))
        if step in self._trace.statistics:
            sources = {n: labels[x] for n, x in step.arguments.items() if isinstance(x, Step)}
            return self._restriction.call(step, arguments, sources, labels[step], numbers)
        for contraction in self._contracted.get(step.index, ()):
            self._restriction.zero(arguments, contraction)
        return call(step, _unaliased(step, arguments))

    def execute(self, step: Step, arguments: dict[str, Any]) -> Any:
        """One operator of a pruned pass; what times operators overrides it."""
        return call(step, arguments)

    def _checked(self, step: Step, result: Any) -> Any:
        """A pruned result must have the length that its labels promise."""
        if isinstance(result, Tensor) and isinstance(step.shapes, tuple):
            for axis, ids in enumerate(self._trace.labels[step]):
                expected = step.shape[axis] if ids is None else self._restriction.count(ids)
                if result.shape[axis] != expected:
                    raise TraceError(
                        f"{step.op} in {step.where()}: axis {axis} has {result.shape[axis]} entries after "
                        f"removal, {expected} were expected",
                        node=step.op,
                    )
        return result


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
    outside = ("tensor", "input", "constant")
    copied = dict(arguments)
    for name, value in arguments.items():
        source = step.arguments[name]
        if isinstance(value, Tensor) and isinstance(source, Step) and source.op in outside:
            copied[name] = value.clone()
    return copied


def _needed(trace: Trace, without: Collection[str]) -> set[Step]:
    """Everything but what goes on inside of the blocks `without`: their branches are cut.

    Elsewhere a step counts even if no step reads its result: it may write into a tensor that one reads.
    """
    cuts = dict(cut for name in without for cut in trace.residuals[name].cuts)
    owned = frozenset[str]().union(*(trace.residuals[name].block.sources for name in without))
    stack = [x for x in trace.program.steps if x.target is not None and x.owner not in owned]
    stack += [x for x in trace.program.outputs if isinstance(x, Step)]
    found: set[Step] = set()
    while stack:
        step = stack.pop()
        if step in found:
            continue
        found.add(step)
        branch = cuts.get(step.index)
        for name, value in step.arguments.items():
            if name != branch:
                stack.extend(steps_in(value))
    return found


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
