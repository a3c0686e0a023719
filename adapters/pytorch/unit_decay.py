"""Weight decay of each unit at its own rate."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from prunus.core.cost import FloatArray
from prunus.core.errors import PlanError
from prunus.core.graph import ChannelGraph


class UnitDecay:
    """Shrinks writing and reading weights: W <- W (1 - lr * rate), decoupled from the gradient.

    An index of an axis decays at the sum of its units' rates, a weight at the sum over its axes. Vectors
    (norms and biases) do not decay, as with plain weight decay; but for the norm that ends a branch: its scale
    and shift are what the branch adds, whatever its kernel is, and decay at the branch's own rate.
    """

    def __init__(self, module: nn.Module, graph: ChannelGraph, rates: Mapping[str, FloatArray]) -> None:
        """`rates`: group -> (units,), branch -> (1,), at least 0; what is not named has 0. Raises PlanError."""
        branches = {name for name, block in graph.blocks.items() if block.of is not None}
        for name, values in rates.items():
            if name not in graph.groups and name not in branches:
                raise PlanError(f"unknown channel group {name!r}", group=name)
            units = graph.groups[name].units if name in graph.groups else 1
            if np.shape(values) != (units,) or not np.isfinite(values).all() or np.min(values) < 0:
                raise PlanError(f"the decay of {name!r} must be {units} finite rates of at least 0", group=name)
        parameters = dict(module.named_parameters(remove_duplicate=False))
        totals: dict[int, tuple[Tensor, Tensor]] = {}
        for (tensor, axis), pieces in graph.slices_of.items():
            weight = parameters.get(tensor)
            if weight is None or weight.ndim < 2 or not weight.requires_grad:
                continue
            rate = np.zeros(weight.shape[axis])
            for name, piece in pieces:
                if name in rates and piece.role != "scales":
                    member = piece.unit_of >= 0
                    rate[member] += np.asarray(rates[name], dtype=np.float64)[piece.unit_of[member]]
            if rate.any():
                shape = [-1 if a == axis else 1 for a in range(weight.ndim)]
                along = torch.as_tensor(rate, dtype=weight.dtype, device=weight.device).view(shape)
                earlier = totals.get(id(weight))
                totals[id(weight)] = (weight, along if earlier is None else earlier[1] + along)
        for name in branches & rates.keys():
            of_branch = torch.as_tensor(float(rates[name][0]))
            vectors = [parameters[f"{name}.norm.{part}"] for part in ("weight", "bias")]
            totals.update((id(vector), (vector, of_branch.to(vector))) for vector in vectors)
        self._weights = [weight for weight, _ in totals.values()]
        self._rates = [rate for _, rate in totals.values()]

    @torch.no_grad()
    def __call__(self, lr: float) -> None:
        if self._weights:
            factors = [(1 - lr * rate).clamp_(min=0) for rate in self._rates]
            torch._foreach_mul_(self._weights, factors)
