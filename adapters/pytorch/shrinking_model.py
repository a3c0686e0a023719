"""A model while its shape changes: what it is now, how it came to be, and the proof that it is right."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunus.adapters.pytorch import surgery
from prunus.adapters.pytorch.artifact import apply_plan
from prunus.adapters.pytorch.blocks import inside, remove_blocks
from prunus.adapters.pytorch.inputs import InputSpec
from prunus.adapters.pytorch.lineage import kept_of, kept_since, scattered, shapes_of
from prunus.adapters.pytorch.optimizer_state import carry_state, drop_state
from prunus.adapters.pytorch.structural_copy import structural_copy
from prunus.adapters.pytorch.tracing import Trace
from prunus.adapters.pytorch.verification import prepare, verify
from prunus.core.cost import CostTerm, IntArray
from prunus.core.directives import Grow, Verification
from prunus.core.graph import ChannelGraph, Keep
from prunus.core.plan import AttributeEdit, ModelSource, PruningPlan

UNVERIFIED = Verification("skipped", 0.0, 1.0)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where the model comes from: enough to make it again with fresh weights."""

    source: ModelSource
    input: InputSpec
    build: Callable[[ModelSource], nn.Module]
    provenance: Mapping[str, Any]


class ShrinkingModel:
    """The model, its graph and plan, and what must change shape with it: optimizer and averages.

    Everything is compared with the traced model, `base`: the original, or the grown one after a growth.
    """

    def __init__(
        self, model: nn.Module, origin: Origin, device: str, min_share: float = 0.0, multiple_of: int = 1
    ) -> None:
        """Traces and certifies `model`, which must be the whole original. Raises TraceError."""
        self.module, self.origin, self.device = model, origin, device
        self.optimizer: torch.optim.Optimizer | None = None
        self.companions: list[nn.Module] = []
        """Moving averages that the user keeps of the model."""
        self._look()
        self.original_graph = self._prepared.graph.with_floors(min_share, multiple_of)
        self.base = self.graph = self.original_graph
        provenance = {**origin.provenance, "fingerprint": self.original_graph.fingerprint}
        self.plan = self.base_plan = PruningPlan.begin(origin.source, self.original_graph, provenance).model_copy(
            update={"handlers": dict(self._prepared.handlers)}
        )
        self.module.to(device)

    def _look(self) -> None:
        self._prepared = prepare(self.module, self.origin.input.example(2))
        self._shapes = shapes_of(self.module)

    @property
    def trace(self) -> Trace:
        """The trace of the base."""
        return self._prepared.trace

    @property
    def forward_macs(self) -> float:
        """MACs of one forward pass of one image."""
        return self.graph.cost().macs

    def add_terms(self, terms: Iterable[CostTerm]) -> None:
        """Further cost terms (latency) for the original graph and all that descend from it.

        Must come before anything is changed.
        """
        self.base = self.graph = self.original_graph = self.original_graph.with_terms(terms)

    def cut(self, model: nn.Module, keep: Keep) -> tuple[list[AttributeEdit], surgery.Changes]:
        """Remove everything but `keep` from `model`, which has the current shape: this one, or a copy."""
        before = self.plan.kept_counts
        after = {**before, **{name: len(units) for name, units in keep.items()}}
        edits = self._prepared.bindings.edits(before, after)
        edits = [edit for edit in edits if not inside(edit.module, self.plan.removed_blocks)]
        return edits, surgery.remove(model, self.graph, keep, edits)

    def extracted(self, keep: Keep) -> tuple[nn.Module, ChannelGraph]:
        """A copy that keeps `keep` alone, and its graph."""
        small = copy.deepcopy(self.module)
        self.cut(small, keep)
        return small, self.graph.restrict(keep)

    def narrowed(self, keep: Keep) -> nn.Module:
        """A copy that keeps `keep` alone and may share tensors with this model: to be looked at, not trained."""
        small = structural_copy(self.module)
        self.cut(small, keep)
        return small

    def remove(
        self, keep: Mapping[str, IntArray], blocks: Sequence[str] = (), *, verified: bool, seed: int
    ) -> Verification:
        """Remove everything but `keep`, a checked plan for the current graph, and `blocks` as a whole.

        Optimizer and averages follow.

        Raises VerificationError if the result is not the masked model (law 1).
        """
        reference = scattered(self.module, self._shapes, self.base, kept_of(self.plan)) if verified else None
        edits, changes = self.cut(self.module, keep)
        gone = remove_blocks(self.module, blocks)
        for companion in self.companions:
            self.cut(companion, keep)
            remove_blocks(companion, blocks)
        if self.optimizer is not None:
            carry_state(self.optimizer, changes)
            drop_state(self.optimizer, gone)
        self.plan = self.plan.after_removal(self.graph, keep, edits, blocks=blocks)
        self.graph = self.graph.restrict(keep).without_blocks(blocks)
        if reference is None:
            return UNVERIFIED
        example = self.origin.input.example(2, seed=seed)
        inputs = tuple(x.to(self.device) if isinstance(x, Tensor) else x for x in example)
        without = self.plan.removed_blocks
        return verify(self.module, self._prepared, reference, kept_of(self.plan), inputs, without=without)

    def grow(self, directive: Grow, seed: int) -> None:
        """Widen groups without changing the function. Raises PlanError if it has changed already."""
        self.plan.check_growable()
        before, counts = self.graph, {**self.graph.units, **directive.widths}
        edits = self._prepared.bindings.edits(before.units, counts)
        for model in (*self.companions, self.module):
            wider, growth, changes = surgery.grow(
                model, before, directive.widths, seed=seed, noise=directive.noise, edits=edits
            )
        if self.optimizer is not None:
            carry_state(self.optimizer, changes)
        self.plan = self.plan.after_growth(before, growth, edits)
        self._rebase(wider)

    def _rebase(self, graph: ChannelGraph) -> None:
        """From now on the model as it is, whose graph is `graph`, is what removals are compared with."""
        self.module.to("cpu")
        self._look()
        self.module.to(self.device)
        self.base = self.graph = graph
        self.base_plan = self.plan

    def since(self, earlier: PruningPlan, later: PruningPlan) -> tuple[ChannelGraph, dict[str, IntArray]]:
        """The graph of the model of `earlier`, and what `later` keeps of its units."""
        return self._graph_of(earlier), kept_since(earlier, later)

    def _graph_of(self, plan: PruningPlan) -> ChannelGraph:
        return self.base.restrict(kept_of(plan)).without_blocks(plan.removed_blocks)

    def become(self, base_plan: PruningPlan, module: nn.Module, plan: PruningPlan) -> None:
        """Go on as `module`, whose plan is `plan`; `base_plan` tells how the original was grown before."""
        if base_plan.grow:
            self.module, self.plan = self.origin.build(self.origin.source), base_plan
            apply_plan(self.module, base_plan)
            self._rebase(self.original_graph.widen(base_plan.grow)[0])
        self.module, self.plan, self.optimizer = module, plan, None
        self.graph = self._graph_of(plan)
