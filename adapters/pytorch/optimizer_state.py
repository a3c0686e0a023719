"""What training remembers about each weight follows the weight through removal and growth.

Any `torch.optim` optimizer works, and any that keeps its state the same way: per parameter, in tensors
of the parameter's shape (momentum, Adam's moments) or of that shape with an axis reduced (Adafactor's).
So does one that wraps others (Lookahead). An averaged model (EMA) is a model: give it to `surgery.remove` or
`surgery.grow` with the same arguments.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, product
from typing import Any

import torch
from torch import Tensor

from prunus.adapters.pytorch.surgery import Changes, Replacement, select
from prunus.core.errors import ConfigError

INSTEAD = "use an optimizer with per-weight state (SGD, Adam, AdamW, RMSprop, ...)"


def nested(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """`optimizer` and, if it wraps others, all that do its work: each keeps state of its own."""
    found: list[torch.optim.Optimizer] = []
    seen: set[int] = set()
    left: deque[Any] = deque([optimizer])
    while left:
        value = left.popleft()
        if id(value) in seen or not isinstance(value, dict | list | tuple | torch.optim.Optimizer):
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            left.extend(value.values())
        elif isinstance(value, list | tuple):
            left.extend(value)
        else:
            found.append(value)
            # not the state and the groups: long, and they hold tensors
            left.extend(held for name, held in vars(value).items() if name not in ("state", "param_groups"))
    return found


def check_state(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]) -> None:
    """Raises ConfigError if something that `optimizer` keeps of `parameters` (by name) cannot be re-indexed."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    for one in nested(optimizer):
        for parameter, state in one.state.items():
            name = names.get(id(parameter))
            if name is not None:
                for key, value in state.items():
                    _axes(key, value, name, tuple(parameter.shape), one)


def carry_state(optimizer: torch.optim.Optimizer, changes: Changes) -> None:
    """Makes `optimizer` train the parameters that `changes` put in place, with their state carried over.

    Learning rates, decay and every other setting of a parameter group stay. Raises ConfigError, before
    anything is changed, if the optimizer keeps per-weight state in a form that cannot be re-indexed.
    """
    moved: list[tuple[Any, dict[Tensor, dict[str, Any]]]] = []
    for one in nested(optimizer):
        follows: dict[Tensor, dict[str, Any]] = {}
        for parameter, state in one.state.items():
            change = changes.by_old.get(id(parameter))
            if change is not None:
                follows[parameter] = {key: _followed(key, value, change, one) for key, value in state.items()}
        moved.append((one.state, follows))
    for states, follows in moved:
        for parameter, state in follows.items():
            states.pop(parameter, None)  # a wrapper may share its state with what it wraps
            states[changes.by_old[id(parameter)].new] = state
    for group in chain(*_groups(optimizer)):
        group["params"][:] = [changes.by_old[id(p)].new if id(p) in changes.by_old else p for p in group["params"]]


def drop_state(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> None:
    """Makes `optimizer` forget parameters that are gone; its parameter groups stay, even empty ones."""
    gone = {id(parameter) for parameter in parameters}
    for one in nested(optimizer):
        for parameter in [p for p in one.state if id(p) in gone]:
            del one.state[parameter]
    for group in chain(*_groups(optimizer)):
        if "param_names" in group:  # of an optimizer that was given named_parameters()
            named = zip(group["param_names"], group["params"], strict=True)
            group["param_names"] = [name for name, p in named if id(p) not in gone]
        group["params"][:] = [p for p in group["params"] if id(p) not in gone]


def adopt(
    optimizer: torch.optim.Optimizer, parameters: Iterable[tuple[Tensor, Tensor]], names: Mapping[int, str]
) -> None:
    """Makes `optimizer` train new parameters, each given beside the trained weight that it came from.

    A matrix or kernel joins the parameter group of that weight; a vector joins the group of the vectors
    (norms, biases), which often do not decay, if there is one with the same learning rate. State begins anew.
    `names` has the name of each parameter, by its id, for groups that keep names.
    """
    new = [(parameter, weight) for parameter, weight in parameters if parameter.requires_grad]
    for (parameter, weight), groups in product(new, list(_groups(optimizer))):
        home = next((group for group in groups if any(p is weight for p in group["params"])), None)
        if home is None:
            continue  # it came from a weight that does not train here
        if parameter.ndim <= 1:
            alike = (g for g in groups if g["lr"] == home["lr"] and any(p.ndim <= 1 for p in g["params"]))
            home = next(alike, home)
        home["params"].append(parameter)
        if "param_names" in home:
            home["param_names"] = [*home["param_names"], names[id(parameter)]]


def _groups(optimizer: torch.optim.Optimizer) -> Iterator[list[dict[str, Any]]]:
    """The parameter groups of each optimizer, none twice: a wrapper may share them with what it wraps."""
    seen: set[int] = set()
    for one in nested(optimizer):
        yield [group for group in one.param_groups if id(group["params"]) not in seen]
        seen.update(id(group["params"]) for group in one.param_groups)


def _followed(key: str, value: Any, change: Replacement, optimizer: torch.optim.Optimizer) -> Any:
    axes = _axes(key, value, change.name, tuple(change.old.shape), optimizer)
    if not axes:
        return value
    return select(value, {at: change.indices[axis] for at, axis in axes.items() if axis in change.indices})


def _axes(
    key: str, value: Any, name: str, shape: tuple[int, ...], optimizer: torch.optim.Optimizer
) -> dict[int, int]:
    """Axis of the state -> axis of the parameter; none for what is of all the weights together."""
    kept = f"{type(optimizer).__name__} keeps {key!r} of {name}"
    stuck = f"which cannot follow a removal; {INSTEAD}"
    if isinstance(value, list | dict | tuple) and any(isinstance(x, Tensor) for x in _values(value)):
        raise ConfigError(f"{kept} in a {type(value).__name__}, {stuck}")
    if not isinstance(value, Tensor) or value.numel() <= 1:
        return {}
    axes = _aligned(key, tuple(value.shape), shape)
    if axes is None:
        raise ConfigError(f"{kept} in shape {tuple(value.shape)} beside weights of {shape}, {stuck}")
    return axes


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
