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


def _followed(key: str, value: Any, change: Replacement, optimizer: torch.optim.Optimizer) -> Any:
    if not isinstance(value, Tensor) or value.numel() <= 1:
        return value
    axes = _aligned(tuple(value.shape), tuple(change.old.shape))
    if axes is None:
        raise ConfigError(
            f"{type(optimizer).__name__} keeps {key!r} of shape {tuple(value.shape)} for {change.name} of "
            f"shape {tuple(change.old.shape)}, which cannot follow a removal; use an optimizer with "
            "per-weight state (SGD, Adam, AdamW, RMSprop, ...)"
        )
    return select(value, {at: change.indices[axis] for at, axis in axes.items() if axis in change.indices})


def _aligned(state: tuple[int, ...], parameter: tuple[int, ...]) -> dict[int, int] | None:
    """Axis of the state -> axis of the parameter, or None where the two shapes have nothing in common."""
    if len(state) == len(parameter):
        if all(s in (1, p) for s, p in zip(state, parameter, strict=True)):
            return {axis: axis for axis, size in enumerate(state) if size == parameter[axis]}
        return None
    for dropped in (len(parameter) - 1, len(parameter) - 2):  # a factored second moment: rows, columns
        left = [axis for axis in range(len(parameter)) if axis != dropped]
        if dropped >= 0 and state == tuple(parameter[axis] for axis in left):
            return dict(enumerate(left))
    return None
