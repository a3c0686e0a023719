"""Operators that sum or compare over axes: matmul, einsum, attention, reductions, softmax, pooling."""

from __future__ import annotations

from typing import Any

from prunus.adapters.pytorch.tracing.labelling import (
    RULES,
    Label,
    Labelling,
    Labels,
    extent_of,
    operators,
    rule,
    short,
)
from prunus.adapters.pytorch.tracing.program import Step
from prunus.adapters.pytorch.tracing.reshape import split


def contract(
    t: Labelling, s: Step, operands: list[tuple[str, int | None, Step, list[str]]], output: list[str]
) -> Labels:
    """A product of tensors whose axes are named; names not in `output` are summed over.

    Each operand is (argument, position in it, step, axis names). A size-1 axis broadcasts.
    """
    sizes: dict[str, int] = {}
    labels: dict[str, Label] = {}
    for _, _, x, names in operands:
        for axis, name in enumerate(names):
            size, ids = x.shape[axis], t.of(x)[axis]
            if size == 1:
                sizes.setdefault(name, 1)
                labels.setdefault(name, None)
            elif sizes.get(name, 1) == 1:
                sizes[name], labels[name] = size, ids
            else:
                labels[name] = t.same(s, labels[name], ids)
    summed = [name for name in sizes if name not in output]
    weights = [t.is_weight(x) for _, _, x, _ in operands]
    for (argument, position, x, names), weight in zip(operands, weights, strict=True):
        for axis, name in enumerate(names):
            ids = t.of(x)[axis]
            if name in summed:
                t.contract(s, argument, axis, ids, position=position)
                if weight:
                    t.role(x, axis, ids, "reads")
            elif weight and not any(name in other for _, _, y, other in operands if y is not x):
                t.role(x, axis, ids, "writes")
    if not any(weights):
        t.ungateable(*(labels[name] for name in summed))
    if len(operands) > 1:
        fixed, free = extent_of([sizes[n] for n in sizes], [labels[n] for n in sizes])
        t.macs(s, fixed * (len(operands) - 1), free)
    return [labels[name] for name in output]


@rule(*operators("matmul bmm mm mv dot"))
def matmul(t: Labelling, s: Step) -> Labels:
    names = list(s.arguments)[:2]
    return _matmul(t, s, names[0], names[1])


@rule("aten.addmm", "aten.baddbmm", "aten.addmv")
def addmm(t: Labelling, s: Step) -> Labels:
    names = list(s.arguments)[1:3]
    labels = _matmul(t, s, names[0], names[1])
    bias = s.arguments["self"]
    offset = len(labels) - len(bias.shape)
    for axis, ids in enumerate(t.of(bias)):
        if bias.shape[axis] != 1:
            labels[axis + offset] = t.same(s, labels[axis + offset], ids)
    return labels


def _matmul(t: Labelling, s: Step, first: str, second: str) -> Labels:
    a, b = s.arguments[first], s.arguments[second]
    batch = [f"b{i}" for i in range(max(len(a.shape), len(b.shape)) - 2)]
    left = [*batch[len(batch) - max(len(a.shape) - 2, 0) :], "m", "k"][-len(a.shape) :]
    right = [*batch[len(batch) - max(len(b.shape) - 2, 0) :], "k", "n"][-len(b.shape) :]
    if len(a.shape) == 1:
        left = ["k"]
    if len(b.shape) == 1:
        right = ["k"]
    output = batch + (["m"] if "m" in left else []) + (["n"] if "n" in right else [])
    return contract(t, s, [(first, None, a, left), (second, None, b, right)], output)


@rule("aten.einsum")
def einsum(t: Labelling, s: Step) -> Labels:
    equation, tensors = s.arguments["equation"].replace(" ", ""), s.arguments["tensors"]
    inputs, _, output = equation.partition("->")
    terms = inputs.split(",")
    if "..." in equation or "->" not in equation:
        expanded = _ellipsis(terms, output if "->" in equation else None, tensors)
        if expanded is None:
            t.lock_inputs(s, f"einsum {equation!r} in {s.where()} is not understood")
            return [None] * len(s.shape)
        named, out = expanded
    else:
        named, out = [list(term) for term in terms], list(output)
    if any(len(set(names)) != len(names) for names in named):
        t.lock_inputs(s, f"einsum {equation!r} in {s.where()} takes a diagonal")
        return [None] * len(s.shape)
    operands = [("tensors", i, x, names) for i, (x, names) in enumerate(zip(tensors, named, strict=True))]
    return contract(t, s, operands, out)  # type: ignore[arg-type]


def _ellipsis(
    terms: list[str], output: str | None, tensors: list[Step]
) -> tuple[list[list[str]], list[str]] | None:
    if output is None:
        return None
    named, longest = [], 0
    for term, x in zip(terms, tensors, strict=True):
        before, dots, after = term.partition("...")
        extra = len(x.shape) - len(before) - len(after) if dots else 0
        longest = max(longest, extra)
        named.append([*before, *(f".{i}" for i in range(extra, 0, -1)), *after])
    before, dots, after = output.partition("...")
    return named, [*before, *((f".{i}" for i in range(longest, 0, -1)) if dots else ()), *after]


@rule("aten.scaled_dot_product_attention")
def attention(t: Labelling, s: Step) -> Labels:
    """softmax(q k' scale) v: heads are shared, query and value dimensions are not."""
    q, k, v, mask = (s.arguments[name] for name in ("query", "key", "value", "attn_mask"))
    labels: dict[str, Labels] = {"query": list(t.of(q)), "key": t.of(k), "value": t.of(v)}
    out: Labels = labels["query"][:-2]
    for axis in range(len(out)):
        for other, x in (("key", k), ("value", v)):
            if x.shape[axis] == q.shape[axis]:
                out[axis] = t.same(s, out[axis], labels[other][axis])
            elif x.shape[axis] != 1:
                _shared_heads(t, s, out[axis], labels[other][axis], x.shape[axis], q.shape[axis])
    depth = t.same(s, labels["query"][-1], labels["key"][-1])
    if s.arguments.get("scale") is None:
        t.lock(depth, f"attention in {s.where()} takes its scale from the head size: whole heads can go, no parts")
    t.contract(s, "query", len(out) + 1, depth)
    t.contract(s, "key", len(out) + 1, depth)
    t.ungateable(depth)
    tokens = t.same(s, labels["key"][-2], labels["value"][-2])
    t.lock(tokens, f"softmax in {s.where()} runs over it: what is left would change")
    queries = labels["query"][-2]
    if mask is not None:
        _masked(t, s, mask, [*out, queries, None])
    fixed, free = extent_of(q.shape[:-1], [*out, queries])
    for width, ids in ((q.shape[-1], depth), (v.shape[-1], labels["value"][-1])):
        t.macs(s, fixed * k.shape[-2] * (1 if ids is not None else width), [*free, ids])
    return [*out, queries, labels["value"][-1]]


def _shared_heads(t: Labelling, s: Step, queries: Label, keys: Label, few: int, many: int) -> None:
    """Each key head serves the same number of query heads, and goes together with them."""
    heads, served = split(t, s, queries, (few, many // few))
    t.lock(served, f"{many // few} query heads share each key head in {s.where()}")
    t.same(s, heads, keys)


def _masked(t: Labelling, s: Step, mask: Step, labels: Labels) -> None:
    offset = len(labels) - len(mask.shape)
    for axis, ids in enumerate(t.of(mask)):
        if mask.shape[axis] != 1:
            t.same(s, ids, labels[axis + offset])


def _axes(s: Step, rank: int, name: str = "dim") -> list[int]:
    dims = s.arguments.get(name)
    if dims is None or dims == []:
        return list(range(rank))
    return [d % rank for d in ([dims] if isinstance(dims, int) else dims)] if rank else []


def _reduced(s: Step, labels: Labels, axes: list[int]) -> Labels:
    if s.arguments.get("keepdim"):
        return [None if axis in axes else ids for axis, ids in enumerate(labels)]
    return [ids for axis, ids in enumerate(labels) if axis not in axes]


@rule(*operators("sum linalg_vector_norm norm count_nonzero nansum"))
def total(t: Labelling, s: Step) -> Labels:
    """A removed term is a zero in the sum."""
    name = next(iter(s.arguments))
    labels: Labels = t.of(s.arguments[name])
    axes = _axes(s, len(labels))
    for axis in axes:
        t.contract(s, name, axis, labels[axis])
        t.ungateable(labels[axis])
    return _reduced(s, labels, axes)


@rule(*operators("mean amax amin var std var_mean std_mean logsumexp"))
def statistic(t: Labelling, s: Step) -> Any:
    """Over a labelled axis the result depends on which indices are left."""
    labels: Labels = t.of(s.arguments["self"])
    axes = _axes(s, len(labels))
    t.statistic(s, *(labels[axis] for axis in axes))
    reduced = _reduced(s, labels, axes)
    return [reduced] * len(s.shapes) if isinstance(s.shapes, list) else reduced


@rule(*operators("max min argmax argmin topk sort argsort median prod any all mode kthvalue"))
def ranked(t: Labelling, s: Step) -> Any:
    """Positions along the axis come out, so it cannot shrink; the larger of two tensors is taken by entries."""
    if "other" in s.arguments:
        return RULES["aten.maximum"](t, s)
    labels: Labels = t.of(s.arguments["self"])
    axes = _axes(s, len(labels))
    for axis in axes:
        t.lock(labels[axis], f"{short(s)} in {s.where()} compares its entries")
    if s.op in ("aten.topk", "aten.sort", "aten.argsort"):
        kept: Labels = [None if axis in axes else ids for axis, ids in enumerate(labels)]
    else:
        kept = _reduced(s, labels, axes)
    return [kept] * len(s.shapes) if isinstance(s.shapes, list) else kept


@rule(*operators("softmax log_softmax cumsum cumprod _softmax _log_softmax gumbel_softmax logcumsumexp fft_fft"))
def along(t: Labelling, s: Step) -> Labels:
    labels: Labels = list(t.of(s.arguments["self"]))
    axis = s.arguments["dim"]
    t.lock(labels[axis], f"{short(s)} in {s.where()} runs over it: what is left would change")
    labels[axis] = None
    return labels


POOLS = operators(
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d "
    "adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d "
    "adaptive_max_pool3d max_pool2d_with_indices lp_pool2d"
)
UPSAMPLING = operators(
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d upsample_bicubic2d "
    "upsample_linear1d upsample_trilinear3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa "
    "_upsample_nearest_exact2d grid_sampler grid_sampler_2d affine_grid_generator"
)


@rule(*POOLS, *UPSAMPLING)
def spatial(t: Labelling, s: Step) -> Any:
    """Works within each channel; the spatial axes cannot shrink."""
    x = next(s.inputs())
    labels: Labels = t.of(x)
    width = 1 if "1d" in s.op else 3 if "3d" in s.op else 2
    for ids in labels[-width:]:
        t.lock(ids, f"it is a spatial axis of {short(s)} in {s.where()}")
    for other in list(s.inputs())[1:]:
        for ids in t.of(other):
            t.lock(ids, f"it steers {short(s)} in {s.where()}")
    kept: Labels = [*labels[:-width], *([None] * width)]
    return [kept] * len(s.shapes) if isinstance(s.shapes, list) else kept


@rule(*operators("arange linspace scalar_tensor eye tril_indices"))
def positions(t: Labelling, s: Step) -> Labels:
    return [None] * len(s.shape)
