"""What training remembers about each weight follows the weight through removal and growth.

Any `torch.optim` optimizer works, and any that keeps its state the same way: per parameter, in tensors
of the parameter's shape (momentum, Adam's moments) or of that shape with an axis reduced (Adafactor's).
An averaged model (EMA) is a model: give it to `surgery.remove` or `surgery.grow` with the same arguments.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from prunus.adapters.pytorch.surgery import Changes, Replacement, select
from prunus.core.errors import ConfigError


def carry_state(optimizer: torch.optim.Optimizer, changes: Changes) -> None:
    """Makes `optimizer` train the parameters that `changes` put in place, with their state carried over.

    Learning rates, decay and every other setting of a parameter group stay. Raises ConfigError, before
    anything is changed, if the optimizer keeps per-weight state in a form that cannot be re-indexed.
    """
    moved: dict[Tensor, dict[str, Any]] = {}
    for parameter, state in optimizer.state.items():
        change = changes.by_old.get(id(parameter))
        if change is not None:
            moved[parameter] = {key: _followed(key, value, change, optimizer) for key, value in state.items()}
    for parameter, state in moved.items():
        del optimizer.state[parameter]
        optimizer.state[changes.by_old[id(parameter)].new] = state
    for group in optimizer.param_groups:
        group["params"][:] = [changes.by_old[id(p)].new if id(p) in changes.by_old else p for p in group["params"]]


def drop_state(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> None:
    """Makes `optimizer` forget parameters that are gone; its parameter groups stay, even empty ones."""
    gone = {id(parameter) for parameter in parameters}
    for parameter in [p for p in optimizer.state if id(p) in gone]:
        del optimizer.state[parameter]
    for group in optimizer.param_groups:
        group["params"][:] = [p for p in group["params"] if id(p) not in gone]


def adopt(optimizer: torch.optim.Optimizer, parameters: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Makes `optimizer` train new parameters, each given beside the trained weight that it came from.

    A matrix or kernel joins the parameter group of that weight; a vector joins the group of the vectors
    (norms, biases), which often do not decay, if there is one with the same learning rate. State begins anew.
    """
    groups = optimizer.param_groups
    for parameter, weight in parameters:
        if not parameter.requires_grad:
            continue
        home = next((group for group in groups if any(p is weight for p in group["params"])), None)
        if home is None:
            continue  # it came from a weight that does not train here
        if parameter.ndim <= 1:
            alike = (g for g in groups if g["lr"] == home["lr"] and any(p.ndim <= 1 for p in g["params"]))
            home = next(alike, home)
        home["params"].append(parameter)


def _followed(key: str, value: Any, change: Replacement, optimizer: torch.optim.Optimizer) -> Any:
    kept = f"{type(optimizer).__name__} keeps {key!r} of {change.name}"
    instead = (
        "which cannot follow a removal; use an optimizer with per-weight state (SGD, Adam, AdamW, RMSprop, ...)"
    )
    if isinstance(value, list | dict | tuple) and any(isinstance(x, Tensor) for x in _values(value)):
        raise ConfigError(f"{kept} in a {type(value).__name__}, {instead}")
    if not isinstance(value, Tensor) or value.numel() <= 1:  # of all the weights together
        return value
    axes = _aligned(key, tuple(value.shape), tuple(change.old.shape))
    if axes is None:
        shapes = f"in shape {tuple(value.shape)} beside weights of {tuple(change.old.shape)}"
        raise ConfigError(f"{kept} {shapes}, {instead}")
    return select(value, {at: change.indices[axis] for at, axis in axes.items() if axis in change.indices})


def _values(container: Any) -> Iterable[Any]:
    return container.values() if isinstance(container, dict) else container


def _aligned(key: str, state: tuple[int, ...], parameter: tuple[int, ...]) -> dict[int, int] | None:
    """Axis of the state -> axis of the parameter, or None where the two shapes have nothing in common."""
    if len(state) == len(parameter):
        if all(s in (1, p) for s, p in zip(state, parameter, strict=True)):
            return {axis: axis for axis, size in enumerate(state) if size == parameter[axis]}
        return None
    dropped = [len(parameter) - 1, len(parameter) - 2]  # a factored second moment: rows, columns
    if key.endswith("_col"):  # of a square matrix, its shape alone does not say which
        dropped.reverse()
    for gone in dropped:
        left = [axis for axis in range(len(parameter)) if axis != gone]
        if gone >= 0 and state == tuple(parameter[axis] for axis in left):
            return dict(enumerate(left))
    return None
