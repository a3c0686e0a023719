"""The report of a finished run, as data: report.json, `--json`, the tables and the page are made from it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from prunus.core.adapter import Description
from prunus.core.budget import Budget
from prunus.core.cost import Cost
from prunus.core.directives import Verification
from prunus.core.graph import ChannelGraph
from prunus.core.history import History
from prunus.core.latency_target import LatencyResult
from prunus.core.settings import RunSettings


class Size(BaseModel):
    """A model's cost, and its top-1 accuracy on test (0..1; None if it was not measured)."""

    model_config = ConfigDict(extra="forbid")
    macs: int
    params: int
    bytes: int
    accuracy: float | None = None

    @classmethod
    def of(cls, cost: Cost, accuracy: float | None) -> Size:
        return cls(macs=round(cost.macs), params=round(cost.params), bytes=round(cost.bytes), accuracy=accuracy)


class Checked(BaseModel):
    """The largest difference between masked and pruned outputs over all removals, and the outputs' scale."""

    model_config = ConfigDict(extra="forbid")
    kind: Literal["exact", "skipped"]
    max_error: float
    scale: float


class Width(BaseModel):
    """One channel group before and after."""

    model_config = ConfigDict(extra="forbid")
    name: str
    units: int
    kept: int
    locked: str | None = None


class Depth(BaseModel):
    """Whole layers: residual blocks that could go and kernels that could shrink, and those that did."""

    model_config = ConfigDict(extra="forbid")
    blocks: int = 0
    removed: list[str] = Field(default_factory=list)
    kernels: int = 0
    reduced: list[str] = Field(default_factory=list)
    """Convolutions that have one tap left."""

    @classmethod
    def between(cls, dense: ChannelGraph, pruned: ChannelGraph) -> Depth:
        return cls(
            blocks=len(dense.blocks),
            removed=[name for name in dense.blocks if name not in pruned.blocks],
            kernels=len(dense.kernels),
            reduced=[
                name
                for name, kernel in dense.kernels.items()
                if name not in pruned.kernels and kernel.tensor in pruned.tensors
            ],
        )


class Layer(BaseModel):
    """The weights of one layer before and after."""

    model_config = ConfigDict(extra="forbid")
    name: str
    before: tuple[int, ...]
    """Shape."""
    after: tuple[int, ...] | None
    """None where its block went."""
    axis: int = 0
    """Of its outputs."""

    @classmethod
    def between(cls, dense: ChannelGraph, pruned: ChannelGraph) -> list[Layer]:
        """All that make or take channels, in the order the model uses them."""
        outputs: dict[str, int] = {}
        for (tensor, axis), slices in dense.slices_of.items():
            roles = {piece.role for _, piece in slices}
            made, read = bool(roles & {"writes", "scales"}), "reads" in roles
            is_weight = axis == 0 or read or tensor in outputs  # neither a bias nor a position embedding
            if len(dense.tensors[tensor]) > 1 and is_weight and (made or tensor not in outputs):
                outputs[tensor] = axis if made else 0
        return [
            cls(name=name, before=dense.tensors[name], after=pruned.tensors.get(name), axis=axis)
            for name, axis in outputs.items()
        ]


class Report(BaseModel):
    """Everything there is to say about a finished run."""

    model_config = ConfigDict(extra="ignore")
    schema_: Literal[1] = Field(default=1, alias="schema")
    run: str
    model: str
    plugin: str
    targets: list[str]
    target_met: bool
    limits: dict[str, float]
    """The targets as absolute upper limits."""
    dense: Size
    pruned: Size
    verification: Checked
    seconds: float
    training_macs: float
    latency: LatencyResult | None = None
    """Where a target asked for it."""
    data: str
    input_size: tuple[int, int, int]
    classes: int | None
    images: dict[str, int]
    widths: list[Width]
    depth: Depth = Field(default_factory=Depth)
    layers: list[Layer] = Field(default_factory=list)
    history: list[dict[str, Any]]
    settings: dict[str, Any]
    versions: dict[str, str]
    notes: list[str]

    def for_scripts(self) -> dict[str, Any]:
        """What `prune --json` prints: the report without its long lists."""
        return self.model_dump(mode="json", by_alias=True, exclude={"history", "widths", "layers", "settings"})


def make_report(
    *,
    run: str,
    settings: RunSettings,
    description: Description,
    budget: Budget,
    dense: ChannelGraph,
    pruned: ChannelGraph,
    dense_accuracy: float | None,
    pruned_accuracy: float | None,
    history: History,
    seconds: float,
    latency: LatencyResult | None = None,
) -> Report:
    """`dense` is the original model's graph, `pruned` the final one; `seconds` is the whole run's time."""
    worst = history.verification or Verification("skipped", 0.0, 0.0)
    after = pruned.units
    widths = [
        Width(name=name, units=group.units, kept=after.get(name, 0), locked=group.locked)
        for name, group in dense.groups.items()
    ]
    return Report(
        run=run,
        model=description.model,
        plugin=settings.plugin,
        targets=list(settings.targets),
        target_met=_met(budget, pruned, latency),
        limits={quantity: float(limit) for quantity, limit in budget.limits.items()},
        dense=Size.of(dense.cost(), dense_accuracy),
        pruned=Size.of(pruned.cost(), pruned_accuracy),
        verification=Checked(kind=worst.kind, max_error=worst.max_error, scale=worst.scale),
        seconds=round(seconds, 3),
        training_macs=history.training_macs,
        latency=latency,
        data=description.data,
        input_size=description.input_size,
        classes=description.classes,
        images=dict(description.images),
        widths=widths,
        depth=Depth.between(dense, pruned),
        layers=Layer.between(dense, pruned),
        history=history.rows,
        settings=settings.model_dump(mode="json", exclude={"trust"}),
        versions=dict(description.versions),
        notes=[*description.notes, *history.notes],
    )


def _met(budget: Budget, pruned: ChannelGraph, latency: LatencyResult | None) -> bool:
    """Latency counts as it was measured, everything else as it was counted."""
    cost = pruned.cost()
    return budget.met(cost if latency is None else replace(cost, latency=latency.pruned))
