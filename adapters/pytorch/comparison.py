"""Pruned against masked: the measurement behind law 1."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from prunus.adapters.pytorch.decisions import Decision, decision, following, grounds
from prunus.adapters.pytorch.double_precision import DoublePrecision
from prunus.adapters.pytorch.structural_copy import with_tensors
from prunus.adapters.pytorch.tracing import Trace, masked_call
from prunus.adapters.pytorch.tracing.capture import forget_derived
from prunus.adapters.pytorch.tracing.modes import (
    learning_kept,
    named_tensors,
    overrides_modes,
    same_values,
    set_mode,
)
from prunus.adapters.pytorch.tracing.program import Step
from prunus.core.directives import Verification
from prunus.core.errors import TraceError, VerificationError
from prunus.core.graph import Keep

TOLERANCE = 1e-4
"""Largest accepted difference, relative to the largest output."""

SAME_OPERATORS = 1e-6
"""Largest difference between two runs of the same operators in float32, relative to the largest output."""


def compare(
    pruned: nn.Module,
    trace: Trace,
    tensors: Mapping[str, Tensor],
    keep: Keep,
    args: tuple[Any, ...],
    *,
    bare: nn.Module,
    without: Collection[str] = (),
    tolerance: float = TOLERANCE,
    in_double: bool = True,
) -> Verification:
    """The difference between `pruned` in eval mode and the masked reference, on `args`.

    `tensors` is the state (parameters and buffers) of the traced model before the removal, `keep` the
    units that stay, `without` the blocks that do not, `bare` the traced model, with or without weights. A
    difference beyond `tolerance` is looked at again in float64 (not without `in_double`, nor where the
    model cannot run in it); one that remains raises VerificationError.
    """
    whole = {group: keep.get(group, range(units)) for group, units in trace.graph.units.items()}
    reference = _Reference(trace, bare, tensors, whole, without)
    worst = _measured(pruned, reference, args)
    if in_double and not _relative(worst) <= tolerance:
        worst = _in_double(pruned, reference, args) or worst
    if not _relative(worst) <= tolerance and not without:
        worst = _in_one_batch(pruned, reference, args) or worst
    return verified(
        worst,
        "the pruned model is not the masked one",
        "Lock the groups at fault, or report the model",
        tolerance,
    )


def verified(worst: Worst, problem: str, advice: str, tolerance: float = TOLERANCE) -> Verification:
    """The figures of a proof. Raises VerificationError, with what is wrong and what to do, if it failed."""
    error, scale = worst
    if not _relative(worst) <= tolerance:
        raise VerificationError(
            f"{problem}: outputs differ by {error:.3g} where the largest is {scale:.3g} "
            f"(allowed: {tolerance:.0e} of it). {advice}",
            max_error=error,
            scale=scale,
        )
    return Verification("exact", error, scale)


def follows_program(
    pruned: nn.Module, trace: Trace, tensors: Mapping[str, Tensor], keep: Keep, args: tuple[Any, ...]
) -> bool:
    """Whether the Python code of `pruned` computes what the captured program does with the removed units gone.

    The same operators on the same shapes: rounding plays no part, so that float32 decides.
    """
    whole: dict[str, Any] = {group: keep.get(group, range(units)) for group, units in trace.graph.units.items()}
    with torch.no_grad(), _kept(pruned), evaluating(pruned):
        return _relative(distance(pruned(*args), trace.pruned_output(tensors, whole, args))) <= SAME_OPERATORS


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by each of its names, as `verify` needs it; not copied."""
    return named_tensors(model)


def copied_state(model: nn.Module) -> dict[str, Tensor]:
    """`state_of`, copied: for a model that is about to change."""
    return {name: tensor.detach().clone() for name, tensor in state_of(model).items()}


Worst = tuple[float, float]
"""Largest absolute difference of the worst output, and that output's largest absolute value."""


@dataclass(frozen=True, slots=True)
class _Reference:
    """The masked original."""

    trace: Trace
    bare: nn.Module
    tensors: Mapping[str, Tensor]
    keep: Mapping[str, Any]
    without: Collection[str]
    in_python: bool = False
    """By the Python code, masked, instead of the captured program."""

    def outputs(self, pruned: nn.Module, args: tuple[Any, ...]) -> tuple[Any, Any]:
        """What `pruned` and the masked original answer to `args`.

        The reference is the captured program; where that is true for one input alone, the Python code: then
        `pruned` goes the way of its decisions, and what they were taken on belongs to the answers.
        """
        if not (self.trace.program.concrete or self.in_python):
            return pruned(*args), self.trace.masked_output(self.tensors, self.keep, args, self.without)
        taken: list[Decision] = []

        def observe(step: Step, arguments: Mapping[str, Any], result: Any) -> None:
            found = decision(step, arguments, result)
            if found is not None:
                taken.append(found)

        whole = with_tensors(self.bare, self.tensors)
        expected = masked_call(whole, self.trace.graph, self.keep, args, observe=observe)
        outputs, pairs = following(pruned, taken, args)
        mine, theirs = grounds(pairs)
        return (outputs, mine), (expected, theirs)


def _measured(pruned: nn.Module, reference: _Reference, args: tuple[Any, ...]) -> Worst:
    forget_derived(pruned)  # of tensors that have lost units since
    with torch.no_grad(), _kept(pruned), evaluating(pruned):
        return distance(*reference.outputs(pruned, args))


@contextmanager
def _kept(model: nn.Module) -> Iterator[None]:
    """A model may count its calls, or freeze layers on a switch of modes; a look at it is neither."""
    values = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    held = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    try:
        with learning_kept(model):
            yield
    finally:
        for buffers, found in held:
            buffers.update(found)
        for buffer, before in values:
            if not same_values(buffer, before):
                buffer.copy_(before)


def _in_one_batch(pruned: nn.Module, reference: _Reference, args: tuple[Any, ...]) -> Worst | None:
    """For a model whose answer to an image depends on the others: the captured program takes them one by one.

    So `pruned` is compared with it on one image, and on all of them with the Python code, masked. None where one
    is all there is, or the Python code cannot be masked.
    """
    program = reference.trace.program
    one = tuple(x[: program.batch] if isinstance(x, Tensor) and x.dim() else x for x in args)
    if program.concrete or all(x is y or x.shape == y.shape for x, y in zip(one, args, strict=True)):
        return None
    try:
        together = _measured(pruned, replace(reference, in_python=True), args)
    except TraceError:
        return None
    return max(_measured(pruned, reference, one), together, key=_rank)


def _in_double(pruned: nn.Module, reference: _Reference, args: tuple[Any, ...]) -> Worst | None:
    """The same in float64; None for a model with an operator that knows float32 alone."""
    whole = replace(reference, tensors=_double(reference.tensors))
    try:
        with DoublePrecision():
            return _measured(with_tensors(pruned, _double(state_of(pruned))), whole, _double(args))
    except RuntimeError:
        return None


def _double(value: Any) -> Any:
    return pytree.tree_map(
        lambda leaf: leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf,
        dict(value) if isinstance(value, Mapping) else value,
    )


def distance(got: Any, expected: Any) -> Worst:
    """Over all output tensors, the worst; infinite where shapes, numbers of outputs or NaNs differ."""
    found = [leaf for leaf in pytree.tree_leaves(got) if isinstance(leaf, Tensor)]
    wanted = [leaf for leaf in pytree.tree_leaves(expected) if isinstance(leaf, Tensor)]
    if not wanted or [leaf.shape for leaf in found] != [leaf.shape for leaf in wanted]:
        return float("inf"), 0.0
    worst: Worst = (0.0, 0.0)
    for a, b in zip(found, wanted, strict=True):
        if b.numel():
            a, b = a.double(), b.double()
            error, scale = float((a - b).masked_fill(a == b, 0.0).abs().max()), float(_finite(b).abs().max())
            worst = max(worst, (error if math.isfinite(error) else math.inf, scale), key=_rank)
    return worst


def _finite(values: Tensor) -> Tensor:
    """Infinity marks what is left out, and is no scale to measure by."""
    return values.masked_fill(values.isinf(), 0.0)


def _relative(worst: Worst) -> float:
    error, scale = worst
    return error / scale if scale else error


def _rank(worst: Worst) -> Worst:
    return _relative(worst), worst[1]


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Eval mode for the block; afterwards every submodule is in the mode it was in.

    Code of the model's own that runs on the way in runs on the way out as well, as if the user had switched.
    """
    modes = [(m, m.training) for module in modules for m in module.modules()]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for submodule, mode in modes:
            if submodule.training != mode and overrides_modes(submodule):
                set_mode(submodule, mode)
        for submodule, mode in modes:
            submodule.training = mode
