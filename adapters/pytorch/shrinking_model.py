"""A model while its shape changes: what it is now, how it came to be, and the proof that it is right."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunus.adapters.pytorch import surgery
from prunus.adapters.pytorch.artifact import apply_plan
from prunus.adapters.pytorch.blocks import inside, remove_blocks
from prunus.adapters.pytorch.branching import (
    Exchange,
    branch_out,
    branched_convs,
    branched_graph,
    drop_branches,
    extra_macs,
    merge_branches,
    scale_branches,
    verify_merge,
    with_branches,
)
from prunus.adapters.pytorch.copies import copied
from prunus.adapters.pytorch.inputs import InputSpec
from prunus.adapters.pytorch.kernels import close_taps, find_kernels
from prunus.adapters.pytorch.lineage import kept_of, kept_places, kept_since, scattered, shapes_of
from prunus.adapters.pytorch.optimizer_state import adopt, carry_state, check_state, drop_state
from prunus.adapters.pytorch.structural_copy import structural_copy
from prunus.adapters.pytorch.tracing import Trace
from prunus.adapters.pytorch.verification import prepare, verify
from prunus.core.cost import CostTerm, IntArray
from prunus.core.directives import Gates, Grow, Verification
from prunus.core.graph import ChannelGraph, Keep
from prunus.core.plan import AttributeEdit, Branching, ModelSource, PruningPlan

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

    Everything is compared with the traced model, `base`: the original, or the grown one after a growth. While
    convolutions run as branches, plan, graph, base and every comparison are of the merged model; `wiring` is the
    graph of the model as it runs.
    """

    def __init__(
        self, model: nn.Module, origin: Origin, device: str, min_share: float = 0.0, multiple_of: int = 1
    ) -> None:
        """Traces and certifies `model`, which must be the whole original. Raises TraceError."""
        self.module, self.origin, self.device = model, origin, device
        self.optimizer: torch.optim.Optimizer | None = None
        self.companions: list[nn.Module] = []
        """Moving averages that the user keeps of the model."""
        self._branch_macs: float | None = 0.0
        """What branches take beyond the costs of the graph; None if it must be counted again."""
        self._look()
        graph = self._prepared.graph.with_floors(min_share, multiple_of)
        self._norm_after = find_kernels(model, graph, self.origin.input.example(2))
        self.original_graph = graph.with_kernels(self._norm_after)
        self.base = self.graph = self.wiring = self._merged_graph = self.original_graph
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
        """MACs of one forward pass of one image, through every branch."""
        if self._branch_macs is None:
            example = self.origin.input.example(1)
            inputs = tuple(x.to(self.device) if isinstance(x, Tensor) else x for x in example)
            self._branch_macs = extra_macs(self.module, inputs)
        return self.graph.cost().macs + self._branch_macs

    def add_terms(self, terms: Iterable[CostTerm]) -> None:
        """Further cost terms (latency) for the original graph and all that descend from it.

        Must come before anything is changed.
        """
        self.original_graph = self.original_graph.with_terms(terms)
        self.base = self.graph = self.wiring = self._merged_graph = self.original_graph

    def cut(
        self, model: nn.Module, keep: Keep, kernels: Collection[str] = ()
    ) -> tuple[list[AttributeEdit], surgery.Changes]:
        """Remove everything but `keep`, and all taps but one of `kernels`, from `model`.

        It has the current shape: this one, or a copy.
        """
        before = self.plan.kept_counts
        after = {**before, **{name: len(units) for name, units in keep.items()}}
        edits = self._prepared.bindings.edits(before, after)
        edits = [edit for edit in edits if not inside(edit.module, self.plan.removed_blocks)]
        return edits, surgery.remove(model, self.wiring, keep, edits, kernels)

    def extracted(
        self, keep: Keep, blocks: Collection[str] = (), kernels: Collection[str] = ()
    ) -> tuple[nn.Module, ChannelGraph]:
        """A copy that keeps `keep` alone, without `blocks` and taps of `kernels`, and its graph as it runs."""
        small = copied(self.module)
        self.cut(small, keep, kernels)
        remove_blocks(small, blocks)
        return small, self.wiring.restrict(keep).without_kernels(kernels).without_blocks(blocks)

    def narrowed(self, keep: Keep) -> nn.Module:
        """A copy that keeps `keep` alone and may share tensors with this model: to be looked at, not trained."""
        small = structural_copy(self.module)
        self.cut(small, keep)
        return small

    def remove(
        self,
        keep: Mapping[str, IntArray],
        blocks: Sequence[str] = (),
        kernels: Sequence[str] = (),
        *,
        verified: bool,
        seed: int,
    ) -> Verification:
        """Remove everything but `keep`, a checked plan for the current graph, and `blocks` as a whole.

        Of `kernels` one tap stays. Optimizer and averages follow.

        Raises VerificationError if the result is not the masked model (law 1), ConfigError, before anything is
        cut, if the optimizer cannot follow.
        """
        branches = [name for name in blocks if self.graph.block(name).of is not None]
        if branches:
            self._exchange(lambda model: (drop_branches(model, branches), []))
            blocks = [name for name in blocks if name not in branches]
        reference = self._reference(kernels) if verified else None
        narrow = self._narrow()
        cuts = {**self.wiring.kept_indices(keep), **self.wiring.kernel_indices(kernels)}
        self._check_optimizer(tensor for tensor, _ in cuts)
        edits, changes = self.cut(self.module, keep, kernels)
        gone = remove_blocks(self.module, blocks)
        for companion in self.companions:
            self.cut(companion, keep, kernels)
            remove_blocks(companion, blocks)
        if self.optimizer is not None:
            carry_state(self.optimizer, changes)
            drop_state(self.optimizer, gone)
        reduced = [*kernels, *narrow]
        merged = self._merged_graph
        self.plan = self.plan.after_removal(merged, keep, edits, blocks=blocks, kernels=reduced)
        self._become(merged.restrict(keep).without_kernels(reduced).without_blocks(blocks))
        if reference is None:
            return UNVERIFIED
        without = self.plan.removed_blocks
        return verify(
            self.merged()[0], self._prepared, reference, kept_of(self.plan), self._inputs(seed), without=without
        )

    def _check_optimizer(self, changed: Iterable[str]) -> None:
        """Raises ConfigError if what it keeps of the tensors `changed` cannot be re-indexed."""
        if self.optimizer is not None:
            tensors = dict(self.module.named_parameters(remove_duplicate=False))
            check_state(self.optimizer, {name: tensors[name] for name in changed if name in tensors})

    def _reference(self, kernels: Sequence[str]) -> dict[str, Tensor]:
        """The merged state in the shapes of the base; of `kernels`, and those reduced before, one tap is not 0."""
        reduced = [*self.plan.reduced(self.base), *self._narrow()]
        indices = {**self.base.kept_indices(kept_of(self.plan)), **self.base.kernel_indices(reduced)}
        state = scattered(self.merged()[0], self._shapes, indices)
        present = [name for name in (*reduced, *kernels) if self.base.kernel(name).tensor in state]
        close_taps(state, self.base, present)
        return state

    def _narrow(self) -> list[str]:
        """Convolutions whose branches have come to see one tap alone."""
        convs, kernels = branched_convs(self.module), self._merged_graph.kernels
        return [name for name, conv in convs.items() if conv.merged_size == 1 and name in kernels]

    def _inputs(self, seed: int) -> tuple[Any, ...]:
        example = self.origin.input.example(2, seed=seed)
        return tuple(x.to(self.device) if isinstance(x, Tensor) else x for x in example)

    # ---- branches ---------------------------------------------------------------------------------

    def branch(self, names: Sequence[str], seed: int) -> None:
        """Let the convolutions `names` run as branches; what the model computes in eval mode stays."""
        found = {kernel.name: (kernel, norm) for kernel, norm in self._norm_after.items()}
        branchings = {}
        for name in names:
            kernel, norm = found[name]
            conv = self.module.get_submodule(name)
            assert isinstance(conv, nn.Conv2d)
            branchings[name] = Branching(
                kinds=list(kernel.branches), inner=conv.in_channels, norm=norm if conv.bias is None else None
            )
        self._exchange(lambda model: branch_out(model, branchings, seed))

    def merge(self, seed: int, *, verified: bool) -> Verification:
        """Put one convolution in the place of all its branches. Raises VerificationError if they differ."""
        before = copied(self.module) if verified else None
        self._exchange(merge_branches)
        return UNVERIFIED if before is None else verify_merge(before, self.module, self._inputs(seed))

    def _exchange(self, change: Callable[[nn.Module], Exchange]) -> None:
        for companion in self.companions:
            change(companion)
        gone, new = change(self.module)
        if self.optimizer is not None:
            adopt(self.optimizer, new, {id(p): name for name, p in self.module.named_parameters()})
            drop_state(self.optimizer, gone)
        self._become(self._merged_graph)

    def _become(self, graph: ChannelGraph) -> None:
        """`graph`, that of the merged model, is what there is now; the branches are those of the module."""
        convs = branched_convs(self.module)
        self.plan = self.plan.branched({name: conv.branching for name, conv in convs.items()})
        self._merged_graph = graph
        self.wiring = branched_graph(graph, self.module)
        self.graph = with_branches(graph, self.wiring) if convs else graph
        self._branch_macs = None if convs else 0.0

    def merged(self, gates: Gates | None = None) -> tuple[nn.Module, Gates | None]:
        """The model with its branches merged, itself or a copy; and those of `gates` that are not in it yet."""
        if not self.plan.branches:
            return self.module, gates
        merged = copied(self.module)
        branches = {name for name, block in self.graph.blocks.items() if block.of is not None}
        scale_branches(merged, {name: float(g[0]) for name, g in (gates or {}).items() if name in branches})
        merge_branches(merged)
        return merged, gates and {name: g for name, g in gates.items() if name not in branches}

    # ---- growth -----------------------------------------------------------------------------------

    def grow(self, directive: Grow, seed: int) -> None:
        """Widen groups, or branch convolutions, without changing the function.

        Raises PlanError if the model has another shape than the original.
        """
        self.plan.check_growable()
        if directive.branches:
            self.branch(directive.branches, seed)
            return
        before, counts = self.graph, {**self.graph.units, **directive.widths}
        edits = self._prepared.bindings.edits(before.units, counts)
        widened = [group for name, group in before.groups.items() if name in directive.widths]
        self._check_optimizer(piece.tensor for group in widened for piece in group.slices)
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
        self.base = self.graph = self.wiring = self._merged_graph = graph
        self.base_plan = self.plan

    def since(self, earlier: PruningPlan, later: PruningPlan) -> tuple[ChannelGraph, dict[str, IntArray]]:
        """The graph of the model of `earlier`, and what `later` keeps of its units."""
        return self._graph_of(earlier), kept_since(earlier, later)

    def places(self, earlier: PruningPlan, later: PruningPlan) -> dict[str, tuple[IntArray | None, ...]]:
        """Of linear layers that run over channels, which of them `later` keeps in the model of `earlier`."""
        return kept_places(self.trace, earlier, later)

    def _graph_of(self, plan: PruningPlan) -> ChannelGraph:
        graph = self.base.restrict(kept_of(plan)).without_blocks(plan.removed_blocks)
        return graph.without_kernels(name for name in plan.reduced(self.base) if name in graph.kernels)

    def become(self, base_plan: PruningPlan, module: nn.Module, plan: PruningPlan) -> None:
        """Go on as `module`, whose plan is `plan`; `base_plan` tells how the original was grown before."""
        if base_plan.grow:
            self.module, self.plan = self.origin.build(self.origin.source), base_plan
            apply_plan(self.module, base_plan)
            self._rebase(self.original_graph.widen(base_plan.grow)[0])
        self.module, self.plan, self.optimizer = module, plan, None
        self._become(self._graph_of(plan))
