"""Measured time as terms of the cost model: every operator of a traced model, timed at several widths.

The captured forward pass is run, operator by operator, on restricted tensors (as the reference of law 1 runs
it), so that each operator is timed in its place, with the memory traffic it has there, for every
architecture alike. What whole models take on top (Python, dispatch, allocation) is calibrated on a few
physically pruned ones, and the error of the result is measured on others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunus.adapters.pytorch.latency import Clock, computing, measure, own_clock
from prunus.adapters.pytorch.oracle import Oracle
from prunus.adapters.pytorch.tracing.program import Step
from prunus.adapters.pytorch.tracing.trace import Trace
from prunus.adapters.pytorch.weights import tensors_of
from prunus.core.allocation import Ladder, ladders
from prunus.core.graph import ChannelGraph
from prunus.core.latency import LatencyTable, Monomial, StepTimes, Timing, calibrated, fit_terms, predicted

Shrink = Callable[[Mapping[str, Sequence[int]]], nn.Module]
"""A copy of the traced model from which everything but `keep` was physically removed."""

_WIDTHS = 20
_NARROWEST = 0.15
_REPEATS = 5
_CALIBRATION = 4
_CHECKS = 4
_WHOLE = 30
"""Samples of each whole model."""


def latency_table(
    trace: Trace,
    graph: ChannelGraph,
    model: nn.Module,
    example: tuple[Any, ...],
    shrink: Shrink,
    *,
    threads: int | None = None,
    seed: int = 0,
) -> LatencyTable:
    """Measure `model`, the traced one, for batches of one sample of `example`, at widths that `graph` allows.

    Takes some hundred forward passes. Choose `threads` as the model will be served. Terms are in
    seconds and go into `ChannelGraph.with_terms`.
    """
    rng = np.random.default_rng(seed)
    rungs = ladders(graph)
    single = tuple(x[:1] if isinstance(x, Tensor) else x for x in example)
    clock = own_clock(threads, single)
    dense = trace.graph.units
    widths = [dense, *_spread(rungs, rng, _WIDTHS - 1)]
    terms = fit_terms(_timed_steps(trace, model, single, widths, threads, clock), widths)
    whole = [dense, *_spread(rungs, rng, _CALIBRATION), *_spread(rungs, rng, _CHECKS)]
    models = [model, *(shrink(_keep(kept)) for kept in whole[1:])]
    seconds = _levelled(measure(models, single, repeats=_WHOLE, threads=threads, clock=clock))
    fitted = 1 + _CALIBRATION
    terms = calibrated(terms, whole[:fitted], seconds[:fitted])
    checks = zip(whole[fitted:], seconds[fitted:], strict=True)
    return LatencyTable(
        terms=terms,
        dense=seconds[0],
        checks=tuple((predicted(terms, kept), taken) for kept, taken in checks),
        threads=threads or torch.get_num_threads(),
        batch=1,
    )


def latency(model: nn.Module, example: tuple[Any, ...], threads: int | None = None) -> float:
    """Seconds of one forward pass of one sample, measured as the table's whole models are."""
    single = tuple(x[:1] if isinstance(x, Tensor) else x for x in example)
    return measure([model], single, repeats=_WHOLE, threads=threads, clock=own_clock(threads, single))[0].median


def _spread(rungs: Sequence[Ladder], rng: np.random.Generator, number: int) -> list[dict[str, int]]:
    """Random models from narrow to wide: their shares lie one in each of `number` equal parts."""
    shares = _NARROWEST + (1 - _NARROWEST) * (np.arange(number) + rng.uniform(size=number)) / number
    return [random_counts(rungs, rng, share) for share in shares]


def random_counts(rungs: Sequence[Ladder], rng: np.random.Generator, share: float) -> dict[str, int]:
    """Allowed kept counts of a random model: about `share` of every group, each with its own deviation."""
    counts: dict[str, int] = {}
    for ladder in rungs:
        wanted = ladder.counts[-1] * np.clip(share * rng.uniform(0.6, 1.4), 0, 1)
        nearest = int(ladder.counts[np.abs(ladder.counts - wanted).argmin()])
        counts.update(dict.fromkeys(ladder.groups, nearest))
    return counts


def _keep(counts: Mapping[str, int]) -> dict[str, list[int]]:
    """Time depends on how many units stay, not on which."""
    return {name: list(range(count)) for name, count in counts.items()}


def _levelled(timings: Sequence[Timing]) -> list[float]:
    """Medians without their noise: the fastest samples, raised by the first model's median over its fastest."""
    level = timings[0].median / timings[0].fastest
    return [timing.fastest * level for timing in timings]


def _timed_steps(
    trace: Trace,
    model: nn.Module,
    example: tuple[Any, ...],
    widths: Sequence[Mapping[str, int]],
    threads: int | None,
    clock: Clock,
) -> list[StepTimes]:
    tensors = tensors_of(model)
    steps = [step for step in trace.program.steps if step.target is not None]
    table = np.zeros((len(widths), len(steps)))
    with computing(threads):
        for row, counts in enumerate(widths):
            watch = _Stopwatch(trace, tensors, _keep(counts), clock)
            watch.run(example)  # warms up, and restricts the tensors
            for _ in range(_REPEATS):
                watch.begin()
                watch.run(example)
            table[row] = [watch.fastest(step) for step in steps]
    return [
        StepTimes(step.owner or step.op, _monomials(trace, step), table[:, column])
        for column, step in enumerate(steps)
    ]


class _Stopwatch(Oracle):
    """A forward pass on restricted tensors that notes how long every operator takes."""

    def __init__(
        self, trace: Trace, tensors: Mapping[str, Tensor], keep: Mapping[str, Sequence[int]], clock: Clock
    ) -> None:
        super().__init__(trace, tensors, keep, mode="prune")
        self._clock = clock
        self._restricted: dict[Step, Tensor] = {}
        self._rounds: list[dict[int, float]] = []
        self.begin()

    def begin(self) -> None:
        """A new round: the ones before stay."""
        self._rounds.append({})

    def fastest(self, step: Step) -> float:
        """Seconds of one operator in its best round: what other processes took is not the model's."""
        return min(seconds[step.index] for seconds in self._rounds[1:])

    def execute(self, step: Step, arguments: dict[str, Any]) -> Any:
        start = self._clock()
        result = super().execute(step, arguments)
        self._rounds[-1][step.index] = self._clock() - start
        return result

    def _tensor(self, step: Step) -> Tensor:
        if step not in self._restricted:
            self._restricted[step] = super()._tensor(step)
        return self._restricted[step]


def _monomials(trace: Trace, step: Step) -> tuple[Monomial, ...]:
    """The constant, and the size of every operand and result that can shrink."""
    found: dict[Monomial, None] = {(): None}
    for value in (*step.inputs(), step):
        labels = trace.labels.get(value)
        if isinstance(value.shapes, tuple) and labels is not None:
            extents = (trace.grouping.extent(ids) for ids in labels if ids is not None)
            found[tuple(extent for extent in extents if extent.terms)] = None
    return tuple(found)
