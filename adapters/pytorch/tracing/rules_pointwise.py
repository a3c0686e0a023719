"""Operators that work element by element: axes pass through, operands broadcast against each other."""

from __future__ import annotations

from typing import Any

from prunus.adapters.pytorch.tracing.labelling import Label, Labelling, Labels, operators, rule
from prunus.adapters.pytorch.tracing.program import Step

UNARY = operators(
    "abs acos acosh alpha_dropout asin asinh atan atanh bernoulli bitwise_not ceil celu clone "
    "contiguous conj cos cosh deg2rad detach dropout elu erf erfc erfinv exp exp2 expm1 fill "
    "feature_dropout fix floor frac gelu hardshrink hardsigmoid hardswish hardtanh isfinite isinf "
    "isnan leaky_relu lgamma lift_fresh_copy log log10 log1p log2 log_sigmoid logical_not logit mish "
    "neg negative positive rad2deg reciprocal relu relu6 round rrelu rsqrt selu sgn sigmoid sign silu "
    "sin sinc sinh softplus softshrink softsign sqrt square tan tanh threshold to trunc type_as zero "
    "alias _to_copy bfloat16 half float double tanhshrink lift_fresh rand_like randn_like zeros_like "
    "ones_like full_like empty_like uniform normal native_dropout"
)

BINARY = operators(
    "add sub mul div rsub true_divide floor_divide divide multiply subtract pow maximum minimum fmax "
    "fmin eq ne lt le gt ge not_equal greater less less_equal greater_equal logical_and logical_or "
    "logical_xor bitwise_and bitwise_or bitwise_xor __and__ __or__ __xor__ remainder fmod atan2 hypot "
    "lerp masked_fill addcmul addcdiv copy float_power xlogy heaviside __iand__ __ior__ "
    "binary_cross_entropy_with_logits clamp clamp_max clamp_min clip nan_to_num"
)


@rule(*UNARY)
def unary(t: Labelling, s: Step) -> Any:
    """The result has the axes of the first operand."""
    source = next(s.inputs(), None)
    if source is None:
        return t.free(s)
    labels: Labels = t.of(source)
    return labels if isinstance(s.shapes, tuple) else [labels] * len(s.shapes or [])


@rule(*BINARY)
def broadcast(t: Labelling, s: Step) -> Labels:
    """Right-aligned axes longer than one live and die together; an axis of one imposes nothing."""
    operands = [x for x in s.inputs() if isinstance(x.shapes, tuple)]
    return broadcast_labels(t, s, operands)


def broadcast_labels(t: Labelling, s: Step, operands: list[Step]) -> Labels:
    rank = len(s.shape)
    result: Labels = []
    for axis in range(rank):
        present: list[Label] = []
        for operand in operands:
            at = axis - (rank - len(operand.shape))
            if at >= 0 and operand.shape[at] != 1:
                present.append(t.of(operand)[at])
        label = present[0] if present else None
        for other in present[1:]:
            label = t.same(s, label, other)
        result.append(label)
    return result


@rule("aten.where")
def where(t: Labelling, s: Step) -> Labels:
    if not isinstance(s.shapes, tuple):
        t.lock_inputs(s, f"its positions are looked up in {s.where()}")
        return t.free(s)
    return broadcast(t, s)


@rule("aten.meshgrid", "aten.broadcast_tensors")
def several(t: Labelling, s: Step) -> Any:
    """Grids of positions: nothing on them can shrink."""
    t.lock_inputs(s, f"positions are made from it in {s.where()}")
    return t.free(s)


@rule("getitem")
def item(t: Labelling, s: Step) -> Any:
    """One result of several."""
    return t.of(s.arguments["a"])[s.arguments["b"]]


@rule("aten.prelu")
def prelu(t: Labelling, s: Step) -> Labels:
    x, weight = s.arguments["self"], s.arguments["weight"]
    labels: Labels = list(t.of(x))
    if weight.shape and weight.shape[0] > 1:
        labels[1] = t.same(s, labels[1], t.of(weight)[0])
    return labels


@rule("aten.glu")
def glu(t: Labelling, s: Step) -> Labels:
    """The halves of one axis gate each other."""
    x = s.arguments["self"]
    axis = s.arguments["dim"] % len(x.shape)
    labels: Labels = list(t.of(x))
    ids = labels[axis]
    if ids is not None:
        labels[axis] = t.same(s, ids[: len(ids) // 2], ids[len(ids) // 2 :])
    return labels


@rule(
    "aten.sym_size",
    "aten._assert_tensor_metadata",
    "aten._assert_async",
    "aten._assert_scalar",
    "aten.item",
    "_set_grad_enabled",
    "sym_constrain_range",
    "aten.sym_constrain_range_for_size",
    "aten.sym_constrain_range",
    "_enter_autocast",
    "_exit_autocast",
)
def nothing(t: Labelling, s: Step) -> Any:
    """Checks and mode switches say nothing about axes."""
    return t.free(s)
