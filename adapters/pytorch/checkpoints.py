"""Reading weights from files that cannot execute code, and fitting them to a model."""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import adapt_input_conv
from torch import Tensor, nn

from prunus.core.errors import LoadError

_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Keys under which training scripts keep the weights; the averaged ones are what they evaluate."""
_PICKLED = (".pth", ".pt", ".bin", ".tar")
_COUNTER = "num_batches_tracked"


@dataclass(frozen=True, slots=True)
class Fit:
    """How a checkpoint fitted."""

    head: bool
    """True if the classifier was loaded too."""
    notes: tuple[str, ...] = ()


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file, or of a `.pth`/`.pt`/`.bin` file read with weights_only.

    Raises LoadError if the file is missing, damaged, holds anything but plain weights, or if a weight is
    not finite.
    """
    if path.is_dir():
        inside = sorted(file.name for file in path.iterdir() if file.suffix in (".safetensors", *_PICKLED))
        raise LoadError(
            f"checkpoint {path} is a folder; give a file{f', such as {path / inside[0]}' if inside else ''}"
        )
    if not path.is_file():
        raise LoadError(f"no checkpoint at {path}")
    if path.suffix == ".safetensors":
        weights = _read_safetensors(path)
    elif path.suffix in _PICKLED:
        weights = _read_pickled(path)
    else:
        raise LoadError(
            f"checkpoint {path} has an unknown ending; allowed are .safetensors, {', '.join(_PICKLED[:-1])}"
        )
    refuse_non_finite(weights, f"checkpoint {path}")
    return weights


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise LoadError(f"checkpoint {path} is not a readable safetensors file: {error}") from None


def _read_pickled(path: Path) -> dict[str, Tensor]:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # plain data; timm's script stores its own
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise LoadError(
            f"checkpoint {path} holds more than plain weights and could run code when it is read; "
            "save its state_dict() alone, best as safetensors"
        ) from None
    except OSError as error:
        raise LoadError(f"checkpoint {path} cannot be read: {_first_line(error)}") from None
    except Exception as error:  # bytes of anything else, taken for instructions, fail in any way
        raise LoadError(
            f"checkpoint {path} cannot be read, it is damaged or no file of torch.save "
            f"({type(error).__name__}: {_first_line(error)})"
        ) from None
    content = _unwrapped(content)
    if not isinstance(content, Mapping):
        raise LoadError(f"checkpoint {path} holds a {type(content).__name__}, not a dictionary of weights")
    weights = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not weights:
        raise LoadError(f"checkpoint {path} holds no weights; its keys are {', '.join(map(str, content))[:200]}")
    return _without_prefix(weights)


def _unwrapped(content: Any) -> Any:
    while isinstance(content, Mapping):
        inner = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            return content
        content = inner
    return content


def _without_prefix(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in ("module.", "_orig_mod."):  # left behind by DataParallel and torch.compile
        if all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


def refuse_non_finite(weights: Mapping[str, Tensor], origin: str) -> None:
    """Raises LoadError naming the first tensor that holds NaN or infinity."""
    for name, value in weights.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise LoadError(f"{origin}: {name} holds NaN or infinity")


def head_classes(weights: Mapping[str, Tensor], model: nn.Module, head: Collection[str]) -> int | None:
    """The number of classes that a checkpoint of `model` was trained for, read off its classifier `head`."""
    own = model.state_dict()
    named = named_as(weights, own, head)
    for name in head:
        if name in named and named[name].ndim and named[name].shape[1:] == own[name].shape[1:]:
            return int(named[name].shape[0])
    return None


def fit_weights(model: nn.Module, weights: Mapping[str, Tensor], head: Collection[str], origin: str) -> Fit:
    """Loads `weights` into `model`, in place. `head` names the tensors that depend on the number of classes.

    Where names differ but all tensors agree in order and shape, they are taken in order. A stem for colour
    images is summed to fit grey ones, as timm does. A classifier for other classes is left as it was
    initialised. Every such step is a note. Raises LoadError naming the first mismatch otherwise.
    """
    own = model.state_dict()
    notes: list[str] = []
    given = named_as(weights, own, head)
    if given is not weights:
        notes.append(f"{origin}: {len(given)} tensors have other names; taken in order, all shapes agree")
    given = {name: _grey(value, own.get(name), name, notes) for name, value in given.items()}
    wrong = [name for name in head if name in given and name in own and given[name].shape != own[name].shape]
    if wrong:
        theirs, ours = given[wrong[0]].shape[0], own[wrong[0]].shape[0]
        notes.append(f"classifier resized from {theirs} to {ours} classes; it starts untrained")
        given = {name: value for name, value in given.items() if name not in head}
    _refuse_mismatch(given, own, set(head) if wrong else set(), origin)
    model.load_state_dict(given, strict=False)
    return Fit(head=not wrong, notes=tuple(notes))


def named_as(
    weights: Mapping[str, Tensor], own: Mapping[str, Tensor], head: Collection[str]
) -> Mapping[str, Tensor]:
    """`weights` under the names of `own` if the two agree in order and shape but not in names, else as given.

    The classifier `head` may differ in its number of classes, the stem in its number of colours.
    """
    theirs, ours = _counted(weights), _counted(own)
    if len(theirs) != len(ours) or set(theirs) == set(ours):
        return weights
    for given, name in zip(theirs, ours, strict=True):
        one, other = weights[given].shape, own[name].shape
        if one != other and not (name in head and one[1:] == other[1:]) and not _colour_stem(one, other):
            return weights
    return {name: weights[given] for given, name in zip(theirs, ours, strict=True)}


def _counted(weights: Mapping[str, Tensor]) -> list[str]:
    return [name for name in weights if not name.endswith(_COUNTER)]


def _colour_stem(theirs: Sequence[int], ours: Sequence[int]) -> bool:
    if len(theirs) != 4 or len(ours) != 4 or (theirs[1], ours[1]) != (3, 1):
        return False
    return theirs[0] == ours[0] and theirs[2:] == ours[2:]


def _grey(value: Tensor, own: Tensor | None, name: str, notes: list[str]) -> Tensor:
    if own is None or not _colour_stem(value.shape, own.shape):
        return value
    notes.append(f"{name}: the weights of the 3 colours were summed for grey images")
    return adapt_input_conv(1, value)


def _refuse_mismatch(
    given: Mapping[str, Tensor], own: Mapping[str, Tensor], excused: Collection[str], origin: str
) -> None:
    def refuse(what: str) -> LoadError:
        return LoadError(f"{origin} is of another model: {what}")

    for name in own:
        if name in excused or name.endswith(_COUNTER):
            continue
        if name not in given:
            raise refuse(f"it has no {name}")
        if given[name].shape != own[name].shape:
            theirs, ours = tuple(given[name].shape), tuple(own[name].shape)
            raise refuse(f"{name} has shape {theirs} in it, {ours} in the model")
    extra = [name for name in given if name not in own]
    if extra:
        raise refuse(f"the model has no {extra[0]} ({len(extra)} such tensors)")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
