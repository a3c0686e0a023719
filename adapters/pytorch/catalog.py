"""Models by the names that users type: `timm/...`, `torchvision/...`, `prunus/...`, `python:module:factory`.

Grey images: a timm or prunus model gets a stem for one channel (`in_chans=1`); torchvision's models have no
such option, so their grey images are repeated to three channels. A factory of the user's may take `in_chans`, or
make a model for the channels of the data. `BuiltModel.input` says which.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunus.adapters.pytorch.checkpoints import Fit, fit_weights, head_classes, read_weights, refuse_non_finite
from prunus.adapters.pytorch.copies import in_eval
from prunus.adapters.pytorch.families import FAMILIES, Family, PythonFamily, TimmFamily
from prunus.adapters.pytorch.inputs import ImageFacts, InputSpec
from prunus.core.errors import LoadError
from prunus.core.plan import ModelSource

_SMALL = 64
"""Images up to this side are not blown up to the size a model was published for, unless it is pretrained."""
_COARSEST = 32
"""The total stride of most published models: smaller images would leave nothing of the last map."""


@dataclass(frozen=True, slots=True)
class BuiltModel:
    """A model, how to build it again, and what it wants to see."""

    module: nn.Module
    source: ModelSource
    """Name and keywords that build the same architecture, without weights."""
    input: InputSpec
    has_weights: bool
    """True if all weights, the classifier's included, come from a pretrained model or a checkpoint."""
    classes: int | None
    """Length of the classifier's output, None where there is no single one (detection, optical flow)."""
    notes: tuple[str, ...] = ()
    """What was changed on the way, in words for the user."""


def build(
    name: str,
    *,
    classes: int | None = None,
    in_chans: int | None = None,
    image: ImageFacts | None = None,
    pretrained: bool = False,
    checkpoint: Path | None = None,
    img_size: int | None = None,
    kwargs: Mapping[str, Any] | None = None,
    allow_python: bool = True,
    seed: int = 0,
) -> BuiltModel:
    """The model of that name for the data's `classes`, `in_chans` and `image` size, initialised from `seed`.

    `classes` and `in_chans` of None leave the model as published. Raises LoadError (unknown name, with the
    nearest ones; weights that cannot be had or do not fit; an input size that the model cannot take).
    """
    if pretrained and checkpoint is not None:
        raise LoadError("--pretrained and --checkpoint exclude each other: both say where the weights come from")
    family, short = _resolve(name, allow_python)
    options = dict(kwargs or {})
    spec = _input_spec(family, short, options, in_chans, image, img_size, pretrained)
    options.update(family.size_keywords(short, spec, img_size is not None or image is not None))
    options.update(family.channel_keywords(short, in_chans))
    if classes is not None:
        options.update(family.class_keywords(short, classes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if checkpoint is not None:
            module, fit, options = _from_checkpoint(family, short, options, checkpoint, classes)
        elif pretrained:
            module, fit = _pretrained(family, short, options, classes)
        else:
            module, fit = family.construct(short, options), Fit(head=False)
    module.eval()
    published = family.published_input(short, kwargs or {}, pretrained).size[1:]
    if isinstance(family, TimmFamily) and spec.size[1:] == published:
        # nothing to try out, and trying takes seconds on a large model
        outputs: int | None = int(module.num_classes)  # type: ignore[arg-type]
    else:
        spec, outputs = _tried(module, spec, in_chans, name)
    if classes is not None and outputs is not None and outputs != classes:
        raise LoadError(f"{name} answers with {outputs} classes, the data has {classes}")
    source = ModelSource(name=name, kwargs=options)
    return BuiltModel(module, source, spec, fit.head, outputs, fit.notes)


def construct(source: ModelSource, *, allow_python: bool = False) -> nn.Module:
    """The architecture that `source` names, with fresh weights, in eval mode.

    `python:` factories run code of the user's and are built only if `allow_python`; names and keywords from
    a file can do nothing but choose an architecture. Raises LoadError.
    """
    family, short = _resolve(source.name, allow_python)
    return in_eval(family.construct(short, dict(source.kwargs)))


def _resolve(name: str, allow_python: bool) -> tuple[Family, str]:
    prefix, separator, short = name.partition(":" if name.startswith("python:") else "/")
    family = FAMILIES.get(prefix)
    if family is None or not separator or not short:
        known = ", ".join("python:MODULE:FACTORY" if key == "python" else f"{key}/NAME" for key in FAMILIES)
        hint = next((f" Did you mean '{key}/{name}'?" for key, f in FAMILIES.items() if f.knows(name)), "")
        raise LoadError(f"{name!r} is not the name of a model; names look like {known}.{hint}")
    if isinstance(family, PythonFamily) and not allow_python:
        raise LoadError(f"{name!r} would run code; a name of that kind is taken from the user only (--trust)")
    family.require(short)
    return family, short


def _input_spec(
    family: Family,
    short: str,
    options: Mapping[str, Any],
    in_chans: int | None,
    image: ImageFacts | None,
    img_size: int | None,
    pretrained: bool,
) -> InputSpec:
    """The published input, unless the user gives a size or the images are small and nothing is pretrained."""
    spec = family.published_input(short, options, pretrained)
    if family.takes_channels(short):
        spec = spec.with_channels(int(options.get("in_chans") or in_chans or spec.size[0]))
    if image is not None and image.mean is not None and image.std is not None and not pretrained:
        channels = spec.size[0]
        spec = replace(spec, mean=(image.mean,) * channels, std=(image.std,) * channels)
    if img_size is not None:
        return replace(spec, size=(spec.size[0], img_size, img_size))
    if image is None or image.size is None or max(image.size) > _SMALL or pretrained:
        return spec
    if family.any_size:
        return replace(spec, size=(spec.size[0], *image.size))
    side = -(-max(image.size) // _COARSEST) * _COARSEST
    return replace(spec, size=(spec.size[0], side, side))


def _pretrained(family: Family, short: str, options: dict[str, Any], classes: int | None) -> tuple[nn.Module, Fit]:
    module, published = family.pretrained(short, options)
    refuse_non_finite(module.state_dict(), f"the pretrained weights of {short}")
    fits = classes is None or published is None or classes == published
    note = f"classifier resized from {published} to {classes} classes; it starts untrained"
    return module, Fit(head=fits, notes=() if fits else (note,))


def _from_checkpoint(
    family: Family, short: str, options: dict[str, Any], path: Path, classes: int | None
) -> tuple[nn.Module, Fit, dict[str, Any]]:
    weights = read_weights(path)
    module = family.construct(short, options)
    head = _head_tensors(family, short, options, module)
    if classes is None:  # the checkpoint knows how many classes it was trained for
        found = head_classes(weights, module, head)
        if found is not None and found != head_classes(module.state_dict(), module, head):
            options = {**options, **family.class_keywords(short, found)}
            module = family.construct(short, options)
    return module, fit_weights(module, weights, head, f"checkpoint {path}"), options


def _head_tensors(family: Family, short: str, options: dict[str, Any], module: nn.Module) -> tuple[str, ...]:
    """Names of the tensors whose shape depends on the number of classes."""
    more = family.class_keywords(short, 7919)  # a number of classes that no model has
    if not more:
        return ()
    other = family.construct(short, {**options, **more}).state_dict()
    own = module.state_dict()
    return tuple(name for name, value in own.items() if name not in other or other[name].shape != value.shape)


def _tried(module: nn.Module, spec: InputSpec, in_chans: int | None, name: str) -> tuple[InputSpec, int | None]:
    """`spec` and the number of classes; with the data's `in_chans` where the model takes no others."""
    try:
        return spec, _dry_run(module, spec, name)
    except LoadError:
        if spec.kind != "image" or in_chans is None or in_chans == spec.size[0]:
            raise
        other = spec.with_channels(in_chans)
        with contextlib.suppress(LoadError):
            return other, _dry_run(module, other, name)
        raise


def _dry_run(module: nn.Module, spec: InputSpec, name: str) -> int | None:
    """The length of the output for one blank image; None for outputs that are not (batch, classes)."""
    if spec.kind != "image":
        return None
    try:
        with torch.no_grad():  # not inference mode: models cache tensors that training needs later
            output = module(torch.zeros(1, *spec.size))
    except Exception as error:  # a model may fail on a size in any way it likes
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise LoadError(
            f"{name} cannot take images of {'x'.join(map(str, spec.size))} ({reason}); try another --img-size"
        ) from None
    return int(output.shape[1]) if isinstance(output, Tensor) and output.ndim == 2 else None
