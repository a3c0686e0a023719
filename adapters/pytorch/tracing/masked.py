"""The model's own forward pass with units masked: any batch, any resolution, any path through the code.

Where the recorded program is true for one input alone (detection models ask for values), or an input of
another size is wanted, the Python code itself runs, and every operator is masked as it goes by: operands of
contractions are zero at dead indices, statistics run over the living. Labels come from the finished graph,
so a coupling that the graph does not know shows up as a contradiction, and raises.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from prunus.adapters.pytorch.tracing.capture import as_found
from prunus.adapters.pytorch.tracing.labelling import Label, Labelling
from prunus.adapters.pytorch.tracing.program import Step, call
from prunus.adapters.pytorch.tracing.recorder import Recorder
from prunus.adapters.pytorch.tracing.restriction import Restriction
from prunus.adapters.pytorch.tracing.variables import TRUE, Variables
from prunus.core.cost import IntArray
from prunus.core.errors import TraceError
from prunus.core.graph import ChannelGraph

Observer = Callable[[Step, Mapping[str, Any], Any], object]
"""Called with an operator, its arguments by name and its masked result."""


def masked_call(
    model: nn.Module,
    graph: ChannelGraph,
    keep: Mapping[str, Sequence[int]],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    observe: Observer | None = None,
) -> Any:
    """What `model` (whole, in eval mode) computes when only `keep` lives; `observe` sees every operator.

    Raises TraceError if this call couples channels in a way that `graph` does not know.
    """
    with as_found(model, training=False), torch.no_grad():
        recorder = _Masking(model, graph, keep, observe)
        with recorder.watching():
            result: Any = model(*args, **(kwargs or {}))
    recorder.check()
    return result


class _Masking(Recorder):
    """Masks each operator as it is recorded."""

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        keep: Mapping[str, Sequence[int]],
        observe: Observer | None = None,
    ) -> None:
        super().__init__(model)
        self._observe = observe
        self._labelling = Labelling()
        self._units = _unit_variables(self._labelling, graph)
        self._kept = graph.check_keep(keep)

    def _completed(self, step: Step, arguments: dict[str, Any], result: Any) -> Any:
        result = self._masked(step, arguments, result)
        if self._observe is not None:
            self._observe(step, arguments, result)
        return result

    def _masked(self, step: Step, arguments: dict[str, Any], result: Any) -> Any:
        labelling = self._labelling
        before = len(labelling.contractions), len(labelling.literals)
        labelling.add_with_sources(step)
        contractions = labelling.contractions[before[0] :]
        literals = labelling.literals[before[1] :]
        restriction = Restriction(self._living)
        if step in labelling.statistics:
            sources = {n: labelling.of(x) for n, x in step.arguments.items() if isinstance(x, Step)}
            numbers = [(x.argument, x.position, restriction.count(x.ids)) for x in literals]
            return restriction.call(step, arguments, sources, labelling.of(step), numbers)
        if all(restriction.indices(x.ids) is None for x in contractions):
            return result
        zeroed = dict(arguments)
        for contraction in contractions:
            restriction.zero(zeroed, contraction)
        return call(step, zeroed)

    def _living(self, ids: IntArray) -> np.ndarray:
        return np.asarray(~self._dead()[self._labelling.variables.leaves(ids)].any(axis=1))

    def _dead(self) -> np.ndarray:
        variables = self._labelling.variables
        dead = np.zeros(variables.count, dtype=bool)
        for name, units in self._units.items():
            gone = np.delete(units, self._kept[name])
            dead[variables.roots(gone)] = True
        dead[TRUE] = False
        return dead

    def check(self) -> None:
        """Units are still independent of each other, and nothing dead was found to be needed."""
        variables = self._labelling.variables
        units = np.concatenate([np.zeros(0, dtype=np.int64), *self._units.values()])
        if len(np.unique(variables.roots(units))) != len(units):
            raise TraceError("this input couples channels that were independent while tracing; trace with it")
        dead = self._dead()
        needed = {leaf: reason for leaf, reason in variables.locked().items() if dead[leaf]}
        if needed:
            raise TraceError(
                f"a removed unit is needed on this input: {next(iter(needed.values()))}; trace with this input",
                locks={
                    name: reason
                    for leaf, reason in needed.items()
                    for name, ids in self._units.items()
                    if (variables.roots(ids) == leaf).any()
                },
            )


def _unit_variables(labelling: Labelling, graph: ChannelGraph) -> dict[str, IntArray]:
    """One variable per unit of every group that may shrink, and the labels of all tensors in terms of them."""
    variables = labelling.variables
    units = {name: variables.fresh(g.units) for name, g in graph.groups.items() if g.locked is None}
    for name, shape in graph.tensors.items():
        labelling.tensors[name] = [_axis_label(variables, graph, units, name, a) for a in range(len(shape))]
    return units


def _axis_label(
    variables: Variables, graph: ChannelGraph, units: Mapping[str, IntArray], tensor: str, axis: int
) -> Label:
    ids: Label = None
    for name, piece in graph.slices_of.get((tensor, axis), ()):
        if name in units:
            own = np.where(piece.unit_of < 0, TRUE, units[name][piece.unit_of])
            ids = own if ids is None else variables.both(ids, own)
    return ids
