"""A channel graph as plain data and back: what the journal and other processes hold of it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from prunus.core.blocks import Block
from prunus.core.cost import CostTerm, Extent, IntArray, Quantity
from prunus.core.errors import PlanError
from prunus.core.graph import ChannelGraph, ChannelGroup, Role, Slice
from prunus.core.kernels import Kernel

_Name = Annotated[str, Field(max_length=512)]
_Count = Annotated[int, Field(ge=0, lt=2**40)]


class _SliceRecord(BaseModel):
    model_config = ConfigDict(extra="forbid")
    tensor: _Name
    axis: Annotated[int, Field(ge=0, lt=16)]
    role: Role
    length: _Count


class _GroupRecord(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: _Name
    units: _Count
    slices: list[_SliceRecord]
    min_units: _Count
    multiple_of: Annotated[int, Field(ge=1, lt=2**20)]
    equal_count: str | None
    exact: bool
    locked: str | None
    gateable: bool


class _ExtentRecord(BaseModel):
    model_config = ConfigDict(extra="forbid")
    constant: int
    terms: list[tuple[int, list[_Name]]]


class _TermRecord(BaseModel):
    model_config = ConfigDict(extra="forbid")
    quantity: Quantity
    source: _Name
    coefficient: int | Annotated[float, Field(allow_inf_nan=False)]
    extents: list[_ExtentRecord]


class _BlockRecord(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: _Name
    tensors: list[_Name]
    sources: list[_Name]
    of: _Name | None = None


class _KernelRecord(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: _Name
    tensor: _Name
    size: Annotated[int, Field(ge=2, le=1024)]
    branches: list[_Name]


class GraphRecord(BaseModel):
    """A `ChannelGraph` without its index arrays: those lie concatenated beside it, in the order of the slices."""

    model_config = ConfigDict(extra="forbid")
    groups: list[_GroupRecord]
    terms: list[_TermRecord]
    tensors: dict[_Name, list[_Count]]
    blocks: list[_BlockRecord] = Field(default_factory=list)
    kernels: list[_KernelRecord] = Field(default_factory=list)


def record_graph(graph: ChannelGraph) -> tuple[GraphRecord, IntArray]:
    """The record and every slice's `unit_of`, one after the other."""
    groups: list[dict[str, Any]] = []
    indices: list[IntArray] = []
    for group in graph.groups.values():
        slices = []
        for piece in group.slices:
            length = len(piece.unit_of)
            slices.append({"tensor": piece.tensor, "axis": piece.axis, "role": piece.role, "length": length})
            indices.append(np.asarray(piece.unit_of, dtype=np.int64))
        groups.append(
            {
                "name": group.name,
                "units": group.units,
                "slices": slices,
                "min_units": group.min_units,
                "multiple_of": group.multiple_of,
                "equal_count": group.equal_count,
                "exact": group.exact,
                "locked": group.locked,
                "gateable": group.gateable,
            }
        )
    terms = [asdict(term) for term in graph.terms]
    blocks = [
        {"name": b.name, "tensors": sorted(b.tensors), "sources": sorted(b.sources), "of": b.of}
        for b in graph.blocks.values()
    ]
    kernels = [asdict(kernel) for kernel in graph.kernels.values()]
    record = GraphRecord.model_validate(
        {"groups": groups, "terms": terms, "tensors": graph.tensors, "blocks": blocks, "kernels": kernels}
    )
    joined = np.concatenate(indices) if indices else np.zeros(0, dtype=np.int64)
    return record, joined


def rebuild_graph(record: GraphRecord, indices: IntArray) -> ChannelGraph:
    """The graph of a record. Raises PlanError if the index array does not fit it."""
    if sum(piece.length for group in record.groups for piece in group.slices) != len(indices):
        raise PlanError(f"a graph record does not fit its {len(indices)} indices")
    groups, at = [], 0
    for group in record.groups:
        slices = []
        for piece in group.slices:
            unit_of = np.array(indices[at : at + piece.length], dtype=np.int64)
            at += piece.length
            if len(unit_of) and not (unit_of.min() >= -1 and unit_of.max() < group.units):
                raise PlanError(f"group {group.name!r}: a recorded unit is out of range", group=group.name)
            slices.append(Slice(piece.tensor, piece.axis, piece.role, unit_of))
        fields = group.model_dump(exclude={"slices"})
        groups.append(ChannelGroup(**fields, slices=tuple(slices)))
    terms = [
        CostTerm(term.quantity, term.source, term.coefficient, tuple(_extent(e) for e in term.extents))
        for term in record.terms
    ]
    blocks = [Block(b.name, frozenset(b.tensors), frozenset(b.sources), b.of) for b in record.blocks]
    kernels = [Kernel(k.name, k.tensor, k.size, tuple(k.branches)) for k in record.kernels]
    return ChannelGraph(groups, terms, record.tensors, blocks, kernels)


def _extent(record: _ExtentRecord) -> Extent:
    return Extent(record.constant, tuple((factor, tuple(groups)) for factor, groups in record.terms))
