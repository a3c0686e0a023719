"""A model made ready for pruning, and the proof that every removal from it is right."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.nn.quantized import FloatFunctional, FXFloatFunctional
from torch.nn.parallel import DistributedDataParallel

from prunus.adapters.pytorch.attributes import Bindings, bind_attributes
from prunus.adapters.pytorch.blocks import with_sound_blocks
from prunus.adapters.pytorch.certification import certify
from prunus.adapters.pytorch.comparison import TOLERANCE, compare, state_of
from prunus.adapters.pytorch.equal_counts import reconcile
from prunus.adapters.pytorch.handlers import handled_name, install_handlers, needed
from prunus.adapters.pytorch.inputs import InputSpec
from prunus.adapters.pytorch.structural_copy import skeleton
from prunus.adapters.pytorch.tracing import Trace, trace_model
from prunus.adapters.pytorch.tracing.modes import learning_kept, moved_by_modes
from prunus.core.directives import Verification
from prunus.core.errors import TraceError
from prunus.core.graph import ChannelGraph, Keep

FLOATING = (FloatFunctional, FXFloatFunctional)
"""Modules that PyTorch counts among the quantized ones, though they only add: the model can be quantized later."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """What removal and growth need to know of a model."""

    trace: Trace
    bindings: Bindings
    """`bindings.edits(counts before, counts after)`: the attributes that follow."""
    handlers: Mapping[str, str]
    """module -> the handler it runs; belongs into every plan of this model."""
    bare: nn.Module
    """The prepared model without weights: the reference where tracing is true for one input alone."""

    @property
    def graph(self) -> ChannelGraph:
        """The certified graph: constraints of the Python code and locks included."""
        return self.trace.graph


def prepare(model: nn.Module, example_inputs: Tensor | tuple[Any, ...], *, certified: bool = True) -> Prepared:
    """Traces `model` and makes it ready for pruning, in place; its function does not change.

    Layers that hard-code sizes get their handlers. With `certified` (the default) random removals are
    tried on copies, and what the forward pass cannot follow is locked, with the reason. Raises TraceError
    if the model cannot be captured.
    """
    args = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    refuse_opaque(model)
    install_handlers(model, needed(model))
    handlers = {path: name for path, module in model.named_modules() if (name := handled_name(module))}
    with learning_kept(model):
        trace = trace_model(model, args)
        sample = trace.sample
        bindings = bind_attributes(model, trace, sample)
        trace.graph = reconcile(trace.graph, bindings.conflicts)
        if certified:
            trace.graph = with_sound_blocks(model, trace, certify(model, trace, bindings, sample), sample)
    return Prepared(trace, bindings, handlers, skeleton(model))


def refuse_opaque(model: nn.Module) -> None:
    """Raises TraceError for modules whose code or weights cannot be reached from Python, and for wrappers.

    The same for weights that are others in training than in evaluation. The model stays as it is.
    """
    empty = next((name for name, tensor in model.named_parameters() if tensor.is_meta), None)
    if empty is not None:
        raise TraceError(f"{empty} is on the meta device; load the weights first")
    for path, module in model.named_modules():
        where = f"{path or 'the model'} ({type(module).__name__})"
        if isinstance(module, torch.jit.ScriptModule):
            raise TraceError(
                f"{where} is compiled by torch.jit; prune the model that it was made from, then compile"
            )
        kind = type(module)
        if ".quantized" in kind.__module__ and kind.__module__.startswith("torch.") and kind not in FLOATING:
            raise TraceError(f"{where} is quantized; prune the model that it was made from, then quantize")
        if "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None:
            raise TraceError(
                f"{where} is compiled by torch.compile; prune the model that it was made from, then compile"
            )
        if isinstance(module, nn.DataParallel | DistributedDataParallel):
            raise TraceError(f"{where} is a wrapper; prune the model that it was made from, then wrap")
    moved = moved_by_modes(model)
    if moved is not None:
        path, name = moved
        raise TraceError(
            f"{path or 'the model'} ({type(model.get_submodule(path)).__name__}) changes {name} in train() and "
            "eval(), so that training and evaluation know different weights; merge or freeze them for good before "
            "pruning, so that both modes leave them alone"
        )


def verify(
    pruned: nn.Module,
    prepared: Prepared,
    tensors: Mapping[str, Tensor],
    keep: Keep,
    inputs: InputSpec | Tensor | tuple[Any, ...],
    *,
    without: Collection[str] = (),
    tolerance: float = TOLERANCE,
) -> Verification:
    """Masked against pruned (law 1) on `inputs`, or on random ones of a given kind.

    `tensors` is the state of the prepared model, in its shapes and with the weights from before the
    removal; `keep` what is left of it, `without` the blocks that are gone. Raises VerificationError where
    they differ by more than `tolerance` of the largest output, in float64 where float32 is too coarse.
    """
    if isinstance(inputs, InputSpec):
        inputs = inputs.example(2)
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    trace, bare = prepared.trace, prepared.bare
    return compare(pruned, trace, tensors, keep, args, bare=bare, without=without, tolerance=tolerance)


__all__ = ["Prepared", "prepare", "refuse_opaque", "state_of", "verify"]
