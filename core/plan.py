"""The pruning plan: what was kept, as data that rebuilds the model without tracing."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from prunus.core.cost import IntArray
from prunus.core.errors import PlanError
from prunus.core.graph import Axis, ChannelGraph, Keep
from prunus.core.growth import Growth

_Index = Annotated[int, Field(ge=0, lt=2**31)]
_Name = Annotated[str, Field(max_length=512)]
Scalar = int | float | bool | str | None
Value = Scalar | tuple[Scalar | tuple[Scalar, ...], ...]
"""What a Python attribute may hold; lists travel as tuples and stay lists in the module."""


UNNAMED = "object:"
"""Begins the name of a model that was given as an object, in Python; its class follows, for the reader."""


class AttributeEdit(BaseModel):
    """A Python attribute that must follow the tensors: `module.attribute` goes from `old` to `new`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    module: _Name
    attribute: _Name
    old: Value
    new: Value


class ModelSource(BaseModel):
    """How the original model is built by name."""

    model_config = ConfigDict(extra="forbid")
    name: _Name
    kwargs: dict[str, Any] = Field(default_factory=dict)


class Branching(BaseModel):
    """A convolution that runs as parallel branches, for as long as a method searches among them."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kinds: list[_Name]
    """The branches that are left, in the order in which they are summed."""
    inner: int
    """Channels between the two convolutions of a branch that has two."""
    norm: _Name | None
    """The batch norm that takes the convolution's output, if the convolution has no bias to hold a constant."""


class PruningPlan(BaseModel):
    """For each group the kept units, in the coordinates of the original (grown) model."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    schema_: Literal[1] = Field(default=1, alias="schema")
    model: ModelSource
    grow: dict[_Name, _Index] = Field(default_factory=dict)
    """group -> width after growth; units from the original width on are copies."""
    keep: dict[_Name, list[_Index]] = Field(default_factory=dict)
    axes: dict[_Name, dict[_Index, list[_Index]]] = Field(default_factory=dict)
    """tensor -> axis -> the original indices that are left, as flattened half-open runs (start, stop, ...)."""
    attributes: list[AttributeEdit] = Field(default_factory=list)
    handlers: dict[_Name, _Name] = Field(default_factory=dict)
    """module -> name of the registered handler whose forward reads its sizes from attributes."""
    removed_blocks: list[_Name] = Field(default_factory=list)
    """Blocks that are gone, in the order in which they went; their groups stay in `keep` as they last were."""
    branches: dict[_Name, Branching] = Field(default_factory=dict)
    """convolution -> the branches that it runs as; empty in every finished plan, where they are merged."""
    provenance: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> PruningPlan:
        for name, units in self.keep.items():
            if any(b <= a for a, b in itertools.pairwise(units)):
                raise ValueError(f"group {name!r}: kept units must be strictly increasing")
        for tensor, axes in self.axes.items():
            for axis, runs in axes.items():
                if len(runs) % 2 or any(stop <= start for start, stop in zip(runs[::2], runs[1::2], strict=True)):
                    raise ValueError(f"tensor {tensor!r}, axis {axis}: runs must be pairs start < stop")
        return self

    @classmethod
    def begin(cls, model: ModelSource, graph: ChannelGraph, provenance: Mapping[str, Any]) -> PruningPlan:
        """The plan that changes nothing."""
        keep = {name: list(range(units)) for name, units in graph.units.items()}
        return cls(model=model, keep=keep, provenance=dict(provenance))

    def indices(self) -> dict[Axis, IntArray]:
        """For every changed axis: the original index of each index that is left."""
        return {
            (tensor, axis): _from_runs(runs) for tensor, axes in self.axes.items() for axis, runs in axes.items()
        }

    def check_growable(self) -> None:
        """Raises PlanError if the model has another shape than the original."""
        if self.axes or self.removed_blocks or self.branches:
            raise PlanError("a model can be grown once, and only before anything is removed from it")

    def after_growth(
        self,
        graph: ChannelGraph,
        growth: Growth,
        attributes: Sequence[AttributeEdit] = (),
        handlers: Mapping[str, str] | None = None,
    ) -> PruningPlan:
        """The plan after widening `graph` (the graph before). Raises PlanError as `check_growable` does."""
        self.check_growable()
        grow, keep = dict(self.grow), dict(self.keep)
        for name, copied in growth.copies.items():
            grow[name] = graph.units[name] + len(copied)
            keep[name] = list(range(grow[name]))
        return self._changed(growth.sources, attributes, handlers, grow=grow, keep=keep)

    def after_removal(
        self,
        graph: ChannelGraph,
        keep: Keep,
        attributes: Sequence[AttributeEdit] = (),
        handlers: Mapping[str, str] | None = None,
        blocks: Sequence[str] = (),
        kernels: Sequence[str] = (),
    ) -> PruningPlan:
        """The plan after keeping `keep` of `graph` (the graph before, whose units are this plan's kept ones).

        `blocks` go as a whole, of `kernels` one tap stays. Raises PlanError if one breaks a rule of the graph.
        """
        for name in blocks:
            graph.block(name)
        sources = {**graph.kept_indices(graph.check_keep(keep)), **graph.kernel_indices(kernels)}
        checked = graph.check_keep(keep)
        kept = {name: [self.keep[name][int(i)] for i in units] for name, units in checked.items()}
        removed = [*self.removed_blocks, *blocks]
        return self._changed(sources, attributes, handlers, keep={**self.keep, **kept}, removed_blocks=removed)

    def branched(self, branches: Mapping[str, Branching]) -> PruningPlan:
        """The plan of the same model whose convolutions `branches` run as branches."""
        return self.model_copy(update={"branches": dict(branches)})

    def reduced(self, graph: ChannelGraph) -> list[str]:
        """Names of the kernels of `graph`, the graph of the original, of which one tap is left."""
        return [name for name, kernel in graph.kernels.items() if 2 in self.axes.get(kernel.tensor, {})]

    def _changed(
        self,
        sources: Mapping[Axis, IntArray],
        attributes: Sequence[AttributeEdit],
        handlers: Mapping[str, str] | None,
        **fields: Any,
    ) -> PruningPlan:
        before = self.indices()
        axes = {tensor: dict(runs) for tensor, runs in self.axes.items()}
        for (tensor, axis), source in sources.items():
            old = before.get((tensor, axis))
            axes.setdefault(tensor, {})[axis] = _to_runs(source if old is None else old[source])
        return self.model_copy(
            update={
                "axes": axes,
                "attributes": _merged(self.attributes, attributes),
                "handlers": {**self.handlers, **(handlers or {})},
                **fields,
            }
        )

    @property
    def kept_counts(self) -> dict[str, int]:
        return {name: len(units) for name, units in self.keep.items()}


def _merged(first: Sequence[AttributeEdit], then: Sequence[AttributeEdit]) -> list[AttributeEdit]:
    merged = {(e.module, e.attribute): e for e in first}
    for edit in then:
        earlier = merged.get((edit.module, edit.attribute))
        merged[edit.module, edit.attribute] = (
            edit if earlier is None else edit.model_copy(update={"old": earlier.old})
        )
    return list(merged.values())


def _to_runs(indices: IntArray) -> list[int]:
    if not len(indices):
        return []
    breaks = np.flatnonzero(np.diff(indices) != 1) + 1
    starts = indices[np.concatenate([[0], breaks])]
    stops = indices[np.concatenate([breaks - 1, [len(indices) - 1]])] + 1
    return [int(v) for pair in zip(starts, stops, strict=True) for v in pair]


def _from_runs(runs: Sequence[int]) -> IntArray:
    if not runs:
        return np.zeros(0, dtype=np.int64)
    return np.concatenate([np.arange(a, b, dtype=np.int64) for a, b in zip(runs[::2], runs[1::2], strict=True)])
