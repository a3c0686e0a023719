"""What users call from Python: `prune`, `load`, `trace`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from prunus.adapters.pytorch.artifact import load
from prunus.adapters.pytorch.catalog import BuiltModel
from prunus.adapters.pytorch.copies import copied, in_eval
from prunus.adapters.pytorch.defaults import filled
from prunus.adapters.pytorch.session import PyTorchSession, open_session, output_classes
from prunus.adapters.pytorch.user_data import GIVEN, GivenInputs, bundle_of, holdout_of
from prunus.adapters.pytorch.verification import prepare, refuse_opaque
from prunus.core.errors import ConfigError, LoadError
from prunus.core.graph import ChannelGraph
from prunus.core.plan import UNNAMED, ModelSource, PruningPlan
from prunus.core.pruning import Silent
from prunus.core.pruning import prune as run_to_the_end
from prunus.core.registry import Registry
from prunus.core.report import Report
from prunus.core.run_folder import RunFolder, choose_folder
from prunus.core.settings import RunSettings, make_settings


@dataclass(frozen=True, slots=True, eq=False)
class Pruned:
    """What `prune` gives back."""

    model: nn.Module
    """Smaller, of its original class, in eval mode."""
    plan: PruningPlan
    report: Report
    folder: Path


def prune(
    model: nn.Module | str,
    example_inputs: Tensor | tuple[Any, ...] | None = None,
    *,
    train_data: Any = None,
    test_data: Any = None,
    plugin: str = "gsm-anneal",
    target: str | Sequence[str] = "macs=50%",
    importance: str | None = None,
    config: Mapping[str, Any] | None = None,
    trained: bool = True,
    output: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    **settings: Any,
) -> Pruned:
    """Prune `model` and return the smaller one, with its plan and report, as `optimize prune` does.

    `model` is a name (`timm/resnet18`; then `data=...` names the data) or a module, which is not changed.
    A module needs `example_inputs` (batch of 2) and, unless the method is data-free, `train_data`: a data
    set of (image, label) or its DataLoader; `trained=False` trains it first. Further `settings` are those
    of `RunSettings`: epochs, lr, seed, device... With `resume` the run in `output` goes on where it was stopped,
    and begins if there is none: the same call again, after a crash, ends in the same plan. Raises what
    `optimize prune` reports: ConfigError, UnreachableTargetError, TraceError, VerificationError, ...; with
    `resume` JournalError if the run in `output` began with another model, other data or settings.
    """
    fields = {
        **settings,
        "plugin": plugin,
        "targets": (target,) if isinstance(target, str) else tuple(target),
        "importance": importance,
        "config": dict(config or {}),
    }
    session: list[PyTorchSession] = []
    if isinstance(model, str):
        objects = {"example_inputs": example_inputs, "train_data": train_data, "test_data": test_data}
        for key, value in objects.items():
            if value is not None:
                raise ConfigError(
                    f"{key} goes with a module; {model!r} is a name and takes data by name (data=...). For data "
                    "of your own build the model yourself, for their number of classes, and pass it",
                    key=key,
                )
        if not trained:
            raise ConfigError(
                f"trained=False goes with a module; {model!r} is trained if it lacks weights", key="trained"
            )
        chosen = make_settings({**fields, "model": model})

        def opened(resolved: RunSettings) -> PyTorchSession:
            session.append(open_session(resolved))
            return session[-1]
    else:
        chosen = objects_settings(fields, "none" if train_data is None else GIVEN)
        original = model

        def opened(resolved: RunSettings) -> PyTorchSession:
            session.append(session_of(original, example_inputs, train_data, test_data, trained, resolved))
            return session[-1]

    if resume and (output is None or overwrite):
        raise ConfigError("resume=True needs output, the run's folder, and excludes overwrite", key="resume")
    folder = RunFolder(Path(output)) if output is not None else RunFolder(choose_folder(chosen))
    report = run_to_the_end(
        chosen,
        folder,
        Registry.discover(),
        Silent(),
        resume=resume and folder.settings_file.is_file(),
        overwrite=overwrite,
        open_session=opened,
    )
    adapter = session[-1].adapter
    return Pruned(in_eval(adapter.model), adapter.plan, report, folder.path)


def session_of(
    model: nn.Module,
    example_inputs: Any,
    train_data: Any,
    test_data: Any,
    trained: bool,
    settings: RunSettings,
    holdout_data: Any = None,
    *,
    in_place: bool = False,
) -> PyTorchSession:
    """A session of a module and data sets without a name. `in_place`: of `model` itself, not of a copy.

    `holdout_data` replaces the part of `train_data` that would be held out.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"the model must be a module or a name, got {model!r:.80}", key="model")
    if not isinstance(example_inputs, Tensor | tuple):
        given = "" if example_inputs is None else f", got {type(example_inputs).__name__}"
        raise ConfigError(f"a module needs example_inputs: a tensor, or the tuple of its arguments{given}")
    refuse_opaque(model)
    inputs = GivenInputs.of(example_inputs if isinstance(example_inputs, tuple) else (example_inputs,))
    name = f"{UNNAMED}{type(model).__module__}.{type(model).__qualname__}"
    settings = filled(settings.model_copy(update={"model": name}))
    bundle = None
    _refuse_what_own_data_decides(settings)
    if train_data is not None:
        _takes_images_alone(model)
        like, size = inputs.images, settings.batch_size
        bundle = bundle_of(train_data, test_data, like=like, holdout=settings.holdout, batch_size=size)
        if holdout_data is not None:
            judged = holdout_of(holdout_data, bundle.classes, like=like, batch_size=size or 64)
            bundle = replace(bundle, holdout=judged)
    own = model if in_place else copied(model)
    fresh = copied(model)
    outputs = output_classes(copied(fresh), inputs.args) if bundle is not None else None
    built = BuiltModel(own, ModelSource(name=name), inputs, trained, outputs)
    session = PyTorchSession(settings, built, bundle, lambda source: copied(fresh))
    if bundle is not None and outputs is not None and outputs < bundle.classes:
        raise LoadError(f"train_data has a class {bundle.classes - 1}, the model knows 0..{outputs - 1}")
    return session


def _takes_images_alone(model: nn.Module) -> None:
    """Raises ConfigError if data sets of images cannot feed the model."""
    try:
        signature(model.forward).bind(None)
    except TypeError as error:
        raise ConfigError(
            f"train_data feeds the model with images alone, and its forward cannot do with them: {error}"
        ) from None


def objects_settings(values: Mapping[str, Any], data: str) -> RunSettings:
    """Settings of a run on a module, and on data sets if `data` says so.

    Raises ConfigError for one that only names can follow: it would be ignored.
    """
    for key, instead in {
        "pretrained": "load the weights into the module",
        "checkpoint": "load the weights into the module",
        "img_size": "example_inputs say it",
        "adapter": "the module is one of PyTorch",
    }.items():
        if values.get(key):
            raise ConfigError(f"{key} is for a model that has a name, got {values[key]!r}; {instead}", key=key)
    if values.get("data", data) != data:
        raise ConfigError(
            f"data={values['data']!r} is for a model that has a name; give a module its data as train_data",
            key="data",
        )
    return make_settings({**values, "data": data})


def _refuse_what_own_data_decides(settings: RunSettings) -> None:
    augmented, counted = "put timm's create_transform into it", "give the part of it that you want"
    for key, instead in {
        "aa": augmented,
        "reprob": augmented,
        "steps_per_epoch": counted,
        "train_limit": counted,
        "num_classes": "its labels say it",
    }.items():
        value = getattr(settings, key)
        if value:
            raise ConfigError(
                f"{key} is for data that has a name, got {value!r}; for a data set of your own: {instead}", key=key
            )


def trace(model: nn.Module, example_inputs: Tensor | tuple[Any, ...], *, certified: bool = True) -> ChannelGraph:
    """What can be removed from `model`, and what it costs. `model` is not changed.

    With `certified`, random removals are tried on copies, and what the forward pass cannot follow is
    locked, with the reason. Raises TraceError if the model cannot be captured.
    """
    return prepare(copied(model), example_inputs, certified=certified).graph


__all__ = ["Pruned", "load", "objects_settings", "prune", "session_of", "trace"]
