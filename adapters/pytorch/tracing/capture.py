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
    the model, and a stored bias would hide the parameter that it comes from.
    """
    attributes = {module: dict(vars(module)) for module in model.modules()}
    contents = {
        (module, name): dict(value)
        for module, found in attributes.items()
        for name, value in found.items()
        if isinstance(value, dict)
    }
    buffers = [(b, b.detach().clone()) for b in model.buffers()] if training else []
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    _forget(model)
    model.train(training)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, found in attributes.items():
            vars(module).clear()
            vars(module).update(found)
        for (module, name), content in contents.items():
            value = vars(module)[name]
            value.clear()
            value.update(content)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def _forget(model: nn.Module) -> None:
    for module in model.modules():
        for name, value in vars(module).items():
            if "cache" in name and isinstance(value, dict):
                value.clear()
