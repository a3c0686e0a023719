"""Operators that move axes and entries around: reshape, permute, slice, expand, index."""

from __future__ import annotations

from typing import Any

import numpy as np

from prunus.adapters.pytorch.tracing.labelling import (
    Label,
    Labelling,
    Labels,
    ids_or_true,
    operators,
    rule,
    short,
    tidy,
)
from prunus.adapters.pytorch.tracing.program import Step
from prunus.adapters.pytorch.tracing.reshape import merge, reshape_labels, split


@rule(
    *operators("reshape view _unsafe_view flatten unflatten squeeze unsqueeze view_as reshape_as _reshape_alias")
)
def reshape(t: Labelling, s: Step) -> Labels:
    """Sizes written into the call follow their axes; -1 takes care of itself."""
    x = s.arguments["self"]
    labels = reshape_labels(t, s, x.shape, t.of(x), s.shape)
    name = next((n for n in ("size", "shape", "sizes") if isinstance(s.arguments.get(n), list | tuple)), None)
    if name is not None:
        sizes = s.arguments[name]
        first = s.arguments["dim"] % len(x.shape) if s.op == "aten.unflatten" else 0
        for position, size in enumerate(sizes):
            if size != -1:
                t.literal(s, name, position, size, labels[first + position])
    return labels


@rule("aten.permute")
def permute(t: Labelling, s: Step) -> Labels:
    labels: Labels = t.of(s.arguments["self"])
    return [labels[axis] for axis in s.arguments["dims"]]


@rule(*operators("transpose swapaxes swapdims t numpy_T mT adjoint"))
def transpose(t: Labelling, s: Step) -> Labels:
    labels: Labels = list(t.of(s.arguments["self"]))
    if len(labels) < 2:
        return labels
    named = [s.arguments.get(a, s.arguments.get(b)) for a, b in (("dim0", "axis0"), ("dim1", "axis1"))]
    if s.op == "aten.numpy_T":
        return labels[::-1]
    i, j = (-2, -1) if named[0] is None else (int(named[0]), int(named[1]))  # type: ignore[arg-type]
    labels[i], labels[j] = labels[j], labels[i]
    return labels


@rule("aten.movedim")
def movedim(t: Labelling, s: Step) -> Labels:
    labels: Labels = t.of(s.arguments["self"])
    rank = len(labels)
    source, target = s.arguments["source"], s.arguments["destination"]
    source = [source] if isinstance(source, int) else list(source)
    target = [target] if isinstance(target, int) else list(target)
    order = [axis for axis in range(rank) if axis not in [a % rank for a in source]]
    for at, axis in sorted((b % rank, a % rank) for a, b in zip(source, target, strict=True)):
        order.insert(at, axis)
    return [labels[axis] for axis in order]


@rule("aten.flip")
def flip(t: Labelling, s: Step) -> Labels:
    labels: Labels = list(t.of(s.arguments["self"]))
    for axis in s.arguments["dims"]:
        ids = labels[axis]
        labels[axis] = None if ids is None else ids[::-1].copy()
    return labels


@rule("aten.cat", "aten.concat", "aten.concatenate")
def cat(t: Labelling, s: Step) -> Labels:
    operands = [x for x in s.arguments["tensors"] if x.shape != (0,)]
    if not operands:  # nothing was detected
        return t.free(s)
    axis = s.arguments["dim"] % len(s.shape)
    result: Labels = []
    for i in range(len(s.shape)):
        if i == axis:
            parts = [ids_or_true(t.of(x)[i], x.shape[i]) for x in operands]
            result.append(tidy(np.concatenate(parts)))
        else:
            label = t.of(operands[0])[i]
            for x in operands[1:]:
                label = t.same(s, label, t.of(x)[i])
            result.append(label)
    return result


@rule("aten.stack")
def stack(t: Labelling, s: Step) -> Labels:
    operands = s.arguments["tensors"]
    labels: Labels = list(t.of(operands[0]))
    for x in operands[1:]:
        labels = [t.same(s, a, b) for a, b in zip(labels, t.of(x), strict=True)]
    labels.insert(s.arguments["dim"] % len(s.shape), None)
    return labels


def _sections(t: Labelling, s: Step, axis: int, bounds: list[int], tie: bool) -> list[Labels]:
    labels: Labels = t.of(s.arguments["self"])
    ids = labels[axis]
    pieces = [] if ids is None else np.split(ids, bounds)
    if tie:
        for piece in pieces[1:]:
            t.same(s, pieces[0], piece)
    results = []
    for k in range(len(bounds) + 1):
        part = list(labels)
        part[axis] = tidy(pieces[k]) if pieces else None
        results.append(part)
    return results


@rule("aten.split_with_sizes", "aten.split", "aten.unsafe_split", "aten.unsafe_split_with_sizes")
def split_sizes(t: Labelling, s: Step) -> list[Labels]:
    """Sections follow their own channels; sections that one number describes are tied to each other."""
    x = s.arguments["self"]
    axis = s.arguments["dim"] % len(x.shape)
    lengths = [shape[axis] for shape in s.shapes]
    name = next(n for n in ("split_sizes", "split_size", "sections") if n in s.arguments)
    sizes = s.arguments[name]
    if isinstance(sizes, int):
        return _even(t, s, axis, lengths, name)
    results = _sections(t, s, axis, list(np.cumsum(lengths)[:-1]), tie=False)
    for position, part in enumerate(results):
        t.literal(s, name, position, lengths[position], part[axis])
    return results


def _even(t: Labelling, s: Step, axis: int, lengths: list[int], name: str | None) -> list[Labels]:
    ids: Label = t.of(s.arguments["self"])[axis]
    even = len(set(lengths)) == 1
    if not even:
        t.lock(ids, f"{short(s)} in {s.where()} cuts it into unequal parts by one size")
    results = _sections(t, s, axis, list(np.cumsum(lengths)[:-1]), tie=even)
    if name is not None:
        t.literal(s, name, None, lengths[0], results[0][axis])
    return results


@rule("aten.chunk", "aten.unsafe_chunk", "aten.tensor_split")
def chunk(t: Labelling, s: Step) -> list[Labels]:
    x = s.arguments["self"]
    axis = s.arguments["dim"] % len(x.shape)
    return _even(t, s, axis, [shape[axis] for shape in s.shapes], None)


@rule("aten.expand")
def expand(t: Labelling, s: Step) -> Labels:
    """A repeated axis is the same everywhere, so any length of it is right."""
    x = s.arguments["self"]
    labels: Labels = t.of(x)
    added = len(s.shape) - len(labels)
    result: Labels = []
    for axis, size in enumerate(s.shape):
        at = axis - added
        if at >= 0 and x.shape[at] == size:
            result.append(labels[at])
        else:
            result.append(t.fresh(size) if axis else None)
        if s.arguments["size"][axis] != -1:
            t.literal(s, "size", axis, size, result[-1])
    return result


@rule("aten.expand_as")
def expand_as(t: Labelling, s: Step) -> Labels:
    x, other = s.arguments["self"], s.arguments["other"]
    labels: Labels = t.of(x)
    added = len(s.shape) - len(labels)
    result: Labels = []
    for axis, ids in enumerate(t.of(other)):
        at = axis - added
        result.append(t.same(s, ids, labels[at]) if at >= 0 and x.shape[at] != 1 else ids)
    return result


@rule(*operators("zeros ones full empty new_zeros new_ones new_full new_empty rand randn"))
def created(t: Labelling, s: Step) -> Labels:
    """A tensor of one value is right at any length."""
    result = [t.fresh(n) if axis else None for axis, n in enumerate(s.shape)]
    for axis, ids in enumerate(result):
        t.literal(s, "size", axis, s.shape[axis], ids)
    return result


@rule("aten.repeat", "aten.tile")
def repeat(t: Labelling, s: Step) -> Labels:
    x = s.arguments["self"]
    labels: Labels = t.of(x)
    added = len(s.shape) - len(labels)
    padded: Labels = [*([None] * added), *labels]
    sizes = (1,) * added + x.shape
    return [
        None if ids is None else np.tile(ids, size // old)
        for ids, size, old in zip(padded, s.shape, sizes, strict=True)
    ]


@rule("aten.repeat_interleave")
def repeat_interleave(t: Labelling, s: Step) -> Labels:
    x, times, axis = s.arguments["self"], s.arguments.get("repeats"), s.arguments.get("dim")
    if not isinstance(times, int) or axis is None:
        t.lock_inputs(s, f"its entries are repeated by index in {s.where()}")
        return [None] * len(s.shape)
    labels: Labels = list(t.of(x))
    ids = labels[axis]
    labels[axis] = None if ids is None else np.repeat(ids, times)
    return labels


@rule(*operators("pad constant_pad_nd reflection_pad2d replication_pad2d reflection_pad1d"))
def pad(t: Labelling, s: Step) -> Labels:
    """Constant padding of channels adds channels of one value, which may be removed like any other."""
    name = "pad" if "pad" in s.arguments else "padding"
    x, amounts = s.arguments["self"], s.arguments[name]
    labels: Labels = list(t.of(x))
    constant = s.op == "aten.constant_pad_nd" or s.arguments.get("mode") == "constant"
    for k in range(len(amounts) // 2):
        axis = len(labels) - 1 - k
        ids, before, after = labels[axis], amounts[2 * k], amounts[2 * k + 1]
        if ids is None or before == after == 0:
            continue
        if not constant or before < 0 or after < 0:
            t.lock(ids, f"it is padded in {s.where()}")
            labels[axis] = None
            continue
        new = t.variables.fresh(before + after)
        t.literal(s, name, 2 * k, before, new[:before] if before else None)
        t.literal(s, name, 2 * k + 1, after, new[before:] if after else None)
        labels[axis] = np.concatenate([new[:before], ids, new[before:]])
    return labels


@rule("aten.pixel_shuffle", "aten.channel_shuffle", "aten.pixel_unshuffle")
def pixel_shuffle(t: Labelling, s: Step) -> Labels:
    """Space to depth and back: the channel axis is (C, r, r), and r*r cannot shrink."""
    x = s.arguments["self"]
    labels: Labels = t.of(x)
    channel = len(labels) - 3
    if s.op == "aten.pixel_unshuffle":
        factor = s.arguments["downscale_factor"] ** 2
        ids = labels[channel]
        return [*labels[:channel], None if ids is None else np.repeat(ids, factor), None, None]
    if s.op == "aten.channel_shuffle":
        groups = s.arguments["groups"]
        n = x.shape[1]
        rows, columns = split(t, s, labels[1], (groups, n // groups))
        t.literal(s, "groups", None, groups, rows)
        return [labels[0], merge(t, s, [n // groups, groups], [columns, rows]), *labels[2:]]
    factor = s.arguments["upscale_factor"] ** 2
    kept, inner = split(t, s, labels[channel], (s.shape[channel], factor))
    t.lock(inner, f"pixel_shuffle in {s.where()} turns it into space")
    return [*labels[:channel], kept, None, None]


@rule("aten.im2col", "aten.col2im")
def patches(t: Labelling, s: Step) -> Any:
    """Patches: channel axis (C, k*k), of which only C can shrink."""
    x = s.arguments["self"]
    cells = int(np.prod(s.arguments["kernel_size"]))
    channel = len(x.shape) - (3 if s.op == "aten.im2col" else 2)
    labels: Labels = t.of(x)
    for ids in labels[channel + 1 :]:
        t.lock(ids, f"it is a spatial axis of {short(s)} in {s.where()}")
    ids = labels[channel]
    if s.op == "aten.im2col":
        return [*labels[:channel], None if ids is None else np.repeat(ids, cells), None]
    kept, inner = split(t, s, ids, (s.shape[-3], cells))
    t.lock(inner, f"{short(s)} in {s.where()} turns it into space")
    return [*labels[:channel], kept, None, None]
