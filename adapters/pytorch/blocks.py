"""Residual blocks of a PyTorch model: taken out, gated, measured, and proven to be removable."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from prunus.adapters.pytorch.branches import Branch
from prunus.adapters.pytorch.comparison import compare, state_of
from prunus.adapters.pytorch.structural_copy import structural_copy
from prunus.adapters.pytorch.tracing import Trace
from prunus.core.errors import PlanError
from prunus.core.graph import ChannelGraph


class PassThrough(nn.Identity):
    """What stands where a block was that takes more than its input (masks, positions)."""

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return input


def remove_blocks(model: nn.Module, names: Collection[str]) -> list[nn.Parameter]:
    """Puts identities in the place of the modules `names`, in place; returns the parameters that are gone.

    PyTorch's own where the module takes nothing but its input. Raises PlanError, before anything is changed,
    for a name that is no module.
    """
    modules = dict(model.named_modules())
    for name in names:
        if not name or name not in modules:
            raise PlanError(f"the model has no block {name!r}: the plan is of another model")
    gone: dict[int, nn.Parameter] = {}
    for name in sorted(names, key=lambda path: -path.count(".")):  # an inner block before the outer one
        home, _, attribute = name.rpartition(".")
        block = modules[name]
        gone.update((id(parameter), parameter) for parameter in block.parameters())
        identity = nn.Identity() if _takes_one(block) else PassThrough()
        modules[home]._modules[attribute] = identity.train(block.training)
    return list(gone.values())


def _takes_one(module: nn.Module) -> bool:
    taken = list(inspect.signature(module.forward).parameters.values())
    return len(taken) == 1 and taken[0].kind is not inspect.Parameter.VAR_POSITIONAL


def inside(path: str, blocks: Collection[str]) -> bool:
    """True if a module or tensor belongs to one of the blocks."""
    return any(path == name or path.startswith(f"{name}.") for name in blocks)


class BlockGates:
    """Factors of what blocks add to their input, and branches to their sum, while their hooks are on a model."""

    def __init__(self, model: nn.Module, gates: Mapping[str, float]) -> None:
        """`gates`: block -> factor; 1 leaves the block as it is."""
        modules = dict(model.named_modules())
        self._gated = [(modules[name], gate) for name, gate in gates.items() if gate != 1.0]

    def __bool__(self) -> bool:
        return bool(self._gated)

    def hooks(self) -> Iterator[RemovableHandle]:
        """Registers them; remove the handles to take the gates off."""
        for module, gate in self._gated:
            if isinstance(module, Branch):
                yield module.register_forward_hook(lambda module, args, output, gate=gate: gate * output)
            else:
                yield from _watching(module, lambda x, output, gate=gate: x + gate * (output - x))


def _watching(module: nn.Module, change: Any) -> Iterator[RemovableHandle]:
    """Calls `change` with the input and output of each call; what it returns, unless None, is the output.

    The input is copied before the call: a block may add to it in place.
    """
    inputs: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        inputs.append(args[0].clone())

    def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Any:
        return change(inputs.pop(), output)

    yield module.register_forward_pre_hook(before)
    yield module.register_forward_hook(after)


class BlockChanges:
    """How much each block changes what passes through it, summed over images."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self._modules = {name: module for name, module in model.named_modules() if name in names}
        self.sums = {name: torch.zeros(3, dtype=torch.float64) for name in names}
        """block -> sum of relative energies, sum of 1 - cosine, images."""

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Adds up all calls within the block of code."""
        handles: list[RemovableHandle] = []
        for name, module in self._modules.items():
            handles += _watching(module, lambda x, output, name=name: self._add(name, x, output))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, name: str, x: Tensor, output: Tensor) -> None:
        before, after = (t.detach().flatten(1).double().cpu() for t in (x, output))
        energy = (after - before).square().sum(1) / after.square().sum(1).clamp(min=1e-30)
        cosine = nn.functional.cosine_similarity(before, after, dim=1, eps=1e-15)
        count = torch.tensor(float(len(before)), dtype=torch.float64)
        self.sums[name] += torch.stack([energy.sum(), (1 - cosine).sum(), count])


def with_sound_blocks(model: nn.Module, trace: Trace, graph: ChannelGraph, args: tuple[Any, ...]) -> ChannelGraph:
    """`graph` with those blocks alone that the forward of `model` can do without.

    The trace proves blocks on the captured program; the Python code may still ask a block for something
    that an identity has not. All are taken out of a copy together; where that fails, halves are.
    """
    sound = set(_sound(model, trace, tuple(graph.blocks), args))
    blocks = [block for name, block in graph.blocks.items() if name in sound]
    return ChannelGraph(graph.groups.values(), graph.terms, graph.tensors, blocks)


def _sound(model: nn.Module, trace: Trace, names: tuple[str, ...], args: tuple[Any, ...]) -> tuple[str, ...]:
    if not names or _runs_without(model, trace, names, args):
        return names
    if len(names) == 1:
        return ()
    middle = len(names) // 2
    return _sound(model, trace, names[:middle], args) + _sound(model, trace, names[middle:], args)


def _runs_without(model: nn.Module, trace: Trace, names: tuple[str, ...], args: tuple[Any, ...]) -> bool:
    short = structural_copy(model)
    remove_blocks(short, names)
    try:
        compare(short, trace, state_of(model), {}, args, bare=model, without=names)
    except Exception:  # the model's own code, which misses something: the block is not offered
        return False
    return True
