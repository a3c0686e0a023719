"""A trace is believed only once the Python model has been pruned by it and found right.

The graph of a trace is proven on the captured program; the original Python forward may still hard-code a
number that no attribute and no handler governs. `certify` tries random removals on copies, and locks the
groups that the forward cannot follow, with what went wrong as the reason.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunus.adapters.pytorch.attributes import Bindings
from prunus.adapters.pytorch.comparison import SAME_OPERATORS, compare, distance, follows_program, state_of
from prunus.adapters.pytorch.equal_counts import with_locks
from prunus.adapters.pytorch.random_state import seeded
from prunus.adapters.pytorch.structural_copy import expressive_copy, separate_copy, structural_copy
from prunus.adapters.pytorch.surgery import remove
from prunus.adapters.pytorch.tracing import Trace, trace_model, with_batch
from prunus.adapters.pytorch.tracing.modes import asks_for_mode, same_values
from prunus.core.errors import PrunusError, TraceError, VerificationError
from prunus.core.graph import ChannelGraph, Keep

SEEDS = (0, 1)
LEAST, MOST = 0.25, 0.95
ROUNDING = 1e-2
"""Differences up to this share of the largest output may come from rounding in a deep model."""
EXPENSIVE = 2e10
"""MACs of one pass beyond which smaller images are tried: several passes are needed, at seconds each."""
REDUCTIONS = (4, 2)
SMALLEST = 64


def certify(
    model: nn.Module, trace: Trace, bindings: Bindings, args: tuple[Any, ...], seeds: Sequence[int] = SEEDS
) -> ChannelGraph:
    """The graph of `trace` with everything locked that the forward of `model` cannot follow.

    Every group is given its own random share of units; where that fails, groups are added back in
    halves until those at fault are found. `model` is not changed. What the code hard-codes about channels
    it does at every resolution, so large images are made smaller where the model takes that; and whatever
    its weights are, so that zeros of a fresh model are filled. Raises TraceError for a model that answers
    differently each time, because it changes its buffers in eval mode.
    """
    if not trace.program.concrete:  # what was recorded on values may take another way on others
        model = expressive_copy(model)
    probe = _Probe(model, *_affordable(model, trace, args), bindings)
    locks: dict[str, str] = {}
    while True:
        graph = with_locks(trace.graph, locks)
        items = _items(graph)
        failing = next(((seed, fault) for seed in seeds if (fault := probe.fault(graph, items, seed))), None)
        if failing is None or not items:
            return graph
        seed, fault = failing
        found = {name: reason for name, reason in fault.locks.items() if name in graph.prunable}
        locks.update(found or probe.culprits(graph, items, seed, fault))


def random_keep(graph: ChannelGraph, seed: int, names: Sequence[str] | None = None) -> dict[str, list[int]]:
    """A random 25-95% of the units of each group (of `names`; all by default), as the graph allows."""
    rng = np.random.default_rng(seed)
    keep: dict[str, list[int]] = {}
    shares: dict[str, float] = {}
    for name, group in graph.groups.items():
        share = rng.uniform(LEAST, MOST)
        order = rng.permutation(group.units)
        if group.min_kept >= group.units or (names is not None and name not in names):
            continue
        if group.equal_count is not None:
            share = shares.setdefault(group.equal_count, share)
        floor = max(graph.groups[n].min_kept for n in graph.equal_counts.get(group.equal_count or "", (name,)))
        count = max(int(share * group.units) // group.multiple_of * group.multiple_of, floor)
        keep[name] = sorted(int(unit) for unit in order[:count])
    return keep


def _affordable(model: nn.Module, trace: Trace, args: tuple[Any, ...]) -> tuple[Trace, tuple[Any, ...]]:
    """`trace` and `args`, or the same at a lower resolution: where one pass is expensive and nothing is lost."""
    if trace.program.concrete or trace.graph.cost().macs <= EXPENSIVE:
        return trace, args
    for factor in REDUCTIONS:
        smaller = tuple(_reduced(x, factor) if isinstance(x, Tensor) and x.dim() >= 4 else x for x in args)
        if any(isinstance(x, Tensor) and min(x.shape[-2:]) < SMALLEST for x in smaller):
            continue
        try:
            found = trace_model(model, smaller)
        except TraceError:  # this resolution is not one of the model's
            continue
        if not found.program.concrete and _shrinks_alike(trace.graph, found.graph):
            return found, smaller
    return trace, args


def _reduced(images: Tensor, factor: int) -> Tensor:
    """Every `factor`th row and column: noise stays noise."""
    return images[..., ::factor, ::factor].contiguous()


def _shrinks_alike(graph: ChannelGraph, other: ChannelGraph) -> bool:
    """Whether all that may shrink in `graph` may shrink in `other`, unit for unit."""
    if not graph.prunable.keys() <= other.prunable.keys():
        return False
    return all(
        [(s.tensor, s.axis, s.role) for s in group.slices]
        == [(s.tensor, s.axis, s.role) for s in other.groups[name].slices]
        and all(
            np.array_equal(a.unit_of, b.unit_of)
            for a, b in zip(group.slices, other.groups[name].slices, strict=True)
        )
        for name, group in graph.prunable.items()
    )


@dataclass(frozen=True, slots=True)
class _Fault:
    """What went wrong with a removal."""

    message: str
    locks: Mapping[str, str] = field(default_factory=dict)
    """Groups known to be at fault -> why."""


class _Probe:
    """Tries removals on copies of one model."""

    def __init__(self, model: nn.Module, trace: Trace, args: tuple[Any, ...], bindings: Bindings) -> None:
        self._model, self._trace, self._args, self._bindings = model, trace, args, bindings
        self._used = _used(model, args)
        self._pair = with_batch(args, 2) if trace.program.batch == 1 else args
        self._trains = asks_for_mode(model) and self._can_train()
        """Whether its training is worth a look, and possible on these inputs alone."""

    def fault(self, graph: ChannelGraph, items: Sequence[tuple[str, ...]], seed: int) -> _Fault | None:
        """What goes wrong when the groups of `items` shrink at random, None if nothing does."""
        keep = random_keep(graph, seed, [name for item in items for name in item])
        counts = graph.units | {name: len(units) for name, units in keep.items()}
        pruned = structural_copy(self._used)
        doing = "its forward fails"
        try:
            remove(pruned, graph, keep, self._bindings.edits(graph.units, counts))
            self._compare(pruned, keep)
            if self._trains:
                doing = "its forward fails in train mode"
                _train(pruned, self._pair)
        except TraceError as error:
            return _Fault(str(error), error.locks)
        except PrunusError as error:
            return _Fault(str(error))
        except Exception as error:  # the model's own code, with sizes it does not expect
            said = str(error).strip().splitlines()
            message = said[0][:200] if said else _line_of(error)
            return _Fault(f"{doing}: {type(error).__name__}: {message}")
        finally:
            del pruned
            gc.collect(0)
        return None

    def _can_train(self) -> bool:
        """Not where training needs targets, or norms more than one value per channel."""
        try:
            _train(self._model, self._pair)
        except Exception:  # the model's own code
            return False
        return True

    def _compare(self, pruned: nn.Module, keep: Keep) -> None:
        """Raises where `pruned` is wrong.

        What might be rounding is told from a fault by the captured program: two passes in float64 would take
        minutes on a large model, and every removal is verified in float64 anyway.
        """
        tensors = state_of(self._model)
        concrete = self._trace.program.concrete
        try:
            compare(pruned, self._trace, tensors, keep, self._args, bare=self._model, in_double=concrete)
        except VerificationError as error:
            rounding = not concrete and error.max_error <= ROUNDING * error.scale
            if not (rounding and follows_program(pruned, self._trace, tensors, keep, self._args)):
                raise

    def culprits(
        self, graph: ChannelGraph, items: Sequence[tuple[str, ...]], seed: int, fault: _Fault
    ) -> dict[str, str]:
        """group -> what goes wrong with it, by halving; all `items` together have `fault`."""
        accepted: list[tuple[str, ...]] = []
        found: dict[str, str] = {}

        def search(failing: Sequence[tuple[str, ...]], fault: _Fault) -> None:
            """`failing` has `fault` together with what is accepted by now."""
            if len(failing) == 1:
                found.update(dict.fromkeys(failing[0], f"the forward pass cannot follow: {fault.message}"))
                return
            halves = failing[: len(failing) // 2], failing[len(failing) // 2 :]
            before = self.fault(graph, [*accepted, *halves[0]], seed)
            if before is None:  # then it is the other half, with the fault that is known
                accepted.extend(halves[0])
                search(halves[1], fault)
                return
            search(halves[0], before)
            after = self.fault(graph, [*accepted, *halves[1]], seed)
            if after is None:
                accepted.extend(halves[1])
            else:
                search(halves[1], after)

        search(items, fault)
        return found


def _used(model: nn.Module, args: tuple[Any, ...]) -> nn.Module:
    """A copy of `model` that has run once: what a pass makes and keeps (masks, position codes), a run has too."""
    used = separate_copy(model, parameters=False)
    used.eval()
    before = dict(model.named_buffers())
    try:
        with torch.no_grad():
            first = used(*args)
            moved = [n for n, b in used.named_buffers() if n in before and not same_values(b, before[n])]
            error, scale = distance(used(*args), first) if moved else (0.0, 0.0)
        structural_copy(used)
    except Exception:  # the model's own code: what fails here fails when it is compared, or cannot be copied
        return separate_copy(model, parameters=False)
    if error > SAME_OPERATORS * scale:
        raise TraceError(
            f"{', '.join(moved[:3])}: buffers change at every pass in eval mode, and the output with them: no "
            "removal can be compared with the model before. Let them change in training alone (if self.training)"
        )
    return used


def _train(model: nn.Module, args: tuple[Any, ...]) -> None:
    """One pass of a copy in train mode; what it computes is of no interest, but not that it fails."""
    twin = separate_copy(model)
    twin.train()
    with torch.no_grad(), seeded(0):
        twin(*args)


def _line_of(error: Exception) -> str:
    """The code that raised: what a bare assertion asked for."""
    frames = traceback.extract_tb(error.__traceback__)
    return (frames[-1].line or "") if frames else ""


def _items(graph: ChannelGraph) -> list[tuple[str, ...]]:
    """What can be tried on its own: a group, or all groups that keep equal counts."""
    items: dict[str, list[str]] = {}
    for name, group in graph.prunable.items():
        items.setdefault(group.equal_count or name, []).append(name)
    return [tuple(names) for names in items.values()]
