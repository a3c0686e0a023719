"""Operators that pick entries by position: slice, select, index, gather."""

from __future__ import annotations

from prunus.adapters.pytorch.tracing.labelling import (
    Label,
    Labelling,
    Labels,
    operators,
    rule,
    short,
    tidy,
)
from prunus.adapters.pytorch.tracing.program import Step


def _fixed(t: Labelling, s: Step, ids: Label) -> Label:
    t.lock(ids, f"{short(s)} in {s.where()} moves its entries by position")
    return None


@rule("aten.roll")
def roll(t: Labelling, s: Step) -> Labels:
    labels: Labels = list(t.of(s.arguments["self"]))
    for axis in s.arguments["dims"] or range(len(labels)):
        labels[axis] = _fixed(t, s, labels[axis])
    return labels


@rule("aten.slice")
def slice_(t: Labelling, s: Step) -> Labels:
    labels: Labels = list(t.of(s.arguments["self"]))
    length = s.arguments["self"].shape[s.arguments["dim"]]
    axis, step = s.arguments["dim"], s.arguments["step"]
    ids = labels[axis]
    if ids is None:
        return labels
    start, stop, _ = slice(s.arguments["start"], s.arguments["end"], step).indices(length)
    if step == 1:
        if start:
            t.literal(s, "start", None, s.arguments["start"], ids[:start])
        if stop < length:
            t.literal(s, "end", None, s.arguments["end"], ids[:stop])
    elif len(ids) != length // step * step or start >= step or stop < length:
        t.lock(ids, f"slice in {s.where()} takes every {step}th entry of it from {start} to {stop}")
    else:  # removing whole periods keeps the stride right
        for offset in range(1, step):
            t.same(s, ids[::step], ids[offset::step])
    labels[axis] = tidy(ids[start:stop:step])
    return labels


@rule("aten.narrow")
def narrow(t: Labelling, s: Step) -> Labels:
    labels: Labels = list(t.of(s.arguments["self"]))
    axis, start, length = s.arguments["dim"], s.arguments["start"], s.arguments["length"]
    ids = labels[axis]
    if ids is not None:
        t.literal(s, "start", None, start, ids[:start])
        t.literal(s, "length", None, length, ids[start : start + length])
        labels[axis] = tidy(ids[start : start + length])
    return labels


@rule("aten.select")
def select(t: Labelling, s: Step) -> Labels:
    labels: Labels = list(t.of(s.arguments["self"]))
    t.lock(labels.pop(s.arguments["dim"]), f"single entries of it are picked by position in {s.where()}")
    return labels


@rule("aten.unbind")
def unbind(t: Labelling, s: Step) -> list[Labels]:
    labels: Labels = list(t.of(s.arguments["self"]))
    reason = f"its entries have jobs of their own (as query, key and value have) in {s.where()}"
    t.lock(labels.pop(s.arguments["dim"]), reason)
    return [labels for _ in s.shapes]


@rule("aten.index", "aten._unsafe_index")
def index(t: Labelling, s: Step) -> Labels:
    """Indexed axes are locked; the index axes take their place (in front, if they are not adjacent)."""
    x, indices = s.arguments["self"], s.arguments["indices"]
    labels: Labels = t.of(x)
    used = [axis for axis, i in enumerate(indices) if i is not None]
    for axis in used:
        t.lock(labels[axis], f"its entries are looked up by index in {s.where()}")
    for i in indices:
        if i is not None:
            for ids in t.of(i):
                t.lock(ids, f"it is used as an index in {s.where()}")
    free = [ids for axis, ids in enumerate(labels) if axis not in used]
    added = len(s.shape) - len(free)
    at = used[0] if used and used == list(range(used[0], used[-1] + 1)) else 0
    return free[:at] + [None] * added + free[at:]


@rule(*operators("index_select gather take_along_dim scatter scatter_add index_add"))
def gather(t: Labelling, s: Step) -> Labels:
    x = s.arguments["self"]
    labels: Labels = list(t.of(x))
    axis = s.arguments["dim"] or 0
    t.lock(labels[axis], f"its entries are looked up by index in {s.where()}")
    labels[axis] = None
    for other in list(s.inputs())[1:]:
        if len(other.shape) == len(labels):
            for i, ids in enumerate(t.of(other)):
                if i != axis % len(labels):
                    labels[i] = t.same(s, labels[i], ids)
    return labels


@rule("aten.index_put", "aten._index_put_impl")
def index_put(t: Labelling, s: Step) -> Labels:
    """Entries of the leading axes are overwritten by position; the other axes pair up with the new values'."""
    x, indices, values = s.arguments["self"], s.arguments["indices"], s.arguments["values"]
    used = len(indices)
    if any(i is None for i in indices):
        return _overwritten(t, s)
    labels: Labels = list(t.of(x))
    for ids in labels[:used]:
        t.lock(ids, f"its entries are overwritten by index in {s.where()}")
    given: Labels = t.of(values)
    for back in range(1, len(labels) - used + 1):
        if back <= len(given) and values.shape[-back] != 1:
            labels[-back] = t.same(s, labels[-back], given[-back])
    for ids in given[: max(len(given) - (len(labels) - used), 0)]:
        t.lock(ids, f"its entries are written by index in {s.where()}")
    return [*([None] * used), *labels[used:]]


@rule("aten.masked_scatter", "aten.select_scatter", "aten.slice_scatter")
def _overwritten(t: Labelling, s: Step) -> Labels:
    t.lock_inputs(s, f"parts of it are overwritten in {s.where()}")
    return [None] * len(s.shape)


@rule("aten.unfold")
def unfold(t: Labelling, s: Step) -> Labels:
    labels: Labels = list(t.of(s.arguments["self"]))
    axis = s.arguments["dimension"]
    t.lock(labels[axis], f"windows slide over it in {s.where()}")
    labels[axis] = None
    return [*labels, None]
