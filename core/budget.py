"""What must remain, in the user's own units: `macs=50%`, `params=5M`, `size=8MB`, `latency=12ms`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from prunus.core.cost import Cost, FloatArray, Quantity
from prunus.core.errors import ConfigError
from prunus.core.graph import ChannelGraph

_METRICS: dict[str, Quantity] = {"macs": "macs", "params": "params", "size": "bytes", "latency": "latency"}
_SCALE = {
    "macs": {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9},
    "params": {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9},
    "size": {"": 1.0, "B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2.0**10, "MIB": 2.0**20},
    "latency": {"S": 1.0, "MS": 1e-3, "US": 1e-6},
}
_FORM = re.compile(r"^\s*([a-z]+)\s*=\s*([0-9.]+(?:e[0-9]+)?)\s*(%|[A-Za-z]*)\s*$")


@dataclass(frozen=True, slots=True)
class Target:
    """One condition on the result: an upper limit, as a share of the original model or absolute."""

    metric: str
    share: float | None
    amount: float | None
    text: str

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read `metric=VALUE`. Raises ConfigError that lists what is allowed."""
        match = _FORM.match(text)
        if match is None or match[1] not in _METRICS:
            raise ConfigError(
                f"target {text!r} is not understood; write one of macs=50%, macs=900M, params=5M, size=8MB, "
                "latency=12ms",
                key="target",
            )
        metric, unit = match[1], match[3]
        try:
            number = float(match[2])
        except ValueError:
            raise ConfigError(f"target {text!r}: {match[2]!r} is not a number", key="target") from None
        if unit == "%":
            if not 0 < number < 100:
                raise ConfigError(f"target {text!r}: a share must lie between 0% and 100%", key="target")
            return cls(metric, number / 100, None, text.replace(" ", ""))
        scale = _SCALE[metric].get(unit.upper())
        if scale is None:
            allowed = ", ".join(repr(u) for u in _SCALE[metric] if u)
            raise ConfigError(f"target {text!r}: unit {unit!r} is not one of %, {allowed}", key="target")
        if number <= 0:
            raise ConfigError(f"target {text!r}: must be greater than 0", key="target")
        return cls(metric, None, number * scale, text.replace(" ", ""))

    @property
    def quantity(self) -> Quantity:
        return _METRICS[self.metric]


@dataclass(frozen=True, slots=True)
class Budget:
    """Targets resolved against the original model: every `limits[q]` is an absolute upper bound."""

    targets: tuple[Target, ...]
    dense: Cost
    limits: Mapping[Quantity, float]

    @classmethod
    def resolve(cls, targets: Iterable[Target], dense: Cost) -> Budget:
        """A share is a share of `dense`, the original model, also when a method grows it first.

        Raises ConfigError for a share of nothing.
        """
        limits: dict[Quantity, float] = {}
        chosen = tuple(targets)
        for target in chosen:
            whole = float(getattr(dense, target.quantity))
            if target.share is not None and not whole:
                raise ConfigError(
                    f"target {target.text!r} is a share of nothing: the model has none", key="target"
                )
            limit = target.amount if target.share is None else target.share * whole
            assert limit is not None
            limits[target.quantity] = min(limit, limits.get(target.quantity, float("inf")))
        return cls(chosen, dense, limits)

    def load(self, cost: Cost) -> float:
        """The largest `cost / limit` over all targets: at most 1 when every target is met."""
        return max((getattr(cost, q) / limit for q, limit in self.limits.items()), default=0.0)

    def met(self, cost: Cost) -> bool:
        return self.load(cost) <= 1.0 + 1e-12

    def partway(self, progress: float, start: Cost | None = None) -> Budget:
        """The budget of an intermediate round: geometric from `start` (default: dense) at 0 to the limits at 1."""
        begin = start or self.dense
        limits = {
            q: max(limit, float(getattr(begin, q)) ** (1 - progress) * limit**progress)
            for q, limit in self.limits.items()
        }
        return Budget(self.targets, self.dense, limits)

    def gradient(self, graph: ChannelGraph, counts: FloatArray) -> FloatArray:
        """d load / d count of the most binding target, shape (groups,) in the order of `graph.groups`."""
        cost = graph.cost_model.at(counts)
        quantity = max(self.limits, key=lambda q: getattr(cost, q) / self.limits[q])
        return np.asarray(graph.cost_model.gradient(counts, quantity) / self.limits[quantity])
