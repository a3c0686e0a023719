"""A run's state on disk: models with their plans, the optimizer, counters. JSON and safetensors only."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from prunus.adapters.pytorch.artifact import apply_plan, read_plan, write_plan
from prunus.adapters.pytorch.schedule import EpochsDone
from prunus.adapters.pytorch.weights import load_strictly, read_tensors, untied_state, write_tensors
from prunus.core.errors import JournalError, LoadError, PlanError
from prunus.core.files import write_atomically
from prunus.core.plan import PruningPlan

_COUNTERS = "state.json"
_OPTIMIZER = "optimizer.safetensors"


class Counters(BaseModel):
    """Everything but tensors."""

    model_config = ConfigDict(extra="forbid")
    state_changes: int
    """Directives executed so far that changed the state."""
    epochs_done: int
    """Epochs done of the training that was under way, 0 if none was."""
    least_loss: float | None = None
    """Smallest mean loss of one of them."""
    models: dict[str, float]
    """Saved models -> MACs of one forward pass."""
    optimizer: list[dict[str, Any]] | None
    """Settings of each parameter group, and the names of its parameters."""
    scalars: dict[str, dict[str, float | int | bool | None]]
    """parameter -> numbers of its optimizer state that are not tensors."""

    @property
    def done(self) -> EpochsDone:
        return EpochsDone(self.epochs_done, self.least_loss)


@dataclass(frozen=True, slots=True, eq=False)
class Remembered:
    """A model at one moment of a run, and the plan that gives a fresh original its shape."""

    model: nn.Module
    plan: PruningPlan
    macs: float
    """MACs of one forward pass of one image."""
    foreign: bool = False
    """Brought by the user: not part of the run's state."""


def write_model(folder: Path, saved: Remembered) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "model.safetensors", untied_state(saved.model), {"format": "pt"})
    write_plan(folder, saved.plan)


def write_state(
    folder: Path,
    models: Mapping[str, Remembered],
    base: PruningPlan,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    state_changes: int,
    done: EpochsDone,
) -> None:
    """Write `models`, the plan of the traced model and the optimizer of `model` into the empty `folder`."""
    write_plan(folder, base)
    for name, saved in models.items():
        write_model(folder / name, saved)
    tensors, scalars, groups = _optimizer_state(model, optimizer)
    if tensors:
        write_tensors(folder / _OPTIMIZER, tensors)
    counters = Counters(
        state_changes=state_changes,
        epochs_done=done.count,
        least_loss=done.least,
        models={name: saved.macs for name, saved in models.items()},
        optimizer=groups,
        scalars=scalars,
    )
    write_atomically(folder / _COUNTERS, counters.model_dump_json(indent=1))


def read_counters(folder: Path) -> Counters:
    """Raises JournalError if the file is missing or damaged."""
    try:
        return Counters.model_validate_json((folder / _COUNTERS).read_bytes())
    except (OSError, ValidationError) as error:
        raise JournalError(f"{folder / _COUNTERS} cannot be used: {str(error).splitlines()[0]}") from error


def read_base(folder: Path) -> PruningPlan:
    """The plan of the traced model. Raises JournalError if it is missing or damaged."""
    try:
        return read_plan(folder)
    except LoadError as error:
        raise JournalError(str(error)) from error


def rebuild_model(folder: Path, original: Callable[[], nn.Module]) -> tuple[nn.Module, PruningPlan]:
    """A saved model, made of a fresh `original`, and its plan. Raises JournalError if it is damaged."""
    try:
        plan, tensors = read_plan(folder), read_tensors(folder / "model.safetensors")
        model = original()
        apply_plan(model, plan)
        load_strictly(model, tensors, str(folder))
    except (LoadError, PlanError) as error:
        raise JournalError(str(error)) from error
    return model, plan


def _optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer | None
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]], list[dict[str, Any]] | None]:
    if optimizer is None:
        return {}, {}, None
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for parameter, state in optimizer.state.items():
        name = names[id(parameter)]
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{key}:{name}"] = value.contiguous()
            else:
                scalars.setdefault(name, {})[key] = value
    groups = []
    for group in optimizer.param_groups:
        plain = {k: v for k, v in group.items() if k != "params" and _is_plain(v)}
        groups.append({**json.loads(json.dumps(plain)), "names": [names[id(p)] for p in group["params"]]})
    return tensors, scalars, groups


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return (
        value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value))
    )


def restore_optimizer(
    folder: Path, counters: Counters, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Give the fresh `optimizer` of `model` the saved state. Raises JournalError if it does not fit."""
    assert counters.optimizer is not None
    parameters = dict(model.named_parameters())
    path = folder / _OPTIMIZER
    try:
        tensors = read_tensors(path) if path.exists() else {}
    except LoadError as error:
        raise JournalError(str(error)) from error
    if len(optimizer.param_groups) != len(counters.optimizer):
        raise JournalError(f"{folder}: the optimizer has other parameter groups than the saved one")
    for group, saved in zip(optimizer.param_groups, counters.optimizer, strict=True):
        names = saved["names"]
        if any(name not in parameters for name in names):
            raise JournalError(f"{folder}: the saved optimizer is of another model")
        group["params"] = [parameters[name] for name in names]
        group.update({k: tuple(v) if isinstance(v, list) else v for k, v in saved.items() if k != "names"})
    for label, tensor in tensors.items():
        key, _, name = label.partition(":")
        if name not in parameters:
            raise JournalError(f"{path}: no parameter is named {name!r}")
        optimizer.state[parameters[name]][key] = tensor.to(parameters[name].device) if tensor.dim() else tensor
    for name, numbers in counters.scalars.items():
        if name not in parameters:
            raise JournalError(f"{folder}: no parameter is named {name!r}")
        optimizer.state[parameters[name]].update(numbers)
