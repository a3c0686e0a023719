"""A trace is believed only once the Python model has been pruned by it and found right.

The graph of a trace is proven on the captured program; the original Python forward may still hard-code a
number that no attribute and no handler governs. `certify` tries random removals on copies, and locks the
groups that the forward cannot follow, with what went wrong as the reason.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from prunus.adapters.pytorch.attributes import Bindings
from prunus.adapters.pytorch.comparison import compare, state_of
from prunus.adapters.pytorch.equal_counts import with_locks
from prunus.adapters.pytorch.structural_copy import structural_copy
from prunus.adapters.pytorch.surgery import remove
from prunus.adapters.pytorch.tracing import Trace
from prunus.core.errors import PrunusError
from prunus.core.graph import ChannelGraph

SEEDS = (0, 1)
LEAST, MOST = 0.25, 0.95


def certify(
    model: nn.Module, trace: Trace, bindings: Bindings, args: tuple[Any, ...], seeds: Sequence[int] = SEEDS
) -> ChannelGraph:
    """The graph of `trace` with everything locked that the forward of `model` cannot follow.

    Every group is given its own random share of units; where that fails, groups are added back in
    halves until those at fault are found. `model` is not changed.
    """
    probe = _Probe(model, trace, bindings, args)
    locks: dict[str, str] = {}
    while True:
        graph = with_locks(trace.graph, locks)
        items = _items(graph)
        failing = next((seed for seed in seeds if probe.fault(graph, items, seed) is not None), None)
        if failing is None:
            return graph
        found = probe.culprits(graph, items, failing)
        if not found:  # each alone is right, together they are not: the last resort is to remove nothing
            fault = probe.fault(graph, items, failing)
            found = {name: f"together with others, {fault}" for item in items for name in item}
        locks.update(found)


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


class _Probe:
    """Tries removals on copies of one model."""

    def __init__(self, model: nn.Module, trace: Trace, bindings: Bindings, args: tuple[Any, ...]) -> None:
        self._model, self._trace, self._bindings, self._args = model, trace, bindings, args

    def fault(self, graph: ChannelGraph, items: Sequence[tuple[str, ...]], seed: int) -> str | None:
        """What goes wrong when the groups of `items` shrink at random, None if nothing does."""
        keep = random_keep(graph, seed, [name for item in items for name in item])
        counts = graph.units | {name: len(units) for name, units in keep.items()}
        pruned = structural_copy(self._model)
        try:
            remove(pruned, graph, keep, self._bindings.edits(graph.units, counts))
            compare(pruned, self._trace, state_of(self._model), keep, self._args, bare=self._model)
        except PrunusError as error:
            return str(error)
        except Exception as error:  # the model's own code, with sizes it does not expect
            message = (str(error).strip().splitlines() or [""])[0][:200]
            return f"its forward fails: {type(error).__name__}: {message}"
        finally:
            del pruned
            gc.collect(0)
        return None

    def culprits(self, graph: ChannelGraph, items: Sequence[tuple[str, ...]], seed: int) -> dict[str, str]:
        """group -> what goes wrong with it, by halving."""
        accepted: list[tuple[str, ...]] = []
        found: dict[str, str] = {}
        stack = [list(items)]
        while stack:
            candidates = stack.pop()
            fault = self.fault(graph, [*accepted, *candidates], seed)
            if fault is None:
                accepted.extend(candidates)
            elif len(candidates) == 1:
                found.update(dict.fromkeys(candidates[0], f"the forward pass cannot follow: {fault}"))
            else:
                half = len(candidates) // 2
                stack.append(candidates[half:])
                stack.append(candidates[:half])
        return found


def _items(graph: ChannelGraph) -> list[tuple[str, ...]]:
    """What can be tried on its own: a group, or all groups that keep equal counts."""
    items: dict[str, list[str]] = {}
    for name, group in graph.prunable.items():
        items.setdefault(group.equal_count or name, []).append(name)
    return [tuple(names) for names in items.values()]
