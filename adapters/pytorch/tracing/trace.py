"""`trace_model`: what can be removed from a model, what it costs, and how to prove it."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

# Importing the rules registers them.
from prunus.adapters.pytorch.tracing import (
    rules_contractions,
    rules_indexing,
    rules_layers,
    rules_pointwise,
    rules_shapes,
)
from prunus.adapters.pytorch.tracing.capture import capture
from prunus.adapters.pytorch.tracing.grouping import Grouping
from prunus.adapters.pytorch.tracing.labelling import RULES, Contraction, Labelling, Multiplications
from prunus.adapters.pytorch.tracing.program import Program, Step
from prunus.adapters.pytorch.tracing.residuals import Residual, blocks_of, find_residuals
from prunus.core.cost import CostTerm, Extent, IntArray
from prunus.core.errors import TraceError
from prunus.core.graph import ChannelGraph

NAMED = 10
"""Modules that a notice names before it counts the rest."""

RULE_MODULES = (rules_contractions, rules_indexing, rules_layers, rules_pointwise, rules_shapes)


@dataclass(frozen=True, slots=True)
class LiteralSite:
    """A number in the forward pass that follows the kept counts, and so may stand in a Python attribute."""

    step: int
    """Index of the step in the captured program."""
    op: str
    argument: str
    position: int | None
    """Place within a list argument, None for a plain number."""
    value: int
    extent: Extent
    """The new value."""
    owner: str
    """Path of the module whose forward holds the number."""
    owner_class: str


@dataclass(eq=False, repr=False)
class Trace:
    """Everything known about a model after one look at it, in the coordinates of that model."""

    graph: ChannelGraph
    sites: tuple[LiteralSite, ...]
    program: Program
    grouping: Grouping
    labels: Mapping[Step, Any]
    """The labels of every step's result."""
    contractions: Sequence[Contraction]
    statistics: frozenset[Step]
    unknown: Mapping[str, str]
    """Operators that no rule knows -> the module that ran them; what they touch is locked."""
    residuals: Mapping[str, Residual]
    """Of every block of the graph (and of those that certification turned down), where its branches join."""
    sample: tuple[Any, ...]
    """The arguments that were traced: one sample, or the batch as given where the model takes no smaller one."""
    notices: tuple[str, ...] = ()
    """What could not be looked at, in words for the user."""

    def masked_output(
        self,
        tensors: Mapping[str, Tensor],
        keep: Mapping[str, Sequence[int]],
        inputs: Any,
        without: Collection[str] = (),
    ) -> Any:
        """What the model computes when only `keep` lives: the reference every removal is compared with.

        `tensors` is the state dict of the whole model, `inputs` a tensor or the tuple of arguments; the
        batch may be any multiple of the traced one. Blocks `without` which it is add zeros.
        """
        from prunus.adapters.pytorch.oracle import Oracle

        return Oracle(self, tensors, keep, mode="mask", without=without).run(inputs)

    def pruned_output(
        self,
        tensors: Mapping[str, Tensor],
        keep: Mapping[str, Sequence[int]],
        inputs: Any,
        without: Collection[str] = (),
    ) -> Any:
        """The same from the restricted tensors and re-derived literals: proves the graph, not the Python code."""
        from prunus.adapters.pytorch.oracle import Oracle

        return Oracle(self, tensors, keep, mode="prune", without=without).run(inputs)


def trace_model(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...],
    example_kwargs: Mapping[str, Any] | None = None,
) -> Trace:
    """Trace `model` as it runs in eval mode on one sample of `example_inputs`.

    On all of them where one sample does not run: frames of a clip may be folded into the batch. Parameters that
    only training uses (auxiliary heads) are traced in train mode as well. The model is left as it was. Raises
    TraceError if it cannot be captured.
    """
    args = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    kwargs = dict(example_kwargs or {})
    program, sample, whole = _captured(model, args, kwargs)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    floating = {name for name, tensor in tensors.items() if tensor.is_floating_point()}
    unused = {name for name, _ in model.named_parameters()} - {step.name for step in program.steps}
    labelling = Labelling()
    labels = labelling.run(program, floating.__contains__)
    literals, multiplications = list(labelling.literals), list(labelling.multiplications)
    contractions, statistics = list(labelling.contractions), frozenset(labelling.statistics)
    notices: list[str] = []
    if whole:
        size = _batch_of(args)
        notices.append(f"one sample alone does not run: MACs are those of the whole batch of {size} given")
    if unused:
        pair = args if whole else with_batch(args, 2)
        notices += _label_training(labelling, model, pair, kwargs, floating, unused)
        labelling.literals, labelling.multiplications = literals, multiplications
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    grouping = Grouping(labelling)
    sliced = {piece.tensor for group in grouping.groups for piece in group.slices}
    graph = ChannelGraph(
        grouping.groups,
        [*_macs_terms(grouping, multiplications), *_size_terms(grouping, labelling, model, tensors)],
        {name: shapes[name] for name in labelling.tensors if name in sliced},
    )
    residuals = find_residuals(program, model)
    graph = ChannelGraph(graph.groups.values(), graph.terms, graph.tensors, blocks_of(graph, residuals))
    sites = tuple(
        LiteralSite(
            x.step.index,
            x.step.op,
            x.argument,
            x.position,
            x.value,
            grouping.extent(x.ids),
            x.step.owner,
            x.step.owner_class,
        )
        for x in literals
        if grouping.extent(x.ids).terms
    )
    return Trace(
        graph,
        sites,
        program,
        grouping,
        labels,
        contractions,
        statistics,
        labelling.unknown,
        residuals,
        sample,
        tuple(notices),
    )


def _captured(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Program, tuple[Any, ...], bool]:
    """The program, what it was captured on, and whether that is all of `args`: where no single sample runs."""
    one = with_batch(args, 1)
    try:
        return capture(model, one, kwargs), one, False
    except TraceError:
        if one is args or _batch_of(args) == 1:
            raise
    return capture(model, args, kwargs), args, True


def _label_training(
    labelling: Labelling,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    floating: set[str],
    unused: set[str],
) -> tuple[str, ...]:
    """Auxiliary heads run in train mode only, and must follow what they read.

    A train-mode forward that needs more than the example inputs (targets, larger images) cannot be captured:
    then the `unused` parameters keep their sizes, which the notices say. So do those that no mode uses, because
    another argument or another image size would.
    """
    fate = "These layers keep their sizes"
    try:
        program = capture(model, args, kwargs, training=True)
    except TraceError as error:
        return (
            f"{_owners(model, unused)}: not used in eval mode, and train mode could not be looked at ({error}). "
            f"{fate}: training through them fails once what they read is pruned. Use inputs on which train mode "
            "runs, or a model without them",
        )
    labelling.run(program, floating.__contains__)
    unused = unused - {step.name for step in program.steps}
    sizes = dict(model.named_parameters())
    unused = {name for name in unused if sizes[name].numel() > 1}  # a number follows nothing
    if not unused:
        return ()
    return (
        f"{_owners(model, unused)}: not used on the example inputs, in eval mode or in train mode. {fate}: what "
        "runs them fails once what they read is pruned. Use inputs on which they run, or a model without them",
    )


def _owners(model: nn.Module, unused: Collection[str]) -> str:
    """The largest modules of which nothing is used, and parameters of others, in words."""
    used = {name for name, _ in model.named_parameters()} - set(unused)
    partly = {name[:i] for name in used for i, letter in enumerate(name) if letter == "."}
    found = []
    for name in unused:
        parts = name.split(".")
        paths = (".".join(parts[: i + 1]) for i in range(len(parts)))
        found.append(next((path for path in paths if path not in partly), name))
    owners = sorted(set(found))
    rest = f" and {len(owners) - NAMED} more" if len(owners) > NAMED else ""
    return ", ".join(owners[:NAMED]) + rest


def with_batch(args: tuple[Any, ...], size: int) -> tuple[Any, ...]:
    """The arguments with a batch of `size`, if all tensors agree on what the batch is."""
    tensors = [x for x in args if isinstance(x, Tensor)]
    if not tensors or any(x.dim() < 2 for x in tensors) or len({x.shape[0] for x in tensors}) != 1:
        return args
    index = np.resize(np.arange(tensors[0].shape[0]), size)
    return tuple(x[index] if isinstance(x, Tensor) else copy.copy(x) for x in args)


def _batch_of(args: tuple[Any, ...]) -> int:
    """The batch size that all tensors agree on; 1 where they do not."""
    sizes = {x.shape[0] if x.dim() else 1 for x in args if isinstance(x, Tensor)}
    return sizes.pop() if len(sizes) == 1 else 1


def _macs_terms(grouping: Grouping, multiplications: Sequence[Multiplications]) -> list[CostTerm]:
    return [_term(grouping, "macs", x.step.owner or x.step.op, x.coefficient, x.axes) for x in multiplications]


def _size_terms(
    grouping: Grouping, labelling: Labelling, model: nn.Module, tensors: Mapping[str, Tensor]
) -> list[CostTerm]:
    parameters = {name for name, _ in model.named_parameters()}
    stored = set(model.state_dict())
    terms = []
    for name, tensor in tensors.items():
        labels = labelling.tensors.get(name, [None] * tensor.dim())
        fixed = 1
        for size, ids in zip(tensor.shape, labels, strict=True):
            fixed *= size if ids is None else 1
        axes = tuple(ids for ids in labels if ids is not None)
        if name in parameters:
            terms.append(_term(grouping, "params", name, fixed, axes))
        if name in stored:
            terms.append(_term(grouping, "bytes", name, fixed * tensor.element_size(), axes))
    return terms


def _term(
    grouping: Grouping, quantity: Any, source: str, coefficient: int, axes: tuple[IntArray, ...]
) -> CostTerm:
    """Lengths that cannot change move into the coefficient."""
    extents = []
    for extent in (grouping.extent(ids) for ids in axes):
        if extent.terms:
            extents.append(extent)
        else:
            coefficient *= extent.constant
    return CostTerm(quantity, source, coefficient, tuple(extents))


__all__ = ["RULES", "LiteralSite", "Trace", "trace_model"]
