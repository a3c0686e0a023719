"""How long whole models take on this machine: warm-up, turns, medians."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prunus.adapters.pytorch.copies import copied
from prunus.core.errors import ConfigError
from prunus.core.latency import LatencyComparison, Timing

SHORTEST = 2e-3
"""Seconds that one sample takes at least: fast models run several times in it."""
_WARM_UP = 3
Clock = Callable[[], float]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def measure_pair(
    dense: nn.Module,
    pruned: nn.Module,
    example: Sequence[Any],
    *,
    repeats: int = 30,
    threads: int | None = None,
    dtype: str = "float32",
) -> LatencyComparison:
    """Time both models in turns on `example` (the forward's arguments, batch first), `repeats` samples each.

    In turns, because machines drift: both see the same minute. `threads` of None leaves torch's number;
    other types than float32 are timed on converted copies. The models are left as they were.
    """
    dense_timing, pruned_timing = measure((dense, pruned), example, repeats=repeats, threads=threads, dtype=dtype)
    first = _leading(example)
    return LatencyComparison(
        dense=dense_timing,
        pruned=pruned_timing,
        batch=first.shape[0] if first is not None and first.dim() else 1,
        threads=threads or torch.get_num_threads(),
        dtype=dtype,
        device=str(first.device) if first is not None else "cpu",
    )


def measure(
    models: Sequence[nn.Module],
    example: Sequence[Any],
    *,
    repeats: int = 30,
    threads: int | None = None,
    dtype: str = "float32",
    clock: Clock = time.perf_counter,
) -> list[Timing]:
    """Seconds of one forward pass of each model on `example`, after warm-up: all of them once, then again...

    Raises ConfigError for a `dtype` that is not one of `DTYPES`.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}", key="dtype")
    ready = [_converted(model, dtype) for model in models]
    inputs = tuple(x.to(DTYPES[dtype]) if isinstance(x, Tensor) and x.is_floating_point() else x for x in example)
    samples: list[list[float]] = [[] for _ in models]
    with computing(threads), _evaluating(ready):
        try:
            loops = [_loops(model, inputs, clock) for model in ready]
        except RuntimeError as error:
            if dtype == "float32":
                raise
            reason = (str(error).strip().splitlines() or ["no reason given"])[0]
            raise ConfigError(f"the model does not run in {dtype} here: {reason}", key="dtype") from error
        for _ in range(repeats):
            for model, times, into in zip(ready, loops, samples, strict=True):
                into.append(_timed(model, inputs, times, clock))
    return [Timing(tuple(seconds)) for seconds in samples]


def _converted(model: nn.Module, dtype: str) -> nn.Module:
    return model if dtype == "float32" else copied(model).to(DTYPES[dtype])


def _loops(model: nn.Module, inputs: tuple[Any, ...], clock: Clock) -> int:
    """Warms up; the number of passes that last `SHORTEST`."""
    for _ in range(_WARM_UP):
        once = _timed(model, inputs, 1, clock)
    return max(1, round(SHORTEST / max(once, 1e-9)))


def _timed(model: nn.Module, inputs: tuple[Any, ...], loops: int, clock: Clock) -> float:
    _finish(inputs)
    begin = clock()
    for _ in range(loops):
        model(*inputs)
    _finish(inputs)
    return (clock() - begin) / loops


def own_clock(threads: int | None, example: Sequence[Any]) -> Clock:
    """The clock of tables: one thread of a CPU is timed by what it worked, not by what others made it wait."""
    first = _leading(example)
    alone = (threads or torch.get_num_threads()) == 1 and (first is None or first.device.type == "cpu")
    return time.thread_time if alone else time.perf_counter


def _finish(inputs: tuple[Any, ...]) -> None:
    """Accelerators work ahead of Python: wait for them."""
    first = _leading(inputs)
    if first is not None and first.device.type != "cpu":
        torch.accelerator.synchronize(first.device)


def _leading(inputs: Sequence[Any]) -> Tensor | None:
    return next((x for x in inputs if isinstance(x, Tensor)), None)


@contextmanager
def computing(threads: int | None) -> Iterator[None]:
    """Inference without autograd on so many threads; the number is put back afterwards."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _evaluating(models: Sequence[nn.Module]) -> Iterator[None]:
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
