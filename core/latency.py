"""Measured time as numbers: samples with their spread, a fit that turns samples into cost terms, corrections.

How long one operator takes is modelled as a sum of non-negative multiples of products of its axis lengths,

    t = a + b * out + c * in + d * out * in        (a convolution or a linear layer)

so that latency is one more quantity of the cost model, with which every method searches as with MACs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from scipy.optimize import nnls

from prunus.core.cost import CostTerm, Extent, FloatArray
from prunus.core.graph import ChannelGraph

QUIET = 0.2
"""Spread between quartiles, as a share of the median, beyond which a comparison is called noisy."""
Monomial = tuple[Extent, ...]
"""A product of axis lengths; the empty one is the constant."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one forward pass of one batch, sample by sample."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.samples))

    @property
    def fastest(self) -> float:
        return min(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        low, high = np.quantile(self.samples, (0.25, 0.75))
        return float(low), float(high)


@dataclass(frozen=True, slots=True)
class LatencyComparison:
    """Two models timed in turns on one machine: sample i of one follows sample i of the other."""

    dense: Timing
    pruned: Timing
    batch: int
    threads: int
    dtype: str
    device: str

    @property
    def ratio(self) -> float:
        """Pruned as a share of dense: the median over the turns, so that drift of the machine cancels."""
        return float(np.median(np.divide(self.pruned.samples, self.dense.samples)))

    @property
    def ratio_quartiles(self) -> tuple[float, float]:
        low, high = np.quantile(np.divide(self.pruned.samples, self.dense.samples), (0.25, 0.75))
        return float(low), float(high)

    @property
    def noisy(self) -> bool:
        """True if half of the turns do not even agree within `QUIET`: the machine had other work."""
        low, high = self.ratio_quartiles
        return high - low > QUIET * self.ratio

    def won_per_macs(self, macs_share: float) -> float | None:
        """Share of latency won per share of MACs removed: 1 where time falls like arithmetic; None without."""
        return (1 - self.ratio) / (1 - macs_share) if macs_share < 1 else None


@dataclass(frozen=True, slots=True, eq=False)
class StepTimes:
    """One operator, timed at several widths."""

    source: str
    """Path of the module that runs it."""
    monomials: tuple[Monomial, ...]
    """What its time may be proportional to."""
    seconds: FloatArray
    """(samples,)"""


def fit_terms(steps: Iterable[StepTimes], counts: Sequence[Mapping[str, int]]) -> tuple[CostTerm, ...]:
    """Latency terms from operators timed at `counts`, one mapping group -> kept units for each sample.

    Every operator is fitted by non-negative least squares, a sample weighted by one over the root of its
    time, so that neither wide nor narrow models dominate. Terms of one source and product are summed.
    """
    totals: dict[tuple[str, Monomial], float] = {}
    for step in steps:
        design = np.array([[_value(m, kept) for m in step.monomials] for kept in counts])
        weights = 1 / np.sqrt(np.maximum(step.seconds, 1e-9))
        largest = np.maximum(np.abs(design).max(axis=0), 1e-12)
        solution, _ = nnls(design / largest * weights[:, None], step.seconds * weights)
        for monomial, coefficient in zip(step.monomials, solution / largest, strict=True):
            if coefficient > 0:
                key = step.source, monomial
                totals[key] = totals.get(key, 0.0) + float(coefficient)
    return tuple(CostTerm("latency", source, value, monomial) for (source, monomial), value in totals.items())


def _value(monomial: Monomial, kept: Mapping[str, float]) -> float:
    return math.prod(extent.at(kept) for extent in monomial)


def predicted(terms: Iterable[CostTerm], kept: Mapping[str, float]) -> float:
    """Seconds by `terms` when each group keeps `kept` units."""
    return sum(term.coefficient * _value(term.extents, kept) for term in terms)


def calibrated(
    terms: Sequence[CostTerm], counts: Sequence[Mapping[str, int]], measured: Sequence[float]
) -> tuple[CostTerm, ...]:
    """`terms`, scaled and with a constant overhead, so that their sum fits whole models measured at `counts`.

    Both are non-negative and fitted to relative errors; one measured model gives the scale alone.
    """
    sums = np.array([predicted(terms, kept) for kept in counts])
    seconds = np.asarray(measured, dtype=np.float64)
    columns = [sums / seconds] if len(seconds) == 1 else [sums / seconds, 1 / seconds]
    solution, _ = nnls(np.stack(columns, axis=1), np.ones(len(seconds)))
    scaled = [replace(term, coefficient=term.coefficient * float(solution[0])) for term in terms]
    overhead = float(solution[1]) if len(solution) > 1 else 0.0
    return tuple(scaled) + ((CostTerm("latency", "overhead", overhead),) if overhead > 0 else ())


@dataclass(frozen=True, slots=True)
class LatencyTable:
    """Latency terms of one model on one machine, and how well they foretell whole models."""

    terms: tuple[CostTerm, ...]
    dense: float
    """Seconds of the dense model, measured."""
    checks: tuple[tuple[float, float], ...]
    """(predicted, measured) seconds of models at random widths that were not fitted."""
    threads: int
    batch: int

    @property
    def errors(self) -> FloatArray:
        """Relative errors of the checks, signed: positive where the prediction is too slow."""
        return np.array([p / m - 1 for p, m in self.checks])

    def __str__(self) -> str:
        worst = float(np.abs(self.errors).max(initial=0.0))
        return (
            f"latency table: dense {self.dense * 1e3:.3g} ms (batch {self.batch}, {self.threads} threads); "
            f"{len(self.checks)} models at random widths foretold within {worst:.1%}"
        )


@dataclass(frozen=True, slots=True)
class Correction:
    """What the final measurement says about a latency target; times in seconds."""

    limit: float
    predicted: float
    measured: float

    @property
    def met(self) -> bool:
        return self.measured <= self.limit

    @property
    def factor(self) -> float:
        """How much slower the model is than its terms said."""
        return self.measured / self.predicted

    def apply(self, terms: Iterable[CostTerm]) -> tuple[CostTerm, ...]:
        """The terms of a repeated allocation: as before, but latency as slow as it was measured to be.

        The limit stays what the user asked for; a share keeps the original model as its whole.
        """
        return tuple(
            replace(t, coefficient=t.coefficient * self.factor) if t.quantity == "latency" else t for t in terms
        )

    def __str__(self) -> str:
        verdict = "met" if self.met else "missed"
        return (
            f"latency target {self.limit * 1e3:.3g} ms {verdict}: measured {self.measured * 1e3:.3g} ms, "
            f"predicted {self.predicted * 1e3:.3g} ms"
        )


@runtime_checkable
class Stopwatch(Protocol):
    """A session whose framework can time models on this machine."""

    def compare_latency(
        self,
        folder: Path,
        input_size: tuple[int, int, int],
        *,
        batch: int,
        threads: int | None,
        repeats: int,
        dtype: str,
    ) -> LatencyComparison:
        """The finished run's model in `folder` against the original, in turns, on images of `input_size`."""
        ...

    @property
    def graph(self) -> ChannelGraph:
        """The graph of the original model, with the run's floors."""
        ...

    def time_layers(self) -> LatencyTable:
        """Latency terms of the original model, for batches of one sample. Raises ConfigError if it cannot."""
        ...

    def add_terms(self, terms: Iterable[CostTerm]) -> None:
        """Add cost terms to the original model's graph, before anything is changed."""
        ...

    def time_at(self, counts: Mapping[str, int] | None) -> float:
        """Seconds of the original model with `counts` units kept (group -> units); of the current one for None."""
        ...
