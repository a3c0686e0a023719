"""Physical change of a model's tensors: removal and growth by one re-indexing.

`reindex` is the only place where parameters are replaced. It returns what became what, so that
optimizer state and averaged weights can follow (`optimizer_state`). Everything that knows classes is in
`sizes` (the integers that torch's layers repeat) and `handlers` (forwards that hard-code sizes).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from prunus.adapters.pytorch.attributes import apply_edits
from prunus.adapters.pytorch.sizes import follow_computed, follow_tensors
from prunus.adapters.pytorch.tracing.capture import forget_derived
from prunus.core.cost import IntArray
from prunus.core.errors import PlanError
from prunus.core.graph import Axis, ChannelGraph, Keep
from prunus.core.growth import Growth
from prunus.core.plan import AttributeEdit

NOISE = 1e-2
"""Relative noise between the copies of a duplicated unit: without it they would stay equal for ever."""


@dataclass(frozen=True, slots=True, eq=False)
class Replacement:
    """One parameter or buffer that was replaced."""

    name: str
    old: Tensor
    new: Tensor
    indices: Mapping[int, IntArray]
    """axis -> (new length,): the old index of each new one."""

    def follow(self, tensor: Tensor) -> Tensor:
        """A tensor of the old shape (momentum, average), re-indexed like the parameter."""
        return select(tensor, self.indices)


@dataclass(frozen=True, slots=True, eq=False)
class Changes:
    """Everything a re-indexing replaced; tied tensors occur once."""

    replaced: tuple[Replacement, ...] = ()
    by_old: dict[int, Replacement] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.by_old.update((id(r.old), r) for r in self.replaced)


def select(tensor: Tensor, indices: Mapping[int, IntArray]) -> Tensor:
    """`tensor` with each axis index-selected; a new tensor, in the memory format of the old one."""
    result = tensor.detach()
    for axis, index in indices.items():
        result = result.index_select(axis, torch.from_numpy(np.ascontiguousarray(index)).to(result.device))
    for layout, dims in ((torch.channels_last, 4), (torch.channels_last_3d, 5)):
        if tensor.dim() == dims and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=layout):
            return result.contiguous(memory_format=layout)
    return result.contiguous()


def reindex(model: nn.Module, indices: Mapping[Axis, IntArray]) -> Changes:
    """Index-selects every named tensor in `model`, in place, and lets the layers' sizes follow.

    `indices` maps (tensor name, axis) to the old index of each new one: a subset for removal, with
    repetitions for growth. Parameters become new `nn.Parameter` objects that keep requires_grad, dtype,
    device and memory format; gradients are dropped. A tied tensor is replaced once and stays tied.
    Raises PlanError, before anything is changed, if a tensor is missing or an index lies outside its axis.
    """
    wanted: dict[str, dict[int, IntArray]] = {}
    for (name, axis), index in indices.items():
        wanted.setdefault(name, {})[axis] = np.asarray(index, dtype=np.int64)
    found = _tensors(model)
    _check(found, wanted)
    homes = _homes(model)
    replaced: dict[int, Replacement] = {}
    for name, per_axis in wanted.items():
        old = found[name]
        earlier = replaced.get(id(old))
        if earlier is None:
            replaced[id(old)] = Replacement(name, old, _rebuilt(old, per_axis), per_axis)
        elif not _same_indices(earlier.indices, per_axis):
            raise PlanError(f"{earlier.name} and {name} are one tied tensor, but their units differ")
    touched: dict[nn.Module, dict[str, Replacement]] = {}
    for key, change in replaced.items():
        for module, attribute in homes[key]:
            if isinstance(change.new, nn.Parameter):
                module._parameters[attribute] = change.new
            else:
                module._buffers[attribute] = change.new
            touched.setdefault(module, {})[attribute] = change
    for module, changes in touched.items():
        follow_tensors(
            module,
            {attribute: (tuple(change.old.shape), change.indices) for attribute, change in changes.items()},
        )
    return Changes(tuple(replaced.values()))


def remove(
    model: nn.Module,
    graph: ChannelGraph,
    keep: Keep,
    edits: Iterable[AttributeEdit] = (),
    kernels: Collection[str] = (),
) -> Changes:
    """Removes from `model`, in place, every unit of `graph` that is not in `keep`; then applies `edits`.

    Groups not named in `keep` stay whole; of `kernels` the centre tap stays. Raises PlanError if `keep` or
    `kernels` break a rule of the graph.
    """
    graph.check_keep(keep)
    changes = reindex(model, {**graph.kept_indices(keep), **graph.kernel_indices(kernels)})
    apply_edits(model, edits)
    follow_computed(model)
    forget_derived(model)
    return changes


def grow(
    model: nn.Module,
    graph: ChannelGraph,
    widths: Mapping[str, int],
    *,
    seed: int = 0,
    noise: float = NOISE,
    edits: Iterable[AttributeEdit] = (),
) -> tuple[ChannelGraph, Growth, Changes]:
    """Widens groups of `model`, in place, without changing its function (Net2WiderNet, Chen et al. 2016).

    New units are copies; every weight that reads a unit with m copies is divided by m, and zero-sum
    noise (relative size `noise`) tells the copies apart. Returns the graph of the wider model, where each
    new unit came from, and what was replaced. The same seed gives the same result, so that an averaged
    model grows exactly like the trained one. Raises PlanError where a width shrinks or a group cannot be
    widened without changing the function.
    """
    for name in widths:
        reason = why_not_growable(graph, name, widths[name])
        if reason is not None:
            raise PlanError(f"group {name!r} cannot be widened: {reason}", group=name)
    wider, growth = graph.widen(widths, seed)
    changes = reindex(model, growth.sources)
    _share_readers(changes, graph, growth, seed, noise)
    apply_edits(model, edits)
    follow_computed(model)
    forget_derived(model)
    return wider, growth, changes


def why_not_growable(graph: ChannelGraph, name: str, width: int) -> str | None:
    """None if `name` can be widened to `width` units with the function unchanged, else the reason."""
    if name not in graph.groups:
        return f"unknown channel group {name!r}"
    group = graph.groups[name]
    if width == group.units:
        return None
    if not group.gateable:
        return "something reads its units without a weight that could be shared among copies"
    if not group.exact and width % group.units:
        return (
            f"a norm takes statistics over its units, so that only multiples of {group.units} keep the "
            f"function, not {width}"
        )
    return graph.growable(name)


def _share_readers(changes: Changes, graph: ChannelGraph, growth: Growth, seed: int, noise: float) -> None:
    by_name = {change.name: change for change in changes.replaced}
    generator = torch.Generator().manual_seed(seed)
    for (name, axis), pieces in graph.slices_of.items():
        reads = any(piece.role == "reads" and group in growth.copies for group, piece in pieces)
        if not reads or (name, axis) not in growth.sources:
            continue
        new, source = by_name[name].new, torch.from_numpy(growth.sources[name, axis])
        copies = torch.bincount(source, minlength=by_name[name].old.shape[axis]).to(new.dtype)
        shape = [1] * new.dim()
        shape[axis] = -1
        with torch.no_grad():
            new.div_(copies[source].view(shape).to(new.device))
            scale = noise * float(new.square().mean().sqrt())
            jitter = torch.randn(new.shape, generator=generator, dtype=torch.float64) * scale
            mean = torch.zeros(_with(new.shape, axis, len(copies)), dtype=torch.float64)
            mean.index_add_(axis, source, jitter).div_(copies.double().clamp(min=1).view(shape))
            new.add_((jitter - mean.index_select(axis, source)).to(new))


def _with(shape: Sequence[int], axis: int, length: int) -> list[int]:
    changed = list(shape)
    changed[axis] = length
    return changed


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    found.update(model.named_buffers(remove_duplicate=False))
    return found


def _homes(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """id of a tensor -> every (module, attribute) that holds it: one for most, several where tied."""
    homes: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, tensor in _own(module):
            homes.setdefault(id(tensor), []).append((module, attribute))
    return homes


def _own(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for store in (module._parameters, module._buffers):
        for attribute, tensor in store.items():
            if tensor is not None:
                yield attribute, tensor


def _check(found: Mapping[str, Tensor], wanted: Mapping[str, Mapping[int, IntArray]]) -> None:
    for name, per_axis in wanted.items():
        if name not in found:
            raise PlanError(f"the model has no parameter or buffer {name!r}: the plan is of another model")
        shape = tuple(found[name].shape)
        for axis, index in per_axis.items():
            if axis >= len(shape) or not len(index) or index.min() < 0 or index.max() >= shape[axis]:
                raise PlanError(
                    f"{name} has shape {shape}: its axis {axis} cannot be indexed by {len(index)} indices"
                    + (f" in {index.min()}..{index.max()}" if len(index) else "")
                )


def _same_indices(a: Mapping[int, IntArray], b: Mapping[int, IntArray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[axis], b[axis]) for axis in a)


def _rebuilt(old: Tensor, per_axis: Mapping[int, IntArray]) -> Tensor:
    new = select(old, per_axis)
    if not isinstance(old, nn.Parameter):
        return new
    parameter = nn.Parameter(new, requires_grad=old.requires_grad)
    parameter.__dict__.update(old.__dict__)  # marks that training code leaves on parameters
    if issubclass(type(old), nn.Parameter):
        parameter.__class__ = type(old)
    # the dictionaries themselves: the handles that the user holds go on to remove from them
    parameter._backward_hooks = old._backward_hooks
    parameter._post_accumulate_grad_hooks = old._post_accumulate_grad_hooks
    return parameter
