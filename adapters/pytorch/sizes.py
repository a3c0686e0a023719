"""The integers that layer classes repeat about their own tensors (`out_channels`, `normalized_shape`...).

After a re-indexing they are set again from the tensors, class by class. What a forward pass of a larger
module knows about sizes is not here but in `attributes` and `handlers`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import is_parametrized

from prunus.core.cost import IntArray
from prunus.core.errors import PlanError

Edit = tuple[tuple[int, ...], Mapping[int, IntArray]]
"""What happened to one tensor of a layer: (old shape, axis -> old index of each new one)."""
Edits = Mapping[str, Edit]


def follow_tensors(module: nn.Module, edits: Edits) -> None:
    """Sets the sizes that `module` repeats about its own tensors; `edits` by attribute ("weight")."""
    for kind, follow in _FOLLOWERS:
        if isinstance(module, kind):
            follow(module, edits)
            return
    _by_name(module, edits)


def follow_computed(model: nn.Module) -> None:
    """Sets the sizes of layers whose weight is computed from others and so in no edit.

    To be called when `groups` is what it is to be: a convolution's code sets it like any other attribute.
    """
    for module in model.modules():
        if isinstance(module, _ConvNd | nn.Linear) and "weight" not in module._parameters:
            shape = _shape_of_computed(module)
            if shape is not None:
                (_channels if isinstance(module, _ConvNd) else _features)(module, shape)


def _shape_of_computed(module: nn.Module) -> torch.Size | None:
    """By `torch.nn.utils.parametrize`, or by the hooks that came before it (weight_norm, spectral_norm, prune)."""
    if is_parametrized(module, "weight"):
        return _shape_of_parametrized(module)
    sources = (module._parameters.get(name) for name in ("weight_v", "weight_orig"))
    return next((source.shape for source in sources if source is not None), None)


@torch.no_grad()
def _shape_of_parametrized(module: nn.Module) -> torch.Size:
    parts = list(module.parametrizations.weight.modules())  # type: ignore[union-attr]
    modes = [part.training for part in parts]
    for part in parts:  # in training a spectral norm moves its vectors whenever it computes
        part.training = False
    try:
        return module.weight.shape  # type: ignore[return-value]
    finally:
        for part, mode in zip(parts, modes, strict=True):
            part.training = mode


def slots_after(indices: IntArray, per_slot: int) -> int:
    """Number of slots (groups of a convolution, of a GroupNorm) left when `indices` of an axis stay.

    Slots keep equal lengths, so the first run of indices from one old slot gives that length. In a growth
    the copies come after the originals, so that the first run is never mixed with one.
    Raises PlanError if the slots that remain differ in length.
    """
    slots = indices // per_slot
    changes = (slots != slots[0]).nonzero()[0]
    length = int(changes[0]) if len(changes) else len(slots)
    if len(slots) % length:
        raise PlanError(f"{len(slots)} channels do not divide into slots of {length}")
    return len(slots) // length


def _convolution(module: Any, edits: Edits) -> None:
    if "weight" not in edits:
        return
    old_shape, indices = edits["weight"]
    if 0 in indices and module.groups > 1:
        module.groups = slots_after(indices[0], old_shape[0] // module.groups)
    _channels(module, module.weight.shape)
    if any(axis > 1 for axis in indices):  # fewer taps, as many positions
        old, module.kernel_size = module.kernel_size, tuple(module.weight.shape[2:])
        module.padding = tuple(
            p - (o - n) // 2 for p, o, n in zip(module.padding, old, module.kernel_size, strict=True)
        )


def _channels(module: Any, shape: Sequence[int]) -> None:
    first, second = shape[:2]
    if isinstance(module, _ConvTransposeNd):
        module.in_channels, module.out_channels = first, second * module.groups
    else:
        module.in_channels, module.out_channels = second * module.groups, first


def _linear(module: Any, edits: Edits) -> None:
    if "weight" in edits:
        _features(module, module.weight.shape)


def _features(module: Any, shape: Sequence[int]) -> None:
    module.out_features, module.in_features = shape


def _batch_norm(module: Any, edits: Edits) -> None:
    attribute = next(iter(edits))
    module.num_features = getattr(module, attribute).shape[0]


def _group_norm(module: Any, edits: Edits) -> None:
    old_shape, indices = next(iter(edits.values()))
    module.num_groups = slots_after(indices[0], old_shape[0] // module.num_groups)
    module.num_channels = len(indices[0])


def _layer_norm(module: Any, edits: Edits) -> None:
    module.normalized_shape = tuple(module.weight.shape)


def _recurrent(module: Any, edits: Edits) -> None:
    module.hidden_size, module.input_size = module.weight_hh_l0.shape[1], module.weight_ih_l0.shape[1]
    module._init_flat_weights()


def _recurrent_cell(module: Any, edits: Edits) -> None:
    module.hidden_size, module.input_size = module.weight_hh.shape[1], module.weight_ih.shape[1]


def _embedding(module: Any, edits: Edits) -> None:
    module.num_embeddings, module.embedding_dim = module.weight.shape


def _prelu(module: Any, edits: Edits) -> None:
    module.num_parameters = module.weight.shape[0]


_NAMES = ("num_features", "num_channels", "normalized_shape", "channels", "dim")


def _by_name(module: nn.Module, edits: Edits) -> None:
    """Norms and scales of other libraries: one changed length, repeated under one of the usual names."""
    lengths = {(shape[axis], len(index)) for shape, indices in edits.values() for axis, index in indices.items()}
    if len(lengths) != 1:
        return
    ((old, new),) = lengths
    for name in _NAMES:
        value = module.__dict__.get(name)
        if type(value) is int and value == old:
            setattr(module, name, new)
        elif isinstance(value, tuple) and value == (old,):
            setattr(module, name, (new,))


_FOLLOWERS: tuple[tuple[type[nn.Module], Callable[[Any, Edits], None]], ...] = (
    (_ConvNd, _convolution),
    (nn.Linear, _linear),
    (_NormBase, _batch_norm),
    (nn.GroupNorm, _group_norm),
    (nn.LayerNorm, _layer_norm),
    (nn.RMSNorm, _layer_norm),
    (nn.RNNBase, _recurrent),
    (nn.RNNCellBase, _recurrent_cell),
    (nn.Embedding, _embedding),
    (nn.PReLU, _prelu),
)
