"""The families of models that can be built by name, each with its ways of saying the same things."""

from __future__ import annotations

import difflib
import importlib
import inspect
import logging
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import timm
import torchvision.models
from timm.data import resolve_data_config
from timm.models import get_pretrained_cfg, is_model
from torch import nn

from prunus.adapters.pytorch.inputs import IMAGENET_MEAN, IMAGENET_STD, InputKind, InputSpec
from prunus.adapters.pytorch.zoo import ZOO
from prunus.core.errors import LoadError

_INSTEAD = "give --checkpoint FILE instead"
_FORBIDDEN = frozenset(
    {
        *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "checkpoint_path"),
        *("cache_dir", "weights", "weights_backbone", "scriptable", "exportable", "features_only"),
    }
)
"""Keywords that reach for files or change what is built into something else."""


class Family(ABC):
    """One source of models. `short` is the name without its prefix."""

    any_size: ClassVar[bool] = False
    """True if small images can be taken as they are."""

    @abstractmethod
    def names(self) -> Iterable[str]: ...

    @abstractmethod
    def construct(self, short: str, options: Mapping[str, Any]) -> nn.Module:
        """Fresh weights. Raises LoadError if the keywords are refused."""

    def knows(self, short: str) -> bool:
        return short in self.names()

    def require(self, short: str) -> None:
        """Raises LoadError naming the nearest names if there is no such model."""
        if not self.knows(short):
            raise _unknown(self.prefix, short, self.names())

    @property
    @abstractmethod
    def prefix(self) -> str: ...

    def published_input(self, short: str, options: Mapping[str, Any], pretrained: bool) -> InputSpec:
        return InputSpec((3, 224, 224), IMAGENET_MEAN, IMAGENET_STD)

    def takes_channels(self, short: str) -> bool:
        return True

    def channel_keywords(self, short: str, in_chans: int | None) -> dict[str, Any]:
        return {} if in_chans is None or not self.takes_channels(short) else {"in_chans": in_chans}

    def class_keywords(self, short: str, classes: int) -> dict[str, Any]:
        return {"num_classes": classes}

    def size_keywords(self, short: str, spec: InputSpec, changed: bool) -> dict[str, Any]:
        """Keywords that a model with a fixed input size needs for `spec`."""
        return {}

    def pretrained(self, short: str, options: Mapping[str, Any]) -> tuple[nn.Module, int | None]:
        """With published weights, and the number of classes those were trained for."""
        raise LoadError(f"{self.prefix}/{short} has no published weights; give --checkpoint FILE instead")


class TimmFamily(Family):
    prefix = "timm"

    def names(self) -> Iterable[str]:
        return timm.list_models()

    def knows(self, short: str) -> bool:
        return is_model(short)

    def require(self, short: str) -> None:
        if not is_model(short):
            raise _unknown("timm", short, timm.list_models())
        try:
            get_pretrained_cfg(short)
        except RuntimeError:
            name, _, tag = short.partition(".")
            tags = ", ".join(found.partition(".")[2] for found in timm.list_pretrained(f"{name}.*"))
            raise LoadError(f"timm/{name}: no weights are tagged {tag!r}; known: {tags or 'none'}") from None

    def construct(self, short: str, options: Mapping[str, Any]) -> nn.Module:
        with _one_line(f"timm/{short} cannot be built"):
            return timm.create_model(short, pretrained=False, **_safe(options))

    def published_input(self, short: str, options: Mapping[str, Any], pretrained: bool) -> InputSpec:
        cfg = get_pretrained_cfg(short)
        config = resolve_data_config({}, pretrained_cfg=cfg.to_dict() if cfg is not None else {})
        channels, height, width = config["input_size"]
        if isinstance(options.get("img_size"), int):
            height = width = options["img_size"]
        return InputSpec(
            (channels, height, width),
            tuple(config["mean"]),
            tuple(config["std"]),
            config["interpolation"],
            config["crop_pct"],
        )

    def size_keywords(self, short: str, spec: InputSpec, changed: bool) -> dict[str, Any]:
        cfg = get_pretrained_cfg(short)
        if not changed or cfg is None or not cfg.fixed_input_size or tuple(cfg.input_size[1:]) == spec.size[1:]:
            return {}
        return {"img_size": spec.size[1]}

    def pretrained(self, short: str, options: Mapping[str, Any]) -> tuple[nn.Module, int | None]:
        cfg = get_pretrained_cfg(short)
        if cfg is None or not cfg.has_weights:
            return super().pretrained(short, options)
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a minute of notices about its retries
        with _one_line(f"the pretrained weights of timm/{short} cannot be loaded", _INSTEAD):
            return timm.create_model(short, pretrained=True, **_safe(options)), int(cfg.num_classes)


class TorchvisionFamily(Family):
    """Inputs: classification 224 (Inception 299), detection lists of images, optical flow pairs, video clips."""

    prefix = "torchvision"

    def names(self) -> Iterable[str]:
        return torchvision.models.list_models()

    def takes_channels(self, short: str) -> bool:
        return False

    def construct(self, short: str, options: Mapping[str, Any]) -> nn.Module:
        with _one_line(f"torchvision/{short} cannot be built"):
            return torchvision.models.get_model(short, weights=None, **self._quiet(short, options))

    def _quiet(self, short: str, options: Mapping[str, Any]) -> dict[str, Any]:
        wanted = _safe(options)
        parameters = inspect.signature(torchvision.models.get_model_builder(short)).parameters
        if "weights_backbone" in parameters:  # its default would be fetched from the network
            wanted["weights_backbone"] = None
        if short in ("googlenet", "inception_v3"):  # says what its default is about to become otherwise
            wanted.setdefault("init_weights", True)
        return wanted

    def class_keywords(self, short: str, classes: int) -> dict[str, Any]:
        return {} if _kind(short) == "pair" else {"num_classes": classes}

    def published_input(self, short: str, options: Mapping[str, Any], pretrained: bool) -> InputSpec:
        kind = _kind(short)
        if kind == "pair":
            return InputSpec((3, 128, 128), (0.5,) * 3, (0.5,) * 3, kind=kind)
        if kind == "video":
            return InputSpec(
                (3, 224, 224) if any(part in short for part in ("vit", "swin", "s3d")) else (3, 112, 112),
                (0.43216, 0.394666, 0.37645),
                (0.22803, 0.22145, 0.216989),
                kind=kind,
            )
        if kind == "images":
            return InputSpec((3, 320, 320), (0.0,) * 3, (1.0,) * 3, kind=kind)
        side = 299 if short.endswith("inception_v3") else 224
        spec = InputSpec((3, side, side), IMAGENET_MEAN, IMAGENET_STD)
        if not pretrained:
            return spec
        preset = torchvision.models.get_model_weights(short).DEFAULT.transforms()
        crop, resize = int(preset.crop_size[0]), int(preset.resize_size[0])
        mean, std = tuple(preset.mean), tuple(preset.std)
        return InputSpec((3, crop, crop), mean, std, preset.interpolation.value, crop / resize)

    def size_keywords(self, short: str, spec: InputSpec, changed: bool) -> dict[str, Any]:
        if short.startswith("vit_") and spec.size[1] != 224:
            return {"image_size": spec.size[1]}
        if short == "maxvit_t" and spec.size[1] != 224:
            return {"input_size": list(spec.size[1:])}
        return {}

    def pretrained(self, short: str, options: Mapping[str, Any]) -> tuple[nn.Module, int | None]:
        weights = next(iter(torchvision.models.get_model_weights(short)), None)
        if weights is None:
            return super().pretrained(short, options)
        best = torchvision.models.get_model_weights(short).DEFAULT
        published = len(best.meta["categories"]) if "categories" in best.meta else None
        wanted = _safe(options)
        classes = wanted.pop("num_classes", None)
        with _one_line(f"the pretrained weights of torchvision/{short} cannot be loaded", _INSTEAD):
            module = torchvision.models.get_model(short, weights=best, **wanted)
        if classes is None or classes == published:
            return module, published
        resized = self.construct(short, options)
        own = resized.state_dict()
        fitting = {k: v for k, v in module.state_dict().items() if k in own and own[k].shape == v.shape}
        resized.load_state_dict(fitting, strict=False)
        return resized, published


class ZooFamily(Family):
    prefix = "prunus"
    any_size = True

    def names(self) -> Iterable[str]:
        return ZOO

    def construct(self, short: str, options: Mapping[str, Any]) -> nn.Module:
        with _one_line(f"prunus/{short} cannot be built"):
            return ZOO[short](**_safe(options))

    def published_input(self, short: str, options: Mapping[str, Any], pretrained: bool) -> InputSpec:
        return InputSpec((3, 32, 32), (0.5,) * 3, (0.25,) * 3, crop=1.0)


class PythonFamily(Family):
    """`python:package.module:factory`; the factory may take `num_classes` and `in_chans`."""

    prefix = "python"

    def names(self) -> Iterable[str]:
        return ()

    def require(self, short: str) -> None:
        self._factory(short)

    def _factory(self, short: str) -> Callable[..., Any]:
        module, separator, attribute = short.partition(":")
        if not separator or not module or not attribute:
            raise LoadError(f"'python:{short}' must look like python:package.module:factory")
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())  # what `python -m` would do: the user's module lies where he stands
        with _one_line(f"python:{short} cannot be imported"):
            found = importlib.import_module(module)
        factory = getattr(found, attribute, None)
        if not callable(factory):
            raise LoadError(f"module {module!r} has no factory named {attribute!r}")
        return factory

    def construct(self, short: str, options: Mapping[str, Any]) -> nn.Module:
        with _one_line(f"python:{short} failed"):
            module = self._factory(short)(**options)
        if not isinstance(module, nn.Module):
            raise LoadError(f"python:{short} returned a {type(module).__name__}, not a torch.nn.Module")
        return module

    def takes_channels(self, short: str) -> bool:
        return self._accepts(short, "in_chans")

    def class_keywords(self, short: str, classes: int) -> dict[str, Any]:
        return {"num_classes": classes} if self._accepts(short, "num_classes") else {}

    def _accepts(self, short: str, keyword: str) -> bool:
        parameters = inspect.signature(self._factory(short)).parameters
        return keyword in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


FAMILIES: dict[str, Family] = {
    family.prefix: family for family in (TimmFamily(), TorchvisionFamily(), ZooFamily(), PythonFamily())
}


def _kind(short: str) -> InputKind:
    module = torchvision.models.get_model_builder(short).__module__
    for part, kind in _KINDS.items():
        if f".{part}." in module:
            return kind
    return "image"


_KINDS: dict[str, InputKind] = {"detection": "images", "optical_flow": "pair", "video": "video"}


def _safe(options: Mapping[str, Any]) -> dict[str, Any]:
    for key in options:
        if key in _FORBIDDEN:
            raise LoadError(f"keyword {key!r} cannot be given to a model: it does not choose an architecture")
    return dict(options)


def _unknown(prefix: str, short: str, names: Iterable[str]) -> LoadError:
    nearest = difflib.get_close_matches(short, list(names), n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(f'{prefix}/{name}' for name in nearest)}?" if nearest else ""
    return LoadError(f"No model named '{prefix}/{short}'.{hint}")


@contextmanager
def _one_line(what: str, then: str = "") -> Iterator[None]:
    """Whatever a foreign builder raises becomes a LoadError of one line."""
    try:
        yield
    except LoadError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:300]
        raise LoadError(f"{what}: {reason}{'; ' + then if then else ''}") from None
