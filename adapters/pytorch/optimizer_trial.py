"""A removal tried on an optimizer of the user's, with weights of no matter: before a run, not in the middle."""

from __future__ import annotations

import contextlib
import copy
import random
from collections import OrderedDict, defaultdict
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunus.adapters.pytorch.optimizer_state import INSTEAD, carry_state, nested
from prunus.adapters.pytorch.random_state import seeded
from prunus.adapters.pytorch.surgery import reindex
from prunus.core.cost import IntArray
from prunus.core.errors import ConfigError
from prunus.core.graph import Axis

_LONGEST = 256
"""Axes of the weights that are tried: large enough for whatever is done with large weights alone."""
_LEFT = 12
"""What is left of them: Adafactor and its kin keep other state of small weights than of large ones."""
_COPYABLE = (bool, int, float, complex, str, Tensor, torch.dtype, random.Random)


def refuse_stuck(optimizer: torch.optim.Optimizer) -> None:
    """Raises ConfigError if `optimizer` fails in its first step after a removal; it is not changed.

    One that cannot be tried (it reaches for more than its parameters, or fails in the very first step) passes.
    """
    for one in nested(optimizer):
        with seeded(0):  # a trial must not draw from the user's random numbers
            reason = _why_stuck(one)
        if reason is not None:
            raise ConfigError(
                f"{type(one).__name__} cannot be used here: its trial with a removal failed ({reason}); {INSTEAD}"
            )


def _why_stuck(optimizer: torch.optim.Optimizer) -> str | None:
    weights = nn.Module()
    try:
        twin = _twin(optimizer, weights)
        if twin is None:
            return None
        _step(twin)
    except Exception:  # whatever it lacks, the removal is not to blame
        return None
    try:
        carry_state(twin, reindex(weights, _removal(weights)))
        _step(twin)
    except ConfigError as error:
        return str(error).removesuffix(f"; {INSTEAD}")
    except Exception as error:  # each optimizer fails in a way of its own
        return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    return None


def _twin(optimizer: torch.optim.Optimizer, weights: nn.Module) -> Any:
    """Another of its kind and settings, for new `weights` like those it trains; None if that cannot be made."""
    memo: dict[int, Any] = {}
    groups = []
    for number, group in enumerate(optimizer.param_groups):
        names = [f"weights of {axes} axes in group {number}" for axes in sorted({p.ndim for p in group["params"]})]
        for name, like in zip(names, _largest(group["params"]), strict=True):
            shape = [min(size, _LONGEST) for size in like.shape]
            new = torch.rand(shape, device=like.device).to(like.dtype)
            weights.register_parameter(name, nn.Parameter(new, like.requires_grad))
        own: dict[str, Any] = {"params": [weights.get_parameter(name) for name in names]}
        if "param_names" in group:
            own["param_names"] = list(names)
        memo[id(group["params"])] = own["params"]  # some keep the list itself as well
        rest = {key: value for key, value in group.items() if key not in own}
        groups.append({**{key: copy.deepcopy(v) if _plain(v) else v for key, v in rest.items()}, **own})
    twin: Any = object.__new__(type(optimizer))
    for name, value in vars(optimizer).items():
        if name in ("param_groups", "state"):
            continue
        if name.endswith("_hooks"):
            vars(twin)[name] = OrderedDict()  # what the user hangs on is not told of the trial
        elif _plain(value):
            vars(twin)[name] = copy.deepcopy(value, memo)
        elif not (callable(value) and hasattr(type(optimizer), name)):  # a scheduler's patch of step() goes
            return None
    twin.param_groups, twin.state = groups, defaultdict(dict)
    return twin


def _largest(parameters: list[Tensor]) -> list[Tensor]:
    """The largest with each number of axes."""
    found: dict[int, Tensor] = {}
    for parameter in parameters:
        if parameter.ndim not in found or parameter.numel() > found[parameter.ndim].numel():
            found[parameter.ndim] = parameter
    return [found[axes] for axes in sorted(found)]


def _plain(value: Any) -> bool:
    """True for numbers, text, tensors, and containers of these: nothing that a step could change by stealth."""
    if isinstance(value, dict):
        return all(_plain(part) for part in value.values())
    if isinstance(value, list | tuple | set):
        return all(_plain(part) for part in value)
    if isinstance(value, FunctionType):
        return value.__closure__ is None
    return value is None or isinstance(value, _COPYABLE)


def _removal(weights: nn.Module) -> dict[Axis, IntArray]:
    indices: dict[Axis, IntArray] = {}
    for name, parameter in weights.named_parameters():
        for axis, size in enumerate(parameter.shape[:2]):
            if size > 1:
                indices[name, axis] = np.arange(min(_LEFT, -(-size // 2)))
    return indices


def _step(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad:
                parameter.grad = torch.randn_like(parameter)
    with contextlib.suppress(TypeError):
        optimizer.step()
        return
    optimizer.step(lambda: 1.0)
