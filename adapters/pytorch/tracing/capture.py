"""From a module to a `Program`: one recorded call, with the module left exactly as it was."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from prunus.adapters.pytorch.tracing.modes import Snapshot, overrides_modes, set_mode
from prunus.adapters.pytorch.tracing.program import Program
from prunus.adapters.pytorch.tracing.recorder import Recorder
from prunus.core.errors import TraceError


def capture(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], training: bool = False) -> Program:
    """The program that `model(*args, **kwargs)` runs, in eval mode unless `training`.

    Fake tensors first: no arithmetic, no memory. A model that asks for values (detection) runs on real ones.
    Raises TraceError with the reason if neither works.
    """
    with as_found(model, training), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            return _record(model, args, kwargs, FakeTensorMode(allow_non_fake_inputs=True))
        except Exception:  # whatever fails on fake tensors is tried on real ones, which tell the true reason
            _forget(model)
        try:
            return _record(model, args, kwargs, None)
        except Exception as error:
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            mode = "train" if training else "eval"
            raise TraceError(
                f"{type(model).__name__} fails on its example inputs in {mode} mode: {reason}"
            ) from error


def _record(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], fake: FakeTensorMode | None
) -> Program:
    leaves, input_spec = pytree.tree_flatten((args, dict(kwargs)))
    values = [fake.from_tensor(x) if fake and isinstance(x, Tensor) else x for x in leaves]
    recorder = Recorder(model)
    inputs = [
        recorder.source("input", f"input_{i}", x) if isinstance(x, Tensor) else None for i, x in enumerate(values)
    ]
    call_args, call_kwargs = pytree.tree_unflatten(values, input_spec)
    with fake or nullcontext(), recorder.watching():
        result = model(*call_args, **call_kwargs)
    outputs, output_spec = pytree.tree_flatten(result)
    constants = dict(recorder.constants)
    stored = set(model.state_dict())
    constants.update({n: b.detach().clone() for n, b in model.named_buffers() if n not in stored})
    return Program(
        recorder.steps,
        [recorder.step_of(x) for x in outputs],
        output_spec,
        constants,
        inputs,
        recorder.calls,
        concrete=fake is None,
    )


@contextmanager
def as_found(model: nn.Module, training: bool) -> Iterator[None]:
    """Sets the mode and empties caches of derived tensors; afterwards everything is as before.

    A forward pass may store what it computed (attention biases, masks): stored fake tensors would poison
    the model, and a stored bias would hide the parameter that it comes from. Parameters are put back as well
    where a pass or a switch may write into them: in training (moving averages), or by the model's own `train`.
    """
    written = training or any(overrides_modes(module) for module in model.modules())
    found = Snapshot(model, [*model.buffers(), *(model.parameters() if written else ())])
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        _forget(model)
        _enter(model, training)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        found.restore()


def _enter(model: nn.Module, training: bool) -> None:
    try:
        set_mode(model, training)
    except Exception as error:  # the model's own code
        mode, said = "train" if training else "eval", str(error) or type(error).__name__
        raise TraceError(f"{type(model).__name__} cannot be put into {mode} mode: {said}") from error


def _forget(model: nn.Module) -> None:
    for module in model.modules():
        for name, value in vars(module).items():
            if "cache" in name and isinstance(value, dict):
                value.clear()


def forget_derived(model: nn.Module) -> None:
    """Empties for good the caches of derived tensors: those of `as_found` which hold tensors and nothing else."""
    for module in model.modules():
        for name, value in vars(module).items():
            if "cache" in name and isinstance(value, dict) and all(isinstance(x, Tensor) for x in value.values()):
                value.clear()
