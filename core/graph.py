"""The channel graph: what lives or dies together in a model, as plain data.

An adapter turns a model into a `ChannelGraph` once. From then on nobody needs the model to reason about
it: cost, removal, growth, gates, refitting, carrying optimizer state and replaying a plan all read the
same slices.

    units    C of a group            axis   one axis of one tensor
    unit_of  (axis length,)          index  a position on an axis
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from prunus.core.blocks import Block
from prunus.core.cost import Cost, CostModel, CostTerm, Extent, IntArray
from prunus.core.errors import PlanError
from prunus.core.growth import Axis, Growth, sweeps
from prunus.core.kernels import Kernel

Role = Literal["writes", "reads", "scales"]
Keep = Mapping[str, "Sequence[int] | IntArray"]
"""group -> kept units; groups not named keep all."""


@dataclass(frozen=True, slots=True, eq=False)
class Slice:
    """One axis of one tensor (parameter or buffer) that shrinks when its group does.

    One axis may carry slices of several groups (heads and head dimensions of one projection), or two
    of one group: an index stays while all its units stay.
    """

    tensor: str
    """Name of the parameter or buffer, "layer1.0.conv1.weight"."""
    axis: int
    role: Role
    """`writes` makes the channel, `reads` consumes it, `scales` is per-channel (norm, bias, depthwise)."""
    unit_of: IntArray
    """(axis length,): the unit each index belongs to, -1 where the index is not of this group."""


@dataclass(frozen=True, slots=True, eq=False)
class ChannelGroup:
    """Units that can only be removed together, across all their tensors.

    A unit is a channel, an attention head, a slot of a grouped convolution...
    """

    name: str
    """Stable between runs and machines: the first tensor that writes the units."""
    units: int
    slices: tuple[Slice, ...]
    min_units: int = 1
    multiple_of: int = 1
    """The kept count must be a multiple of this (hardware rounding)."""
    equal_count: str | None = None
    """Groups with the same tag keep equal counts: one Python number serves several axes."""
    exact: bool = True
    """False where a norm's statistics run over the units: the reference then takes them over the kept ones."""
    locked: str | None = None
    """Why nothing of this group can be removed, in words a user understands; None if it can."""
    gateable: bool = True
    """True if every consumer reads the units through a weight, so that gates can scale that weight."""

    def with_role(self, role: Role) -> tuple[Slice, ...]:
        return tuple(s for s in self.slices if s.role == role)

    @property
    def channels_per_unit(self) -> int:
        """How many outputs of a layer a unit has at least: 1 for a channel, the head's size for a head."""
        counts = [np.bincount(s.unit_of[s.unit_of >= 0]) for s in self.with_role("writes")]
        return min((int(count[count > 0].min()) for count in counts if count.any()), default=1)

    @property
    def min_kept(self) -> int:
        """The smallest count a plan may keep: everything if locked, else at least `min_units`, rounded up."""
        if self.locked is not None:
            return self.units
        step = self.multiple_of
        return min(self.units, -(-self.min_units // step) * step)


class ChannelGraph:
    """Groups, the tensors they run through, and the exact cost of any choice of counts."""

    def __init__(
        self,
        groups: Iterable[ChannelGroup],
        terms: Iterable[CostTerm],
        tensors: Mapping[str, Sequence[int]],
        blocks: Iterable[Block] = (),
        kernels: Iterable[Kernel] = (),
    ) -> None:
        """`tensors` maps every sliced parameter or buffer to its shape, in the order the model uses them.

        `blocks` are what can be removed as a whole, in the order the model runs them; `kernels` the convolutions
        that can be reduced to one tap.
        """
        self.groups: dict[str, ChannelGroup] = {}
        for group in groups:
            if group.name in self.groups:
                raise PlanError(f"two channel groups are named {group.name!r}", group=group.name)
            self.groups[group.name] = group
        self.terms = tuple(terms)
        self.tensors: dict[str, tuple[int, ...]] = {name: tuple(shape) for name, shape in tensors.items()}
        self.blocks: dict[str, Block] = {block.name: block for block in blocks}
        self.kernels: dict[str, Kernel] = {kernel.name: kernel for kernel in kernels}

    @cached_property
    def cost_model(self) -> CostModel:
        return CostModel(tuple(self.groups), self.terms)

    def with_floors(self, share: float, multiple_of: int = 1) -> ChannelGraph:
        """The same graph with a floor under every group: `share` of its units, at least 2 of 8 or more.

        A group that is left with one channel costs points that nothing brings back (methods, section 0).
        `multiple_of` rounds what layers have left to the hardware's liking: to multiples of so many channels,
        of which one unit may have several (a head). Groups of fewer channels keep all.
        """
        groups = []
        for group in self.groups.values():
            least = max(math.ceil(share * group.units - 1e-9), 2 if group.units >= 8 else 1, group.min_units)
            step = math.lcm(group.multiple_of, multiple_of // math.gcd(multiple_of, group.channels_per_unit))
            groups.append(replace(group, min_units=min(least, group.units), multiple_of=step))
        return self.with_groups(groups)

    def with_groups(self, groups: Iterable[ChannelGroup]) -> ChannelGraph:
        """The same graph with other rules for its groups."""
        return ChannelGraph(groups, self.terms, self.tensors, self.blocks.values(), self.kernels.values())

    def with_kernels(self, kernels: Iterable[Kernel]) -> ChannelGraph:
        """The same graph with these kernels that can be reduced."""
        return ChannelGraph(self.groups.values(), self.terms, self.tensors, self.blocks.values(), kernels)

    def with_terms(self, terms: Iterable[CostTerm]) -> ChannelGraph:
        """The same graph with further cost terms (a measured latency table)."""
        blocks, kernels = self.blocks.values(), self.kernels.values()
        return ChannelGraph(self.groups.values(), (*self.terms, *terms), self.tensors, blocks, kernels)

    @property
    def units(self) -> dict[str, int]:
        """The full count of every group."""
        return {name: group.units for name, group in self.groups.items()}

    @property
    def prunable(self) -> dict[str, ChannelGroup]:
        """Groups that may shrink."""
        return {name: g for name, g in self.groups.items() if g.min_kept < g.units}

    @cached_property
    def slices_of(self) -> dict[Axis, tuple[tuple[str, Slice], ...]]:
        """Every sliced axis with (group name, slice) pairs, in the order the model uses the tensors."""
        found: dict[Axis, list[tuple[str, Slice]]] = {}
        for name, group in self.groups.items():
            for piece in group.slices:
                found.setdefault((piece.tensor, piece.axis), []).append((name, piece))
        order = {tensor: i for i, tensor in enumerate(self.tensors)}
        return {axis: tuple(found[axis]) for axis in sorted(found, key=lambda a: (order.get(a[0], len(order)), a))}

    def cost(self, kept_counts: Mapping[str, float] | None = None) -> Cost:
        """Exact cost when each group keeps `kept_counts` units; groups not named keep all of theirs."""
        counts: dict[str, float] = dict(self.units)
        if kept_counts is not None:
            unknown = set(kept_counts) - set(counts)
            if unknown:
                raise PlanError(f"unknown channel group {sorted(unknown)[0]!r}", group=sorted(unknown)[0])
            counts.update(kept_counts)
        return self.cost_model.at(self.cost_model.counts(counts))

    def check_keep(self, keep: Keep) -> dict[str, IntArray]:
        """`keep` as sorted index arrays, one for every group, or an error that names the broken rule."""
        checked: dict[str, IntArray] = {}
        for name in keep:
            if name not in self.groups:
                raise PlanError(f"unknown channel group {name!r}", group=name)
        for name, group in self.groups.items():
            units = np.asarray(keep.get(name, np.arange(group.units)), dtype=np.int64)
            kept = np.unique(units)
            if len(kept) != len(units):
                raise PlanError(f"group {name!r}: a unit is kept twice", group=name)
            if len(kept) and (kept[0] < 0 or kept[-1] >= group.units):
                raise PlanError(
                    f"group {name!r}: units must lie in 0..{group.units - 1}, got {int(kept[0])}..{int(kept[-1])}",
                    group=name,
                )
            if group.locked is not None and len(kept) != group.units:
                raise PlanError(f"group {name!r} is locked ({group.locked})", group=name)
            if len(kept) < group.min_kept:
                raise PlanError(
                    f"group {name!r} keeps {len(kept)} units; the smallest allowed is {group.min_kept}",
                    group=name,
                )
            if len(kept) != group.units and len(kept) % group.multiple_of:
                raise PlanError(
                    f"group {name!r} keeps {len(kept)} units, not a multiple of {group.multiple_of}",
                    group=name,
                )
            checked[name] = kept
        for tag, names in self.equal_counts.items():
            lengths = {len(checked[name]) for name in names}
            if len(lengths) > 1:
                raise PlanError(f"groups {', '.join(names)} must keep equal counts ({tag})", group=names[0])
        return checked

    @cached_property
    def equal_counts(self) -> dict[str, tuple[str, ...]]:
        """tag -> names of the groups that keep equal counts."""
        tags: dict[str, list[str]] = {}
        for name, group in self.groups.items():
            if group.equal_count is not None:
                tags.setdefault(group.equal_count, []).append(name)
        return {tag: tuple(names) for tag, names in tags.items()}

    def kept_indices(self, keep: Keep) -> dict[Axis, IntArray]:
        """For every axis that shrinks: the sorted indices that stay. Pass through `check_keep` first."""
        alive = self._alive_units(keep)
        shrunk: dict[Axis, IntArray] = {}
        for axis, pieces in self.slices_of.items():
            stays = np.ones(len(pieces[0][1].unit_of), dtype=bool)
            for name, piece in pieces:
                stays &= (piece.unit_of < 0) | alive[name][piece.unit_of]
            if not stays.all():
                shrunk[axis] = np.flatnonzero(stays)
        return shrunk

    def _alive_units(self, keep: Keep) -> dict[str, np.ndarray]:
        alive = {}
        for name, group in self.groups.items():
            mask = np.ones(group.units, dtype=bool)
            if name in keep:
                mask[:] = False
                mask[np.asarray(keep[name], dtype=np.int64)] = True
            alive[name] = mask
        return alive

    def restrict(self, keep: Keep) -> ChannelGraph:
        """The graph of the model from which everything but `keep` was removed; units are renumbered 0..k-1."""
        checked = self.check_keep(keep)
        indices = self.kept_indices(checked)
        return self._reindexed(
            indices,
            {name: _positions(units, self.groups[name].units) for name, units in checked.items()},
            {name: len(units) for name, units in checked.items()},
        )

    def _reindexed(
        self, indices: Mapping[Axis, IntArray], renumber: Mapping[str, IntArray], units: Mapping[str, int]
    ) -> ChannelGraph:
        groups = []
        for name, group in self.groups.items():
            slices = []
            for piece in group.slices:
                index = indices.get((piece.tensor, piece.axis))
                old = piece.unit_of if index is None else piece.unit_of[index]
                slices.append(replace(piece, unit_of=np.where(old < 0, -1, renumber[name][old])))
            groups.append(replace(group, units=units[name], slices=tuple(slices)))
        return ChannelGraph(groups, self.terms, self._shapes(indices), self.blocks.values(), self.kernels.values())

    def _shapes(self, indices: Mapping[Axis, IntArray]) -> dict[str, tuple[int, ...]]:
        shapes = {name: list(shape) for name, shape in self.tensors.items()}
        for (tensor, axis), index in indices.items():
            shapes[tensor][axis] = len(index)
        return {name: tuple(shape) for name, shape in shapes.items()}

    def without_blocks(self, names: Iterable[str]) -> ChannelGraph:
        """The graph of the model whose blocks `names` are gone: with their tensors, costs and inner groups.

        Groups that also run elsewhere stay, with what was known of them: coupled, floors, locks. Raises PlanError
        for a name that is no block.
        """
        gone = [self.block(name) for name in names]
        tensors = frozenset[str]().union(*(block.tensors for block in gone))
        sources = tensors.union(*(block.sources for block in gone))
        groups = []
        for group in self.groups.values():
            slices = tuple(piece for piece in group.slices if piece.tensor not in tensors)
            if slices:
                groups.append(replace(group, slices=slices))
        return ChannelGraph(
            groups,
            [term for term in self.terms if term.source not in sources],
            {name: shape for name, shape in self.tensors.items() if name not in tensors},
            [block for block in self.blocks.values() if not block.tensors <= tensors],
            [kernel for kernel in self.kernels.values() if kernel.tensor not in tensors],
        )

    def without_kernels(self, names: Iterable[str]) -> ChannelGraph:
        """The graph of the model whose convolutions `names` have one tap left. Raises PlanError.

        Its latency is an upper bound: what one tap takes was not measured.
        """
        gone = {name: self.kernel(name) for name in names}
        taps = {source: k.taps for k in gone.values() for source in (k.name, k.tensor)}
        shapes = {k.tensor: (*self.tensors[k.tensor][:2], 1, 1) for k in gone.values()}
        return ChannelGraph(
            self.groups.values(),
            [
                replace(t, coefficient=t.coefficient // taps[t.source])
                if t.source in taps and t.quantity != "latency"
                else t
                for t in self.terms
            ],
            {**self.tensors, **shapes},
            self.blocks.values(),
            [kernel for kernel in self.kernels.values() if kernel.name not in gone],
        )

    def kernel_indices(self, names: Iterable[str]) -> dict[Axis, IntArray]:
        """What is left of the kernel axes when the convolutions `names` keep one tap."""
        kernels = [self.kernel(name) for name in names]
        return {(k.tensor, axis): np.array([k.centre], dtype=np.int64) for k in kernels for axis in (2, 3)}

    def kernel(self, name: str) -> Kernel:
        """Raises PlanError if there is none of that name."""
        if name not in self.kernels:
            raise PlanError(f"there is no kernel {name!r} that could be reduced; there are {len(self.kernels)}")
        return self.kernels[name]

    def block(self, name: str) -> Block:
        """Raises PlanError if there is none of that name."""
        if name not in self.blocks:
            raise PlanError(f"there is no block {name!r} that could be removed; there are {len(self.blocks)}")
        return self.blocks[name]

    def growable(self, name: str) -> str | None:
        """None if the group can be widened, else the reason why not."""
        group = self.groups[name]
        if group.locked is not None:
            return group.locked
        for piece in group.slices:
            if sweeps(piece.unit_of, group.units) is None:
                return f"the units of {piece.tensor} (axis {piece.axis}) are interleaved"
        return None

    def widen(self, widths: Mapping[str, int], seed: int = 0) -> tuple[ChannelGraph, Growth]:
        """Widen groups to `widths` units by duplication (Net2Wider); new units come after the old ones.

        Returns the graph of the wider model and where every new unit and index is copied from.
        Raises PlanError if a width shrinks or a group cannot be widened.
        """
        rng = np.random.default_rng(seed)
        graph = self
        copies: dict[str, IntArray] = {}
        sources: dict[Axis, IntArray] = {}
        for name, width in widths.items():
            if name not in self.groups:
                raise PlanError(f"unknown channel group {name!r}", group=name)
            group = graph.groups[name]
            extra = width - group.units
            if extra < 0:
                raise PlanError(f"group {name!r} cannot grow from {group.units} to {width} units", group=name)
            if extra == 0:
                continue
            reason = graph.growable(name)
            if reason is not None:
                raise PlanError(f"group {name!r} cannot be widened: {reason}", group=name)
            order = np.concatenate([rng.permutation(group.units) for _ in range(-(-extra // group.units))])
            copies[name] = np.sort(order[:extra]).astype(np.int64)
            graph, grown = graph._widen_group(name, copies[name])
            for axis, index in grown.items():
                sources[axis] = sources[axis][index] if axis in sources else index
        return graph, Growth(copies, sources)

    def _widen_group(self, name: str, copied: IntArray) -> tuple[ChannelGraph, dict[Axis, IntArray]]:
        group = self.groups[name]
        sources: dict[Axis, IntArray] = {}
        units_at: dict[Axis, IntArray] = {}
        for piece in group.slices:
            passes = sweeps(piece.unit_of, group.units)
            assert passes is not None
            source, labels = [], []
            at = 0
            for start, run in passes:
                stop = start + run * group.units
                source.append(np.arange(at, stop))
                labels.append(piece.unit_of[at:stop])
                source.append((start + copied[:, None] * run + np.arange(run)).ravel())
                labels.append(np.repeat(group.units + np.arange(len(copied)), run))
                at = stop
            source.append(np.arange(at, len(piece.unit_of)))
            labels.append(piece.unit_of[at:])
            sources[piece.tensor, piece.axis] = np.concatenate(source).astype(np.int64)
            units_at[piece.tensor, piece.axis] = np.concatenate(labels).astype(np.int64)
        groups = []
        for other_name, other in self.groups.items():
            slices = []
            for piece in other.slices:
                axis = (piece.tensor, piece.axis)
                if other_name == name:
                    slices.append(replace(piece, unit_of=units_at[axis]))
                elif axis in sources:
                    slices.append(replace(piece, unit_of=piece.unit_of[sources[axis]]))
                else:
                    slices.append(piece)
            units = group.units + len(copied) if other_name == name else other.units
            groups.append(replace(other, units=units, slices=tuple(slices)))
        graph = ChannelGraph(
            groups, self.terms, self._shapes(sources), self.blocks.values(), self.kernels.values()
        )
        return graph, sources

    @cached_property
    def fingerprint(self) -> str:
        """A hash of groups, slices and cost: equal graphs, equal fingerprints, on every machine."""
        digest = hashlib.sha256()
        for name, group in sorted(self.groups.items()):
            head = [name, group.units, group.min_units, group.multiple_of, group.equal_count, group.exact]
            digest.update(json.dumps([*head, group.locked]).encode())
            for piece in group.slices:
                digest.update(f"{piece.tensor}/{piece.axis}/{piece.role}".encode())
                digest.update(np.ascontiguousarray(piece.unit_of, dtype="<i8").tobytes())
        for name in self.blocks:
            digest.update(f"block {name}".encode())
        full = self.cost()
        digest.update(json.dumps([full.macs, full.params, full.bytes]).encode())
        return digest.hexdigest()


def _positions(kept: IntArray, units: int) -> IntArray:
    renumber = np.full(units, -1, dtype=np.int64)
    renumber[kept] = np.arange(len(kept))
    return renumber


__all__ = ["Axis", "ChannelGraph", "ChannelGroup", "Cost", "CostTerm", "Extent", "Growth", "Role", "Slice"]
