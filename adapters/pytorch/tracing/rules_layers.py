"""Layers with weights: linear, convolution, embedding, normalisation, recurrent."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from prunus.adapters.pytorch.tracing.labelling import (
    Label,
    Labelling,
    Labels,
    extent_of,
    ids_or_true,
    rule,
    tidy,
)
from prunus.adapters.pytorch.tracing.program import Step
from prunus.adapters.pytorch.tracing.reshape import split


@rule("aten.linear")
def linear(t: Labelling, s: Step) -> Labels:
    x, weight, bias = s.arguments["input"], s.arguments["weight"], s.arguments["bias"]
    labels: Labels = list(t.of(x))
    w: Labels = t.of(weight)
    read = t.same(s, labels[-1], w[-1])
    t.contract(s, "input", len(labels) - 1, read)
    t.role(weight, len(w) - 1, read, "reads")
    fixed, free = extent_of(x.shape[:-1], labels[:-1])
    spans, wide = extent_of(weight.shape, w)
    t.macs(s, fixed * spans, [*free, *wide])
    written = w[0] if len(w) == 2 else None
    if bias is not None and written is not None:
        written = t.same(s, written, t.of(bias)[0])
    t.role(weight, 0, written, "writes")
    return [*labels[:-1], written] if len(w) == 2 else labels[:-1]


CONVOLUTIONS = ("aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.convolution")
TRANSPOSED = ("aten.conv_transpose1d", "aten.conv_transpose2d", "aten.conv_transpose3d")


@rule(*CONVOLUTIONS, *TRANSPOSED)
def convolution(t: Labelling, s: Step) -> Labels:
    x, weight, bias = s.arguments["input"], s.arguments["weight"], s.arguments["bias"]
    groups = int(s.arguments["groups"])
    transposed = s.op in TRANSPOSED or bool(s.arguments.get("transposed", False))
    batched = len(x.shape) == len(weight.shape)
    channel = 1 if batched else 0
    labels: Labels = t.of(x)
    w: Labels = t.of(weight)
    for ids in [*labels[channel + 1 :], *w[2:]]:
        t.lock(ids, f"it is a spatial axis of a convolution in {s.where()}")
    read_axis, write_axis = (0, 1) if transposed else (1, 0)
    if groups == 1:
        t.same(s, labels[channel], w[read_axis])
        t.role(weight, read_axis, w[read_axis], "reads")
        t.role(weight, write_axis, w[write_axis], "writes")
        written = w[write_axis]
    else:
        written = _grouped(t, s, x.shape[channel], labels[channel], groups, transposed)
    t.contract(s, "input", channel, labels[channel])
    if bias is not None:
        written = t.same(s, written, t.of(bias)[0])
    spatial = prod(x.shape[channel + 1 :]) if transposed else prod(s.shape[channel + 1 :])
    batch = x.shape[0] if batched else 1
    spans, wide = extent_of(weight.shape, w)
    rows = [labels[0]] if batched else []
    t.macs(s, spans * spatial * (1 if rows and rows[0] is not None else batch), [*wide, *rows])
    return [*rows, written, *([None] * (len(s.shape) - channel - 1))]


def _grouped(t: Labelling, s: Step, channels: int, x: Label, groups: int, transposed: bool) -> Label:
    """Slots of a grouped convolution: x channel = (slot, place read), output channel = (slot, place written).

    The slot axis of the weight is implied by the channels around it, so it counts as written (as a
    per-channel scale where each slot is one channel) and is never gated itself.
    """
    weight = s.arguments["weight"]
    w: Labels = t.of(weight)
    outer = w[0]
    first, second = (channels // groups, weight.shape[1]) if transposed else (weight.shape[0] // groups, 0)
    slots, place = split(t, s, outer, (groups, first))
    into_slots, into = split(t, s, x, (groups, channels // groups))
    slots = t.same(s, slots, into_slots)
    t.literal(s, "groups", None, groups, slots)
    if transposed:
        place = t.same(s, place, into)
        t.role(weight, 0, place, "reads")
        t.role(weight, 1, w[1], "writes")
        t.role(weight, 0, slots, "scales" if channels == groups else "writes")
        return _joined(t, slots, groups, w[1], second)
    t.same(s, into, w[1])
    t.role(weight, 1, w[1], "reads")
    t.role(weight, 0, place, "writes")
    t.role(weight, 0, slots, "scales" if channels == groups else "writes")
    return outer


def _joined(t: Labelling, a: Label, n: int, b: Label, m: int) -> Label:
    if a is None and b is None:
        return None
    return tidy(t.variables.both(np.repeat(ids_or_true(a, n), m), np.tile(ids_or_true(b, m), n)))


@rule("aten.embedding")
def embedding(t: Labelling, s: Step) -> Labels:
    weight, indices = s.arguments["weight"], s.arguments["indices"]
    rows, written = t.of(weight)
    t.lock(rows, f"its rows are looked up by index in {s.where()}")
    t.role(weight, 1, written, "writes")
    return [*t.of(indices), written]


@rule("aten.batch_norm", "aten.instance_norm", "aten.native_batch_norm")
def channel_norm(t: Labelling, s: Step) -> Any:
    x = s.arguments["input"]
    labels: Labels = list(t.of(x))
    running = bool(s.arguments.get("training", s.arguments.get("use_input_stats")))
    for name in ("weight", "bias", "running_mean", "running_var"):
        affine = s.arguments[name]
        if affine is not None:
            labels[1] = t.same(s, labels[1], t.of(affine)[0])
    if running:
        t.statistic(s, *(ids for axis, ids in enumerate(labels) if axis != 1 and _reduces(s, axis)))
    return labels


def _reduces(s: Step, axis: int) -> bool:
    return axis > 1 or s.op == "aten.batch_norm"


@rule("aten._weight_norm")
def weight_norm(t: Labelling, s: Step) -> Labels:
    """Direction and length of a weight: its norm runs over all axes but one."""
    direction, length, axis = s.arguments["v"], s.arguments["g"], s.arguments["dim"]
    labels: Labels = list(t.of(direction))
    labels[axis] = t.same(s, labels[axis], t.of(length)[axis])
    t.statistic(s, *(ids for other, ids in enumerate(labels) if other != axis))
    return labels


@rule("aten.layer_norm", "aten.rms_norm")
def layer_norm(t: Labelling, s: Step) -> Labels:
    x, sizes = s.arguments["input"], s.arguments["normalized_shape"]
    labels: Labels = list(t.of(x))
    start = len(labels) - len(sizes)
    for position in range(len(sizes)):
        axis = start + position
        for name in ("weight", "bias"):
            affine = s.arguments.get(name)
            if affine is not None and affine.shape[position] > 1:
                labels[axis] = t.same(s, labels[axis], t.of(affine)[position])
        t.literal(s, "normalized_shape", position, sizes[position], labels[axis])
        t.statistic(s, labels[axis])
    return labels


@rule("aten.group_norm")
def group_norm(t: Labelling, s: Step) -> Labels:
    """Whole groups can go without a trace; channels within a group leave their statistics behind."""
    x, groups = s.arguments["input"], s.arguments["num_groups"]
    labels: Labels = list(t.of(x))
    for name in ("weight", "bias"):
        if s.arguments[name] is not None:
            labels[1] = t.same(s, labels[1], t.of(s.arguments[name])[0])
    slots, within = split(t, s, labels[1], (groups, x.shape[1] // groups))
    t.literal(s, "num_groups", None, groups, slots)
    t.statistic(s, within, *labels[2:])
    return labels


GATES = {"aten.lstm": 4, "aten.gru": 3, "aten.rnn_tanh": 1, "aten.rnn_relu": 1}


@rule(*GATES)
def recurrent(t: Labelling, s: Step) -> Any:
    """All layers and directions share one hidden size, as the Python module has one number for it."""
    x, states, weights = s.arguments["input"], s.arguments["hx"], list(s.arguments["params"])
    states = states if isinstance(states, list | tuple) else [states]
    directions = 2 if s.arguments["bidirectional"] else 1
    per_cell = 4 if s.arguments["has_biases"] else 2
    labels: Labels = t.of(x)
    if len(weights) != per_cell * directions * s.arguments["num_layers"]:
        t.lock_inputs(s, f"recurrent projections in {s.where()} are not supported")
        return t.free(s)
    hidden: Label = t.of(weights[1])[1]
    into, steps = labels[-1], x.shape[0] * x.shape[1]
    t.contract(s, "input", len(labels) - 1, into)
    for cell in range(0, len(weights), per_cell):
        w_input, w_hidden, *biases = weights[cell : cell + per_cell]
        if hidden is not None:
            gates = np.tile(hidden, GATES[s.op])
            for tensor in (w_input, w_hidden, *biases):
                t.same(s, t.of(tensor)[0], gates)
            t.same(s, t.of(w_hidden)[1], hidden)
        layer = cell // (per_cell * directions)
        source = into if layer == 0 else _directions(hidden, directions)
        t.same(s, t.of(w_input)[1], source)
        t.role(w_input, 0, hidden, "writes")
        t.role(w_input, 1, source, "reads")
        t.role(w_hidden, 1, hidden, "reads")
        t.contract(s, "params", 1, hidden, position=cell + 1)
        if layer:
            t.contract(s, "params", 1, source, position=cell)
        for tensor in (w_input, w_hidden):
            spans, wide = extent_of(tensor.shape, t.of(tensor))
            t.macs(s, steps * spans, wide)
    for state in states:
        t.same(s, t.of(state)[-1], hidden)
    out = [*labels[:-1], _directions(hidden, directions)]
    return [out, *([None, None, hidden] for _ in states)]


CELLS = {"aten.lstm_cell": 4, "aten.gru_cell": 3, "aten.rnn_tanh_cell": 1, "aten.rnn_relu_cell": 1}


@rule(*CELLS)
def recurrent_cell(t: Labelling, s: Step) -> Any:
    """One step of a recurrence that the model's own loop makes: input and states are (batch, features)."""
    x, states = s.arguments["input"], s.arguments["hx"]
    w_input, w_hidden = s.arguments["w_ih"], s.arguments["w_hh"]
    biases = [b for b in (s.arguments["b_ih"], s.arguments["b_hh"]) if b is not None]
    states = states if isinstance(states, list | tuple) else [states]
    labels: Labels = t.of(x)
    hidden, into = t.of(w_hidden)[1], t.same(s, labels[-1], t.of(w_input)[1])
    if hidden is not None:
        gates = np.tile(hidden, CELLS[s.op])
        for tensor in (w_input, w_hidden, *biases):
            t.same(s, t.of(tensor)[0], gates)
    for state in states:
        t.same(s, t.of(state)[-1], hidden)
    t.contract(s, "input", len(labels) - 1, into)
    t.contract(s, "w_hh", 1, hidden)
    t.role(w_input, 0, hidden, "writes")
    t.role(w_input, 1, into, "reads")
    t.role(w_hidden, 1, hidden, "reads")
    fixed, free = extent_of(x.shape[:-1], labels[:-1])
    for tensor in (w_input, w_hidden):
        spans, wide = extent_of(tensor.shape, t.of(tensor))
        t.macs(s, fixed * spans, [*free, *wide])
    out = [*labels[:-1], hidden]
    return [out, out] if len(states) > 1 else out


def _directions(hidden: Label, directions: int) -> Label:
    return None if hidden is None else np.tile(hidden, directions)


@rule("torchvision.deform_conv2d")
def deformable(t: Labelling, s: Step) -> Labels:
    """A convolution whose taps move: offsets and mask steer space and cannot shrink."""
    for name in ("offset", "mask"):
        for ids in t.of(s.arguments[name]):
            t.lock(ids, f"it steers a deformable convolution in {s.where()}")
    x, weight, bias = s.arguments["input"], s.arguments["weight"], s.arguments["bias"]
    labels, w = t.of(x), t.of(weight)
    if s.arguments["groups"] != 1 or s.arguments["offset_groups"] != 1:
        t.lock_inputs(s, f"grouped deformable convolution in {s.where()} is not supported")
        return t.free(s)
    read = t.same(s, labels[1], w[1])
    t.contract(s, "input", 1, read)
    t.role(weight, 1, w[1], "reads")
    written = t.same(s, w[0], t.of(bias)[0]) if bias.shape else w[0]
    t.role(weight, 0, written, "writes")
    spans, wide = extent_of(weight.shape, w)
    t.macs(s, spans * prod(s.shape[2:]) * s.shape[0], wide)
    return [None, written, None, None]


@rule("torchvision.roi_align", "torchvision.roi_pool")
def regions(t: Labelling, s: Step) -> Any:
    """Crops within each channel."""
    channels = t.of(s.arguments["input"])[1]
    for ids in t.of(s.arguments["rois"]):
        t.lock(ids, f"its values are boxes in {s.where()}")
    return [None, channels, None, None] if isinstance(s.shapes, tuple) else t.free(s)


@rule("torchvision.nms")
def suppression(t: Labelling, s: Step) -> Any:
    t.lock_inputs(s, f"its values are boxes in {s.where()}")
    return t.free(s)
