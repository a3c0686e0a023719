"""Channel graphs of networks described by their widths, for tests that need no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from prunus.core.blocks import Block
from prunus.core.cost import CostTerm, Extent
from prunus.core.graph import ChannelGraph, ChannelGroup, Slice


def mlp_graph(widths: Sequence[int], **options: Mapping[str, Any]) -> ChannelGraph:
    """A multilayer perceptron: `widths[0]` inputs, hidden groups "h0", "h1"..., `widths[-1]` outputs.

    Layer k has the tensors "fc{k}.weight" (out, in) and "fc{k}.bias". `options` overrides fields of a group:
    `mlp_graph([4, 8, 2], h0={"multiple_of": 2})`.
    """
    hidden = range(len(widths) - 2)
    groups = []
    for k in hidden:
        units = np.arange(widths[k + 1], dtype=np.int64)
        group = ChannelGroup(
            f"h{k}",
            widths[k + 1],
            (
                Slice(f"fc{k}.weight", 0, "writes", units),
                Slice(f"fc{k}.bias", 0, "scales", units),
                Slice(f"fc{k + 1}.weight", 1, "reads", units),
            ),
        )
        groups.append(replace(group, **dict(options.get(f"h{k}", {}))))
    extents = [Extent(widths[0]), *(Extent(0, ((1, (f"h{k}",)),)) for k in hidden), Extent(widths[-1])]
    terms: list[CostTerm] = []
    tensors: dict[str, tuple[int, ...]] = {}
    for k in range(len(widths) - 1):
        weight, bias = (extents[k + 1], extents[k]), (extents[k + 1],)
        terms.append(CostTerm("macs", f"fc{k}", 1, weight))
        axes: tuple[tuple[str, tuple[Extent, ...]], ...] = ((f"fc{k}.weight", weight), (f"fc{k}.bias", bias))
        for tensor, shape in axes:
            terms.append(CostTerm("params", tensor, 1, shape))
            terms.append(CostTerm("bytes", tensor, 4, shape))
        tensors[f"fc{k}.weight"] = (widths[k + 1], widths[k])
        tensors[f"fc{k}.bias"] = (widths[k + 1],)
    return ChannelGraph(groups, terms, tensors)


def residual_graph(width: int, inner: Sequence[int], spatial: int = 64, classes: int = 10) -> ChannelGraph:
    """A stem, residual blocks of two 3x3 convolutions on one stream, and a linear head.

    Groups: "stream" (written by the stem and every block's second convolution) and "inner0", "inner1"...
    Blocks: "block0", "block1"...
    """
    stream = np.arange(width, dtype=np.int64)
    slices = [Slice("stem.weight", 0, "writes", stream)]
    groups: list[ChannelGroup] = []
    of_stream = Extent(0, ((1, ("stream",)),))
    shapes: dict[str, tuple[int, ...]] = {"stem.weight": (width, 3, 3, 3)}
    layers: list[tuple[str, int, tuple[Extent, Extent]]] = [("stem.weight", 9, (of_stream, Extent(3)))]
    for k, units in enumerate(inner):
        index = np.arange(units, dtype=np.int64)
        first, second = f"block{k}.conv1.weight", f"block{k}.conv2.weight"
        slices += [Slice(first, 1, "reads", stream), Slice(second, 0, "writes", stream)]
        mine = (Slice(first, 0, "writes", index), Slice(second, 1, "reads", index))
        groups.append(ChannelGroup(f"inner{k}", units, mine))
        extent = Extent(0, ((1, (f"inner{k}",)),))
        shapes[first], shapes[second] = (units, width, 3, 3), (width, units, 3, 3)
        layers += [(first, 9, (extent, of_stream)), (second, 9, (of_stream, extent))]
    slices.append(Slice("head.weight", 1, "reads", stream))
    shapes["head.weight"] = (classes, width)
    terms = [CostTerm("macs", "head.weight", 1, (Extent(classes), of_stream))]
    terms += [CostTerm("macs", name, taps * spatial, extents) for name, taps, extents in layers]
    layers.append(("head.weight", 1, (Extent(classes), of_stream)))
    for name, taps, extents in layers:
        terms.append(CostTerm("params", name, taps, extents))
        terms.append(CostTerm("bytes", name, 4 * taps, extents))
    blocks = [
        Block(f"block{k}", frozenset({f"block{k}.conv1.weight", f"block{k}.conv2.weight"}), frozenset())
        for k in range(len(inner))
    ]
    return ChannelGraph([ChannelGroup("stream", width, tuple(slices)), *groups], terms, shapes, blocks)
